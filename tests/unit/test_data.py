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
from se_prune.data.batches import TensorImages, augment, normalise
from se_prune.data.folders import FolderImages, open_folders
from se_prune.data.idx import BUNDLED, CLASSES, find_pair, read_idx, read_pair
from se_prune.data.source import balanced_subset
from se_prune.errors import DataError
from se_prune.records import Preprocessing, TrainSettings
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
    with pytest.raises(DataError, match="has label 10; Fashion-MNIST has ten classes"):
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


# Augmentation.


def marked(n=1, height=9, width=7, row=4, column=1):
    images = torch.zeros(n, 2, height, width, dtype=torch.uint8)
    images[:, 0, row, column] = 200
    images[:, 1, row, column] = 100
    return images


def places(images):
    """Return row and column of each image's mark (N,), and check that there is exactly one."""
    n, _, _, width = images.shape
    assert ((images[:, 0] == 200).sum((1, 2)) == 1).all()
    assert torch.equal(images[:, 1] * 2, images[:, 0])
    flat = images[:, 0].reshape(n, -1).argmax(1)
    return flat // width, flat % width


def test_nothing_is_changed_when_nothing_is_asked():
    images = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    assert torch.equal(augment(images, STILL, generator()), images)


@pytest.mark.parametrize("size", [(1, 1, 5, 5), (4, 3, 8, 6), (2, 1, 28, 28)])
def test_shape_and_type_stay(size):
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    out = augment(images, TrainSettings(flip=0.5, crop_padding=2, erase=1.0), generator())
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)


def test_flips_are_left_to_right_and_as_often_as_asked():
    rows, columns = places(augment(marked(4000), replace(STILL, flip=0.5), generator()))
    assert set(rows.tolist()) == {4}
    assert set(columns.tolist()) == {1, 5}
    assert float((columns == 5).double().mean()) == pytest.approx(0.5, abs=0.05)
    _, columns = places(augment(marked(50), replace(STILL, flip=1.0), generator()))
    assert set(columns.tolist()) == {5}


def test_shifts_are_uniform_in_both_directions():
    rows, columns = places(augment(marked(9000, column=3), replace(STILL, crop_padding=2), generator()))
    for values, centre in ((rows, 4), (columns, 3)):
        assert sorted(set(values.tolist())) == [centre + d for d in (-2, -1, 0, 1, 2)]
        assert torch.bincount(values)[centre - 2 :].tolist() == pytest.approx([1800] * 5, abs=200)
    both = rows * 10 + columns
    assert len(torch.unique(both)) == 25


def test_shifts_bring_in_zeros():
    images = torch.full((500, 1, 6, 6), 255, dtype=torch.uint8)
    out = augment(images, replace(STILL, crop_padding=2), generator())
    kept = (out == 255).sum((1, 2, 3))
    assert set(kept.tolist()) == {16, 20, 24, 25, 30, 36}  # (6 - a)·(6 - b), a and b of 0, 1, 2
    assert set(out.unique().tolist()) == {0, 255}


def test_erasing_takes_one_rectangle_of_a_limited_size():
    images = torch.zeros(400, 1, 20, 20, dtype=torch.uint8)
    out = augment(images, replace(STILL, erase=0.5), generator())
    touched = (out > 0).flatten(1).any(1)
    assert float(touched.double().mean()) == pytest.approx(0.5, abs=0.08)
    inside, noise = 0, 0
    for image in out[touched][:, 0]:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert area <= 0.25 * 400 + 1e-6
        inside, noise = inside + int(area), noise + int((image > 0).sum())
    assert noise / inside == pytest.approx(255 / 256, abs=2e-3)  # so they are whole rectangles
    assert not augment(images, STILL, generator()).any()


# Epochs.


def epoch(split, settings, seed, number):
    batches = list(split.training_batches(settings, RGB, seed=seed, epoch=number))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_an_epoch_is_fixed_by_seed_and_number():
    split, settings = stripes(30), TrainSettings(batch_size=10, erase=0.3)
    images, labels = epoch(split, settings, 3, 5)
    again, same = epoch(split, settings, 3, 5)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    for seed, number in ((3, 6), (4, 5)):
        others, _ = epoch(split, settings, seed, number)
        assert not torch.equal(images, others)
    assert labels.tolist() != split.labels.tolist()
    assert sorted(labels.tolist()) == sorted(split.labels.tolist())


def test_an_epoch_takes_no_random_numbers_from_anybody():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    epoch(stripes(20), TrainSettings(batch_size=5, erase=0.5), 0, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("n", "batch", "sizes"), [(10, 4, [4, 4]), (10, 5, [5, 5]), (3, 8, [3]), (1, 8, [1])]
)
def test_training_batches_are_full(n, batch, sizes):
    settings = replace(STILL, batch_size=batch)
    batches = list(stripes(n).training_batches(settings, RGB, seed=0, epoch=0))
    assert [len(y) for _, y in batches] == sizes


def test_images_keep_their_labels_through_an_epoch():
    images, labels = epoch(stripes(30), replace(STILL, batch_size=10), 0, 0)
    bright = images[:, 0].mean(1)  # (N, 8): the bright columns of class k are 3k and 3k + 1
    assert torch.equal(bright.argmax(1) // 3, labels)


def test_plain_batches_are_in_order_and_whole():
    split = stripes(10)
    batches = list(split.batches(4, RGB))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), normalise(split.images, RGB))


# Preprocessing.


def test_normalise_scales_and_standardises():
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    pre = Preprocessing(input_size=(1, 2, 2), mean=(0.4,), std=(0.2,))
    out = normalise(images, pre)
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([-2, -1, 0, 3], abs=1e-6)
    assert images.flatten().tolist() == [0, 51, 102, 255]


def test_normalise_replicates_and_averages_channels():
    grey = torch.tensor([60, 90], dtype=torch.uint8).view(1, 1, 1, 2)
    pre = Preprocessing(input_size=(3, 1, 2), mean=(0.0, 0.0, 0.1), std=(1.0, 0.5, 1.0))
    out = normalise(grey, pre)[0] * 255
    assert out[0].flatten().tolist() == pytest.approx([60, 90], abs=1e-3)
    assert out[1].flatten().tolist() == pytest.approx([120, 180], abs=1e-3)
    assert out[2].flatten().tolist() == pytest.approx([34.5, 64.5], abs=1e-3)
    colour = torch.tensor([30, 60, 120], dtype=torch.uint8).view(1, 3, 1, 1)
    one = Preprocessing(input_size=(1, 1, 1), mean=(0.0,), std=(1.0,))
    assert float(normalise(colour, one)) * 255 == pytest.approx(70, abs=1e-3)


def test_normalise_resizes():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    images[0, :, :, 2:] = 255
    images[1] = 128
    small = normalise(images, Preprocessing(input_size=(1, 2, 2), mean=(0.0,), std=(1.0,)))
    assert small.shape == (2, 1, 2, 2)
    assert small[1].flatten().tolist() == pytest.approx([128 / 255] * 4, abs=1e-6)
    left, right = small[0, 0].mean(0).tolist()
    assert left < 0.2
    assert right > 0.8
    assert float(small[0].mean()) == pytest.approx(0.5, abs=1e-6)  # antialiased, so the mean stays
    large = normalise(images, Preprocessing(input_size=(1, 8, 6), mean=(0.0,), std=(1.0,)))
    assert large.shape == (2, 1, 8, 6)


def test_a_folder_split_is_what_its_fields_say(folder):
    train, test = open_folders(folder)
    assert all("/train/" in path for path in train.paths)
    assert all("/val/" in path for path in test.paths)
    assert FolderImages.of(train).indices.tolist() == list(range(6))
