"""Data at scale: webdataset shards, workers, unreadable images, modes of images, and class maps."""

import io
import json
import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from se_prune.data import open_data
from se_prune.data.folders import default_workers
from se_prune.data.raw import decoded
from se_prune.data.source import balanced_subset, reference_name
from se_prune.errors import DataError, UsageError
from se_prune.evaluate import evaluate, paired
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from se_prune.training.stopping import top1
from tests.tiny import png_folder

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CPU = torch.device("cpu")
FORK = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


def png(value):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder, *, shards=100, each=3, classes=3, val=4):
    """Write shards whose image number i has the grey value i % 251 and the class i % classes."""
    folder.mkdir()
    for split, count in (("train", shards), ("val", val)):
        for shard in range(count):
            with tarfile.open(folder / f"set-{split}-{shard:04d}.tar", "w") as tar:
                for i in range(shard * each, (shard + 1) * each):
                    add(tar, f"{i:06d}.png", png(i % 251))
                    add(tar, f"{i:06d}.cls", str(i % classes).encode())
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("wds") / "set")


def values(batches):
    """Return the grey value and the label of every image."""
    pairs = [pair for images, labels in batches for pair in zip(images, labels, strict=True)]
    return [(round(float(image.mean()) * 255), int(label)) for image, label in pairs]


# Shards.


@pytest.mark.parametrize("ref", ["{}", "wds/{}"])
def test_a_hundred_shards_are_read_in_order(hundred, ref):
    data = open_data(ref.format(hundred), workers=0)
    assert (len(data.train), len(data.test), data.classes) == (300, 12, ("0", "1", "2"))
    assert values(data.train.batches(64, RGB)) == [(i % 251, i % 3) for i in range(300)]
    assert data.name == ref.format("set")
    part = balanced_subset(data.train, 30, 0)
    assert torch.bincount(part.labels).tolist() == [10, 10, 10]
    assert [label for _, label in values(part.batches(7, RGB))] == part.labels.tolist()


@FORK
def test_an_epoch_of_shards_is_the_same_for_any_number_of_workers(hundred):
    settings = TrainSettings(batch_size=50, erase=0.5)

    def epoch(workers, number=0, seed=0):
        split = open_data(str(hundred), workers=workers).train
        batches = list(split.training_batches(settings, RGB, seed=seed, epoch=number))
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    torch.manual_seed(1)
    before, python = torch.get_rng_state(), random.getstate()
    images, labels = epoch(0)
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()
    for workers in (1, 3):
        again, same = epoch(workers)
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    assert labels.shape == (300,)
    assert not torch.equal(images, epoch(0, number=1)[0])
    assert not torch.equal(images, epoch(0, seed=1)[0])


def test_an_epoch_mixes_the_images_of_a_few_shards_at_a_time(hundred):
    split = open_data(str(hundred), workers=0).train
    order = split.order(0, 0)
    assert sorted(order.tolist()) == list(range(300))
    shards = split.source.shards[order]
    windows = [set(shards[i : i + 48].tolist()) for i in range(0, 288, 48)]
    assert [len(window) for window in windows] == [16] * 6
    assert len(set().union(*windows)) == 96  # no shard in two windows
    assert shards[:48].tolist() != sorted(shards[:48].tolist())
    assert not torch.equal(order, split.order(0, 1))


def test_splits_and_classes_of_a_description(tmp_path):
    folder = write_shards(tmp_path / "set", shards=2, val=1)
    names = {"train": ["set-train-0000.tar", "set-train-0001.tar"], "validation": ["set-val-0000.tar"]}
    splits = {
        k: {"name": k, "filenames": v, "shard_lengths": [3] * len(v), "num_samples": 3 * len(v)}
        for k, v in names.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    (folder / "classes.txt").write_text("ant\nbee\ncow\n")
    data = open_data(str(folder), workers=0)
    assert (len(data.train), len(data.test), data.classes) == (6, 3, ("ant", "bee", "cow"))
    splits["train"]["shard_lengths"][1] = 4
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"set-train-0001\.tar has 3 images, its description says 4"):
        open_data(str(folder))
    (folder / "set-train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards of .* are missing, the first is set-train-0001\.tar"):
        open_data(str(folder))


def test_shards_that_cannot_be_used(tmp_path):
    folder = write_shards(tmp_path / "set", shards=2, val=1)
    path = folder / "set-train-0001.tar"
    whole = path.read_bytes()
    for end in (
        700,
        1024,
        1500,
        3000,
    ):  # within an image, between members, within a header, within the last blocks
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"set-train-0001\.tar is not a whole tar file"):
            open_data(str(folder))
    path.write_bytes(whole)
    with tarfile.open(path, "a") as tar:
        add(tar, "readme.txt", b"no image: ignored")
        add(tar, "000099.json", b'{"label": 2}')
        add(tar, "000099.png", png(9))
    assert open_data(str(folder)).train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2]
    with tarfile.open(path, "a") as tar:
        add(tar, "000100.png", png(9))
    with pytest.raises(
        DataError, match=r"the sample '000100' has no label; it needs a number in a \.cls file"
    ):
        open_data(str(folder))
    path.write_bytes(whole)
    (folder / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="has a label 2, but there are 2 classes"):
        open_data(str(folder))
    (folder / "set-val-0000.tar").unlink()
    with pytest.raises(DataError, match=r"has no shards of 'validation': name them validation-0000\.tar"):
        open_data(str(folder))


def test_the_index_of_large_splits_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SE_PRUNE_CACHE", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "set", shards=2, val=1)
    open_data(str(folder))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("se_prune.data.shards.CACHED_FROM", 4)
    first = open_data(str(folder)).train
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("se_prune.data.shards._read_shard", None)  # not read again
    with pytest.raises(TypeError):
        open_data(str(folder))  # the control: val is small and has no index
    monkeypatch.undo()
    monkeypatch.setenv("SE_PRUNE_CACHE", str(tmp_path / "cache"))
    assert torch.equal(open_data(str(folder)).train.source.offsets, first.source.offsets)
    kept.write_bytes(b"damaged")
    assert len(open_data(str(folder)).train) == 6


@pytest.mark.filterwarnings(  # webdataset leaves its files to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_shards_are_those_of_timms_reader(tmp_path):
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    folder = write_shards(tmp_path / "set", shards=3, val=1)
    theirs = create_dataset("wds/set", root=str(folder), split="set-train-{0000..0002}.tar|9")
    pairs = [(round(float(np.asarray(image).mean())), label) for image, label in theirs]
    assert pairs == values(open_data(str(folder), workers=0).train.batches(4, RGB))


# Images that cannot be read.


class _Brightness(nn.Module):
    """Says class 1 for bright images."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0.3 - mean, mean - 0.3], 1)


class _Always(nn.Module):
    def forward(self, x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


@pytest.fixture
def damaged(tmp_path):
    folder = png_folder(tmp_path / "data", per_class=4)
    (folder / "val" / "bee" / "1.png").write_bytes(b"no image")
    (folder / "train" / "ant" / "0.png").write_bytes(b"")
    return folder


@FORK
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("most", [1, 0.2])
def test_unreadable_images_are_left_out_of_both_networks(damaged, caplog, workers, most):
    data = open_data(str(damaged), workers=workers, max_bad_images=most)
    first = evaluate(_Brightness(), data.test, RGB, device=CPU, batch_size=3)
    assert (first.n, first.top1) == (7, 1.0)
    assert first.predictions == (0, 0, 0, 0, 1, -1, 1, 1)
    assert "1 of 8 images are left out: " in caplog.text
    assert "1.png cannot be read (no image of a known kind)" in caplog.text
    second = evaluate(_Always(), data.test, RGB, device=CPU, batch_size=5)
    assert (second.n, second.top1) == (7, pytest.approx(4 / 7))
    test = paired(first, second, data.test)
    assert (test.only_first_right, test.only_second_right) == (3, 0)
    assert test.top1_difference == pytest.approx(-3 / 7)


def test_held_out_images_that_cannot_be_read_do_not_count(damaged):
    data = open_data(str(damaged), workers=0, max_bad_images=1)
    assert top1(_Brightness(), data.test, RGB, CPU) == 1.0
    assert top1(_Always(), data.test, RGB, CPU) == pytest.approx(4 / 7)


def test_training_puts_another_image_in_the_place_of_an_unreadable_one(damaged):
    split = open_data(str(damaged), workers=0, max_bad_images=1).train
    settings = TrainSettings(batch_size=4, flip=0.0)
    batches = list(split.training_batches(settings, RGB, seed=0, epoch=0))
    assert [len(y) for _, y in batches] == [4, 4]
    assert all((x.mean((1, 2, 3)) > 0.3).long().equal(y) for x, y in batches)
    again = list(split.training_batches(settings, RGB, seed=0, epoch=0))  # now the image is known
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))


@pytest.mark.parametrize("most", [0, 1, 0.3])
def test_too_many_unreadable_images(damaged, most):
    for index in range(3):
        (damaged / "val" / "ant" / f"{index}.png").write_bytes(b"no image")
    data = open_data(str(damaged), workers=0, max_bad_images=most)
    with pytest.raises(
        DataError, match=r"0\.png cannot be read .*allow more with --max-bad-images"
    ) as caught:
        evaluate(_Brightness(), data.test, RGB, device=CPU, batch_size=8)
    assert ("of 8 images cannot be read" in str(caught.value)) == (most > 0)
    with pytest.raises(UsageError, match="must be 0 or more, got None and -1"):
        open_data(str(damaged), max_bad_images=-1)
    with pytest.raises(UsageError, match="got -2 and"):
        open_data(str(damaged), workers=-2)


def test_a_batch_without_any_image(damaged):
    for path in (damaged / "val" / "ant").iterdir():
        path.write_bytes(b"")
    data = open_data(str(damaged), workers=0, max_bad_images=8)
    with pytest.raises(DataError, match="no image of a whole batch can be read"):
        list(data.test.batches(4, RGB))
    assert len(next(iter(data.test.batches(8, RGB)))[1]) == 3  # the control


# Files and modes.


def test_hidden_and_other_files_are_ignored(tmp_path):
    folder = png_folder(tmp_path / "data")
    for name in ("._0.png", "notes.txt", "Thumbs.db"):
        (folder / "train" / "ant" / name).write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "ant" / "9.JPEG").write_bytes(png(5))
    data = open_data(str(folder), workers=0)
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 3
    assert len(values(data.train.batches(9, RGB))) == 7


def _palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\x00\x80"
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("LA", (4, 4), (77, 3)), (77, 77, 77)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 5)), (10, 20, 30)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (_palette(), (200, 100, 50)),
        (Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)), (99, 99, 99)),
        (Image.fromarray(np.full((4, 4), 65535, np.int32)), (255, 255, 255)),
    ],
    ids=["grey", "bits", "grey-alpha", "alpha", "cmyk", "palette", "16-bit", "32-bit"],
)
def test_every_mode_is_decoded(image, colour):
    assert decoded(image, "RGB").getpixel((1, 2)) == colour
    assert decoded(image, "L").mode == "L"


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        decoded(Image.new("F", (2, 2), 0.5), "RGB")


def test_workers_by_default(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert default_workers() == 1


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("wds//data/in1k", "wds/in1k"),
        ("hfds//data/x", "hfds/x"),
        ("hfds/a/b@/c", "hfds/a/b"),
        ("torch/x@/y", "torch/x"),
    ],
)
def test_references_travel_without_paths(ref, name):
    assert reference_name(ref) == name


def test_replacing_workers_changes_nothing_else(hundred):
    split = open_data(str(hundred)).train
    assert replace(split, workers=0).labels.equal(split.labels)
