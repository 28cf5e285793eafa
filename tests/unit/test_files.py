"""Files appear whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from unittest import mock

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from se_prune.errors import SePruneError
from se_prune.files import make_folder, remove_folder, require_writable, whole_file, write_tensors, write_text


@pytest.fixture
def umask():
    """Set the process's umask, and put it back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path):
    target = tmp_path / "run.json"
    target.write_text("old")
    with whole_file(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        assert temporary != target
        temporary.write_text("half")
        assert target.read_text() == "old"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["run.json"]


def test_missing_folders_are_made(tmp_path):
    write_text(str(tmp_path / "a" / "b" / "c.txt"), "grüße\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "grüße\n".encode()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", ["old", None])
def test_an_error_inside_leaves_what_was_there(tmp_path, error, old):
    target = tmp_path / "file"
    if old is not None:
        target.write_text(old)

    def write():
        with whole_file(target) as temporary:
            temporary.write_text("half")
            assert names(tmp_path) == sorted(([] if old is None else ["file"]) + [temporary.name])
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or target.read_text() == old


def test_a_full_disk_is_a_sentence(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write():
        with whole_file(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SePruneError) as caught:
        write()
    assert str(caught.value) == (
        f"cannot write {target}: No space left on device. Nothing was changed; free space there or choose another "
        "place with -o."
    )
    assert names(tmp_path) == ["file"]
    assert target.read_text() == "old"


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SePruneError, match=r"cannot write .*out: Is a directory"):
        write_text(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"]


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SePruneError, match=r"cannot write .*out\.txt: (File exists|Not a directory)"):
        write_text(tmp_path / "file" / "out.txt", "x")
    with pytest.raises(SePruneError, match=r"cannot write .*deep/out\.txt: (File exists|Not a directory)"):
        write_text(tmp_path / "file" / "deep" / "out.txt", "x")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0, 0o666)])
def test_permissions_follow_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write_text(tmp_path / "new", "x")
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode == stat.S_IMODE(plain.stat().st_mode)
    assert os.umask(mask) == mask  # and the umask is as it was


def test_tensors_are_written_whole(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).T, "b": shared[1:4], "c": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"who": "me"})
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert names(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left"), OSError(28, "No space left")])
def test_a_full_disk_under_safetensors(tmp_path, monkeypatch, error):
    target = tmp_path / "t.safetensors"
    write_tensors(target, {"a": torch.zeros(3)}, {})
    before = target.read_bytes()

    def half(_, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(SePruneError, match=r"cannot write .*t\.safetensors: .*No space left.* Nothing was"):
        write_tensors(target, {"a": torch.ones(3)}, {})
    assert target.read_bytes() == before
    assert names(tmp_path) == ["t.safetensors"]


def test_require_writable_leaves_nothing_behind(tmp_path):
    (tmp_path / "old").write_text("old")
    require_writable(tmp_path / "old")
    require_writable(tmp_path / "new")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_require_writable_says_what_writing_would_say(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("file/out", "folder"):
        with pytest.raises(SePruneError) as early:
            require_writable(tmp_path / name)
        with pytest.raises(SePruneError) as late:
            write_text(tmp_path / name, "x")
        assert str(early.value) == str(late.value)
    assert names(tmp_path) == ["file", "folder"]


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SePruneError, match=r"cannot make the folder .*file: File exists; choose another"):
        make_folder(tmp_path / "file")


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_text(pipe, "x"), lambda: require_writable(pipe)):
        with pytest.raises(SePruneError, match=r"cannot write .*pipe: .*not a file"):
            write()
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_what_a_killed_write_left_goes_at_the_next_one(tmp_path):
    target = tmp_path / "net.safetensors"
    left = [tmp_path / f".net.safetensors.{code}.safetensors" for code in ("abcdefgh", "1_345678")]
    others = [
        tmp_path / name
        for name in (".net.safetensors.safetensors", ".other.safetensors.abcdefgh.safetensors")
    ]
    for path in (*left, *others):
        path.write_bytes(b"half")
    write_tensors(target, {"a": torch.zeros(3)}, {})
    assert names(tmp_path) == sorted([target.name, *(path.name for path in others)])
    left[0].write_bytes(b"half")
    require_writable(target)
    assert not left[0].exists()


def test_what_another_process_is_writing_stays(tmp_path):
    target = tmp_path / "file.txt"
    with whole_file(target) as temporary:
        write_text(target, "first")
        assert temporary.exists()
        temporary.write_text("second")
    assert target.read_text() == "second"
    assert names(tmp_path) == ["file.txt"]


def test_a_writer_that_was_killed(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from se_prune.files import whole_file\n"
        "with whole_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file.txt")], check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "file.txt", "whole")
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_is_removed_with_all_in_it(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []
    monkeypatch.setattr("shutil.rmtree", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(SePruneError, match=r"cannot remove .*a: Permission denied; remove it by hand"):
        remove_folder(tmp_path / "a")
