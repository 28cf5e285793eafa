"""Data sets: the bundled one, idx files and folders that users have, subsets, augmentation and preprocessing."""

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from se_prune.data import open_data
from se_prune.data.batches import TensorImages
from se_prune.data.folders import FolderImages, open_folders
from se_prune.data.idx import BUNDLED, CLASSES, find_pair, read_idx, read_pair
from se_prune.data.source import balanced_subset
from se_prune.errors import DataError
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from tests.tiny import idx_bytes, png_folder, stripes, write_idx

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
STILL = TrainSettings(flip=0.0, crop_padding=0, erase=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The bundled Fashion-MNIST.


@pytest.fixture(scope="module")
def fashion():
    return open_data("fashion-mnist")


def test_the_bundled_part_has_its_sizes_and_is_balanced(fashion):
    assert len(fashion.train) == 12_000
    assert len(fashion.test) == 10_000
    assert torch.equal(torch.bincount(fashion.train.labels), torch.full((10,), 1_200))
    assert torch.equal(torch.bincount(fashion.test.labels), torch.full((10,), 1_000))
    for split in (fashion.train, fashion.test):
        assert split.images.shape[1:] == (1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
    assert fashion.classes == CLASSES
    assert len(fashion.classes) == 10


def test_the_test_images_are_the_ones_that_everybody_has(fashion):
    # the first labels and the mean of the published t10k files; the published training mean is 0.2860
    assert fashion.test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert CLASSES[9] == "boot"
    raw = gzip.decompress((BUNDLED / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert list(raw[8:]) == fashion.test.labels.tolist()
    pixels = gzip.decompress((BUNDLED / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert torch.equal(
        fashion.test.images.flatten(), torch.from_numpy(np.frombuffer(pixels, np.uint8).copy())
    )
    assert float(fashion.train.images.double().mean()) / 255 == pytest.approx(0.2860, abs=2e-3)


def test_its_own_preprocessing_gives_mean_0_and_deviation_1(fashion):
    images = torch.cat([x for x, _ in fashion.train.batches(2_000, fashion.preprocessing)])
    assert images.shape == (12_000, 1, 28, 28)
    assert float(images.mean()) == pytest.approx(0, abs=0.01)
    assert float(images.std()) == pytest.approx(1, abs=0.01)


# idx files.


@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 4)])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_as_they_are(tmp_path, shape, zipped):
    values = torch.randint(0, 256, shape, generator=generator())
    path = tmp_path / ("file.gz" if zipped else "file")
    path.write_bytes(gzip.compress(idx_bytes(values)) if zipped else idx_bytes(values))
    assert torch.equal(read_idx(path), values.to(torch.uint8))


GOOD = idx_bytes(torch.arange(12).view(3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "is not a whole idx file"),
        (GOOD + b"\0", "is not a whole idx file"),
        (GOOD[:9], "is not a whole idx file"),
        (GOOD[:3], "is not a whole idx file"),
        (b"", "is not a whole idx file"),
        (b"\0\x01" + GOOD[2:], "is not an idx file of bytes"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "is not an idx file of bytes"),  # floats
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1), "is not a whole idx file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not"),
        (b"\0\0\x08\xff" + bytes(64), "is not a whole idx file"),
    ],
)
def test_files_that_are_no_idx(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name} {message}"):
        read_idx(path)
    path.write_bytes(GOOD)
    assert read_idx(path).shape == (3, 4)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:12], GOOD, b"", gzip.compress(GOOD)[:-1] + b"x"],
)
def test_broken_gzip(tmp_path, content):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"file\.gz is not a whole idx file .*; copy it again"):
        read_idx(path)


def test_a_missing_idx_file(tmp_path):
    with pytest.raises(DataError, match=r"is not a whole idx file .*No such file"):
        read_idx(tmp_path / "nothing")


def test_a_pair_must_belong_together(tmp_path):
    images, labels = stripes(6).images[:, 0], stripes(6).labels
    write_idx(tmp_path, "t10k", images, labels)
    pair = find_pair(tmp_path, "t10k")
    assert pair is not None
    x, y = read_pair(*pair)
    assert torch.equal(x[:, 0], images)
    assert torch.equal(y, labels)
    assert (x.shape, y.dtype) == ((6, 1, 8, 8), torch.int64)
    with pytest.raises(DataError, match="do not belong together: 6 images, 6 labels"):
        read_pair(pair[1], pair[0])
    for n_images, n_labels in ((6, 5), (0, 0)):
        write_idx(tmp_path, "t10k", images[:n_images], labels[:n_labels])
        with pytest.raises(DataError, match=f"together: {n_images} images, {n_labels} labels"):
            read_pair(*pair)
    assert find_pair(tmp_path, "train") is None


def test_plain_files_come_before_zipped_ones(tmp_path):
    for suffix in ("", ".gz"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"train-{kind}-ubyte{suffix}").touch()
    assert find_pair(tmp_path, "train")[0].suffix == ""
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert find_pair(tmp_path, "train")[0].suffix == ".gz"


def test_a_folder_of_idx_files(tmp_path):
    for prefix, n in (("train", 9), ("t10k", 6)):
        write_idx(tmp_path, prefix, stripes(n).images[:, 0], stripes(n).labels)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (9, 6)
    assert data.classes == CLASSES
    assert data.preprocessing.mean == (0.2860,)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="has no t10k-images-idx3-ubyte with its labels; give all four"):
        open_data(str(tmp_path))
    write_idx(tmp_path, "t10k", stripes(3).images[:, 0], torch.tensor([0, 1, 10]))
    with pytest.raises(DataError, match="has label 10, but there are 10 classes"):
        open_data(str(tmp_path))


def test_idx_files_of_other_classes(tmp_path):
    for prefix, n in (("train", 9), ("t10k", 6)):
        write_idx(tmp_path, prefix, stripes(n).images[:, 0], stripes(n).labels % 3)
    names = tmp_path / "classes.txt"
    names.write_text("zero\none\ntwo\n")
    data = open_data(str(tmp_path))
    assert data.classes == ("zero", "one", "two")
    pixels = stripes(9).images.double() / 255
    assert data.preprocessing.input_size == (1, 8, 8)
    assert data.preprocessing.mean == (round(float(pixels.mean()), 4),)
    names.write_text("zero\none\n")
    with pytest.raises(DataError, match="has label 2, but there are 2 classes"):
        open_data(str(tmp_path))
    for content in (b"", b"zero\n\ntwo\n", b"zero\none\nzero\n"):
        names.write_bytes(content)
        with pytest.raises(DataError, match="needs one class name a line"):
            open_data(str(tmp_path))
    names.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"classes\.txt cannot be read"):
        open_data(str(tmp_path))


# Folders of images.


def steady(split):
    """Return a split that is read in this process."""
    return replace(split, workers=0)


@pytest.fixture
def folder(tmp_path):
    return png_folder(tmp_path / "data", ("ant", "bee"))


def test_a_folder_of_images(folder):
    data = open_data(str(folder))
    assert data.classes == ("ant", "bee")
    assert data.preprocessing is None
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (images, labels), (rest, others) = steady(data.test).batches(4, RGB)
    assert (images.shape, rest.shape) == ((4, 3, 8, 8), (2, 3, 8, 8))
    assert labels.tolist() + others.tolist() == [0, 0, 0, 1, 1, 1]
    brightness = torch.cat([images, rest]).mean((1, 2, 3)) * 255
    assert brightness.tolist() == pytest.approx([0, 10, 20, 100, 110, 120], abs=0.01)


def test_grey_networks_get_grey_images(folder):
    grey = Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(0.5,))
    ((images, _),) = steady(open_data(str(folder)).test).batches(6, grey)
    assert images.shape == (6, 1, 8, 8)
    assert float(images[5].mean()) == pytest.approx(2 * 120 / 255, abs=1e-4)


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)
def test_workers_change_nothing(folder):
    split = open_data(str(folder)).test
    assert split.workers > 0
    for (a, b), (c, d) in zip(split.batches(4, RGB), steady(split).batches(4, RGB), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_taking_from_a_folder(folder):
    split = steady(open_data(str(folder)).train).take(torch.tensor([5, 0, 3])).take(torch.tensor([2, 0]))
    assert len(split) == 2
    assert split.labels.tolist() == [1, 1]
    ((images, labels),) = split.batches(9, RGB)
    assert labels.tolist() == [1, 1]
    assert (images.mean((1, 2, 3)) * 255).tolist() == pytest.approx([100, 120], abs=0.01)


def test_training_on_a_folder_is_the_same_for_the_same_epoch(folder):
    split = steady(open_data(str(folder)).train)
    settings = TrainSettings(batch_size=2)

    def epoch(number, seed=0):
        torch.manual_seed(11)
        batches = list(split.training_batches(settings, RGB, seed=seed, epoch=number))
        assert [x.shape for x, _ in batches] == [(2, 3, 8, 8)] * 3
        return torch.cat([y for _, y in batches]).tolist()

    orders = [epoch(n) for n in range(8)]
    assert all(sorted(order) == [0, 0, 0, 1, 1, 1] for order in orders)
    assert [epoch(n) for n in range(8)] == orders
    assert len({tuple(order) for order in orders}) > 1
    assert [epoch(n, seed=1) for n in range(8)] != orders
    assert len(list(split.training_batches(TrainSettings(batch_size=4), RGB, seed=0, epoch=0))) == 1


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_test_split(folder, name):
    (folder / "val").rename(folder / name)
    assert len(open_data(str(folder)).test) == 6


def test_folders_that_hold_no_data_set(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no data set: it needs train/CLASS/… and val/CLASS/…"):
        open_data(str(tmp_path / "empty"))
    (folder / "val").rename(folder / "vla")
    with pytest.raises(DataError, match=r"data holds no data set: .* or the four idx files"):
        open_data(str(folder))
    (folder / "vla").rename(folder / "val")
    (folder / "train").rename(folder / "tarin")
    with pytest.raises(DataError, match="data holds no data set"):
        open_data(str(folder))


def test_an_empty_class_and_no_class(folder):
    (folder / "val" / "cow").mkdir()
    with pytest.raises(DataError, match=r"val has no images in class folders: .*cow"):
        open_data(str(folder))
    for place in (folder / "val").rglob("*.png"):
        place.unlink()
    for place in (folder / "val").iterdir():
        place.rmdir()
    with pytest.raises(DataError, match="val has no images in class folders"):
        open_data(str(folder))


def test_different_classes_are_named(folder):
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    with pytest.raises(DataError, match=r"train and val have different classes \(bee, wasp …\)"):
        open_data(str(folder))


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [b"", b"no image", b"\x89PNG\r\n\x1a\n and then", "cut"])
def test_a_broken_image_is_named_in_one_sentence(folder, workers, broken):
    path = folder / "val" / "bee" / "1.png"
    if broken == "cut":  # the head is whole, so that it opens, but the pixels are not all there
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        broken = path.read_bytes()[:-4000]
    path.write_bytes(broken)
    split = replace(open_data(str(folder)).test, workers=workers)
    with pytest.raises(DataError) as caught:
        list(split.batches(2, RGB))
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("); copy it again or remove it, or allow more with --max-bad-images.")
    assert "Traceback" not in message
    assert "\n" not in message
    sound = replace(open_data(str(folder)).test, workers=workers)
    list(sound.take(torch.tensor([0, 1, 2, 3, 5])).batches(2, RGB))  # the control


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("nothing", "no data at 'nothing': give 'fashion-mnist', a folder with train/CLASS/…"),
        ("./nothing", "no data at './nothing'"),
        ("/nothing/here", "no data at '/nothing/here'"),
        ("torch/nothing", "timm cannot open 'torch/nothing' .train. below .: Unknown"),
        ("torch/cifar10", r"timm cannot open 'torch/cifar10' .train.* not found .* as torch/cifar10@FOLDER"),
        ("some/folder", "no data at 'some/folder': give "),
        ("tfds/mnist", "no data at 'tfds/mnist': give "),
        ("wds/nowhere", "nowhere is no folder; webdataset shards are read from a disk"),
    ],
)
def test_references_to_nothing(tmp_path, monkeypatch, ref, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_data(ref)
    assert "\n" not in str(caught.value)


def test_a_scheme_of_timm(tmp_path, monkeypatch):
    png_folder(tmp_path / "data")
    asked = []

    def create(name, root, split, **_):
        asked.append((name, root, split))
        return ImageFolder(str(tmp_path / "data" / ("train" if split == "train" else "val")))

    monkeypatch.setattr("timm.data.create_dataset", create)
    data = open_data("torch/insects")
    assert asked == [("torch/insects", ".", "train"), ("torch/insects", ".", "validation")]
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


# Subsets.


def test_a_subset_is_balanced_and_repeatable(fashion):
    part = balanced_subset(fashion.train, 100, 0)
    assert torch.equal(torch.bincount(part.labels), torch.full((10,), 10))
    assert torch.equal(part.images, balanced_subset(fashion.train, 100, 0).images)
    assert not torch.equal(part.images, balanced_subset(fashion.train, 100, 1).images)
    assert (
        sorted(torch.bincount(balanced_subset(fashion.train, 105, 0).labels).tolist()) == [10] * 5 + [11] * 5
    )
    assert torch.equal(part.images, balanced_subset(fashion.train, 105, 0).images[:100])


def test_a_subset_holds_no_image_twice_and_its_own_labels():
    n = 60
    split = TensorImages(images=torch.arange(n).view(n, 1, 1, 1), labels=torch.arange(n) % 3)
    part = balanced_subset(split, 17, 4)
    values = part.images.flatten()
    assert len(torch.unique(values)) == 17
    assert torch.equal(values % 3, part.labels)


def test_a_subset_of_an_uneven_split_takes_what_is_there():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    split = TensorImages(images=torch.zeros(73, 1, 1, 1), labels=labels)
    assert torch.bincount(balanced_subset(split, 30, 0).labels).tolist() == [14, 3, 13]
    assert balanced_subset(split, 73, 0) is split
    assert balanced_subset(split, 10**9, 0) is split
    assert len(balanced_subset(split, 0, 0)) == 0


def test_a_folder_split_is_what_its_fields_say(folder):
    train, test = open_folders(folder)
    assert all("/train/" in path for path in train.paths)
    assert all("/val/" in path for path in test.paths)
    assert FolderImages.of(train).indices.tolist() == list(range(6))
