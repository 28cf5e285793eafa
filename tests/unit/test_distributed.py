"""Two processes on one machine do what one does, and write it once."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from se_prune import distributed, files
from se_prune.device import choose_device
from se_prune.errors import PeerError, UsageError
from se_prune.files import require_shared
from se_prune.training.norms import SharedStatistics, shares_statistics
from tests import ranks
from tests.tiny import png_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    images = png_folder(folder / "pngs", per_class=5) / "train"
    for name in ("ant/0.png", "bee/2.png"):  # in batches of two: of the first process and of the second
        (images / name).write_bytes(b"damaged")
    images.rename(folder / "images")
    weights = ranks.trained(replace(ranks.PLAIN, epochs=10), teacher=False)
    del weights["numbers"]
    save_file(weights, folder / "trained.safetensors")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Return what each of two processes found, and noted."""
    started = ranks.start_two(["-m", "tests.ranks", str(folder)], folder)
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def one(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = ranks.prefixed("measured", ranks.measured(folder / "images"))
    found |= ranks.prefixed("compressed", ranks.compressed(folder / "trained.safetensors"))
    for name, settings in ranks.SETTINGS.items():
        found |= ranks.prefixed(name, ranks.trained(settings))
    torch.set_num_threads(before)
    return found


def largest_difference(ours, theirs):
    """Return the largest difference of two tensors relative to the largest value."""
    assert ours.shape == theirs.shape
    gap = (ours.double() - theirs.double()).abs()
    gap[ours == theirs] = 0  # infinities
    return float(gap.max() / theirs.double().abs().max().clamp_min(1e-300)) if gap.numel() else 0.0


def part(values, title):
    found = {name: value for name, value in values.items() if name.startswith(f"{title}: ")}
    assert found
    return found


def test_both_processes_end_with_the_same_bits(two):
    (first, _), (second, _) = two
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_passes_over_images_equal_those_of_one_process(one, two):
    found, expected = part(two[0][0], "measured"), part(one, "measured")
    assert found.keys() == expected.keys()
    exact = {name for name in expected if " bn " not in name and " tuned" not in name}
    assert len(exact) > 40
    assert sum("gram" in name for name in exact) == 18
    off = {name: largest_difference(found[name], expected[name]) for name in expected}
    within = {name: 1e-12 if name in exact else 1e-2 if " tuned" in name else 1e-6 for name in off}
    assert {name: gap for name, gap in off.items() if gap > within[name]} == {}


def test_every_image_is_counted_once(one, two):
    found = two[0][0]
    assert int(found["measured: counts"].sum()) == 101
    assert int(found["measured: evaluation"][0]) == 101
    assert len(found["measured: predictions"]) == 101
    assert int(found["measured: predictions"].min()) >= 0
    # two damaged files, which one process each has met
    assert found["measured: files predictions"].tolist().count(-1) == 2
    assert int(found["measured: files evaluation"][0]) == 8
    assert found["measured: files readable"].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]


def test_plans_and_repairs_equal_those_of_one_process(one, two):
    found, expected = part(two[0][0], "compressed"), part(one, "compressed")
    assert found.keys() == expected.keys()
    off = {name: largest_difference(found[name], expected[name]) for name in expected}
    # float32 products of other numbers of images differ by rounding, which least squares may magnify
    exact = {name for name in off if name.endswith("plan")}
    assert len(exact) == 4
    assert {name: gap for name, gap in off.items() if gap > (0 if name in exact else 0.02)} == {}


@pytest.mark.parametrize("name", ranks.SETTINGS)
def test_training_equals_that_of_one_process(name, one, two):
    found, expected = part(two[0][0], name), part(one, name)
    assert found.keys() == expected.keys()
    off = {key: largest_difference(found[key], expected[key]) for key in expected}
    assert {key: gap for key, gap in off.items() if gap > 1e-3} == {}
    assert off[f"{name}: numbers"] < 1e-4
    untrained = ranks.net().state_dict()
    moved = [key for key in untrained if not torch.equal(untrained[key], found[f"{name}: {key}"])]
    assert {"stem.weight", "fc.weight", "bn.running_mean"} <= set(moved)


def test_norms_of_each_share_give_other_weights_that_are_still_the_same_everywhere(one, two):
    own, whole = part(two[0][0], "own norms"), part(one, "plain")
    weights = [key.partition(": ")[2] for key in whole if key.endswith("weight")]
    assert max(largest_difference(own[f"own norms: {w}"], whole[f"plain: {w}"]) for w in weights) > 1e-3


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(two):
    (_, first), (_, second) = two
    assert first["said"] == second["said"]
    assert first["said"].startswith("stopped after step 2 of 6")
    assert first["first step"] == second["first step"] == 3


def test_a_stopped_run_goes_on_to_the_same_bits(two):
    found = two[0][0]
    whole, resumed = part(found, "whole"), part(found, "resumed")
    assert len(whole) == len(resumed)
    for (name, value), other in zip(whole.items(), resumed.values(), strict=True):
        assert torch.equal(value, other), name


def test_batches_that_cannot_be_shared_are_refused(two):
    for _, notes in two:
        assert notes["odd"].startswith(
            "2 processes cannot share a batch of 25 images equally; choose a batch_size"
        )
        assert "equally and in pairs; choose a batch_size that 4 divides" in notes["pairs"]


def test_records_and_files_come_from_the_main_process(two, folder):
    assert [notes["budget"] for _, notes in two] == ["the main process refused."] * 2
    assert [notes["record"]["std"] for _, notes in two] == [[0.25], [0.25]]
    assert (folder / "once.txt").read_text() == "written by process 0"
    assert [p.name for p in folder.glob(".*")] == []


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_of_a_batch_are_equal_and_keep_the_pairs_of_mixup(size, monkeypatch):
    images = 24
    taken = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_place", distributed._Place(rank=rank, size=size))
        mine = distributed.share_of_batch(images)
        assert len(mine) == images // size
        assert torch.equal(images - 1 - mine, mine.flip(0))
        taken += mine.tolist()
    assert sorted(taken) == list(range(images))


def test_shares_of_a_split_are_whole_batches(monkeypatch):
    taken = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "_place", distributed._Place(rank=rank, size=3))
        mine = distributed.share(11, 4)
        assert mine.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]][rank]
        taken += mine.tolist()
    assert sorted(taken) == list(range(11))


def test_statistics_are_shared_where_shares_are_small(monkeypatch):
    auto = replace(ranks.PLAIN, sync_bn="auto", batch_size=128)
    assert not shares_statistics(auto, 1000)
    monkeypatch.setattr(distributed, "_place", distributed._Place(size=4))
    assert not shares_statistics(auto, 1000)
    assert shares_statistics(replace(auto, batch_size=124), 1000)
    assert shares_statistics(auto, 124)
    assert not shares_statistics(replace(auto, batch_size=64, compile=True), 1000)
    assert not shares_statistics(replace(auto, batch_size=64, sync_bn="off"), 1000)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, affine=False)])
def test_shared_statistics_of_one_share_are_those_of_torch(norm):
    ours = type(norm)(3, affine=norm.affine)
    images = torch.randn(6, 3, 4, 4) * 3 + 2
    results = []
    for module, mode in ((norm, torch.enable_grad()), (ours, SharedStatistics())):
        x = images.clone().requires_grad_()
        with mode:
            y = module(x)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        values = [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]
        results.append(values)
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_half_set_variables_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"'RANK' is wrong or missing; start them with torchrun"):
        distributed.start()
    assert distributed.size() == 1


def test_machines_that_share_no_folder_are_refused(monkeypatch, tmp_path):
    require_shared(tmp_path)
    monkeypatch.setattr(distributed, "_place", distributed._Place(machines=2))
    require_shared(tmp_path)
    monkeypatch.setattr(files, "SEEN_AFTER", 0.0)  # as if the file of the main process were never seen
    with pytest.raises(UsageError, match="the machines do not share"):
        require_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_process_is_told_from_our_own_defects():
    with pytest.raises(PeerError, match="another process of this run has ended"), distributed._exchange():
        raise RuntimeError("Read error [127.0.0.1]:7087: Connection reset by peer")
    with pytest.raises(RuntimeError, match="sizes differ"), distributed._exchange():
        raise RuntimeError("sizes differ")


def test_devices_that_processes_cannot_share_are_refused(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(distributed, "_place", distributed._Place(size=2))
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:0", "mps"):
        with pytest.raises(UsageError, match=f"--device {name} cannot be shared by several processes"):
            choose_device(name)
