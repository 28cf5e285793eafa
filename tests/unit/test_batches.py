"""Batches of images in memory: augmentation, epochs, normalisation."""

from dataclasses import replace

import pytest
import torch

from se_prune.data.batches import augment, normalise
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from tests.tiny import stripes
from tests.unit.test_data import RGB, STILL, generator


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
