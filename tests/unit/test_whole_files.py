"""Several files as a unit: all new ones or all old ones, and nothing left behind."""

from pathlib import Path

import pytest

from se_prune.errors import SePruneError
from se_prune.files import FOLDER, LOCK, whole_files


def write(paths, text):
    with whole_files(paths) as folder:
        for path in paths:
            (folder / path.name).write_text(text)
        (folder / "scratch").write_text("goes")


@pytest.fixture
def pair(tmp_path):
    return [tmp_path / "deep" / "net.xml", tmp_path / "deep" / "net.bin"]


def found(paths):
    return {p.name: p.read_text() for p in sorted(paths[0].parent.iterdir())}


def test_both_appear_and_are_replaced(pair):
    for text in ("first", "second"):
        write(pair, text)
        assert found(pair) == {"net.bin": text, "net.xml": text}
    assert all(p.stat().st_mode & 0o600 == 0o600 for p in pair)


def test_an_error_while_writing_changes_nothing(pair):
    write(pair, "old")
    with pytest.raises(SePruneError, match=r"cannot write .*net\.xml"), whole_files(pair) as folder:
        (folder / "nowhere" / "net.xml").write_text("new")
    assert found(pair) == {"net.bin": "old", "net.xml": "old"}


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_move_that_fails_puts_the_old_ones_back(pair, monkeypatch, fails_at):
    write(pair, "old")
    real, moves = Path.replace, []

    def replace(self, target):
        moves.append(target)
        if len(moves) == fails_at:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(
        SePruneError, match=r"cannot write .*net\.xml: No space left on device\. Nothing was changed"
    ):
        write(pair, "new")
    monkeypatch.undo()
    assert found(pair) == {"net.bin": "old", "net.xml": "old"}


def test_a_file_that_was_not_written_is_an_error(pair):
    with pytest.raises(SePruneError, match=r"cannot write .*net\.xml"), whole_files(pair) as folder:
        (folder / "net.xml").write_text("alone")
    assert found(pair) == {}


def test_folders_take_the_places_of_folders(tmp_path):
    place = tmp_path / "net.mlpackage"
    for text in ("first", "second"):
        with whole_files([place]) as folder:
            (folder / place.name).mkdir()
            (folder / place.name / text).write_text(text)
        assert [p.name for p in place.iterdir()] == [text]
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_killed_writer_left_goes_and_a_living_ones_stays(pair):
    import fcntl

    pair[0].parent.mkdir()
    left, living = (pair[0].parent / f".net.xml.{name}{FOLDER}" for name in ("deadbeef", "livewire"))
    for folder in (left, living):
        folder.mkdir()
        (folder / LOCK).touch()
    with (living / LOCK).open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write(pair, "new")
        assert not left.exists()
        assert living.exists()
    write(pair, "newer")
    assert not living.exists()
    assert found(pair) == {"net.bin": "newer", "net.xml": "newer"}
