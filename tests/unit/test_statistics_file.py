"""The file of gate statistics: it gives back what was saved, and what is no such file is refused."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from se_prune.errors import CheckpointError
from se_prune.gates.statistics import HEADER_KEY, SiteSums, Statistics
from se_prune.gates.summary import summarise
from tests.measured import N, column, made, measured
from tests.nets import RESIDUAL


@pytest.mark.parametrize("with_energies", [True, False])
def test_a_file_gives_back_exactly_what_was_saved(tmp_path, with_energies):
    saved = measured(RESIDUAL)[3]
    if not with_energies:
        saved.energies = None
    saved.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert (loaded.classes, loaded.sites, loaded.n) == (saved.classes, saved.sites, saved.n)
    assert torch.equal(loaded.counts, saved.counts)
    assert loaded.sums.keys() == saved.sums.keys()
    for name, sums in saved.sums.items():
        for field in fields(SiteSums):
            a, b = getattr(sums, field.name), getattr(loaded.sums[name], field.name)
            assert a.dtype == b.dtype == torch.float64
            assert torch.equal(a, b)
    assert (loaded.energies is None) == (not with_energies)
    if with_energies:
        assert torch.equal(loaded.energies.counts, saved.energies.counts)
        assert loaded.energies.sums.keys() == saved.energies.sums.keys()
        for name, table in saved.energies.sums.items():
            assert torch.equal(loaded.energies.sums[name], table)
    assert summarise(loaded) == summarise(saved)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "stats.safetensors"
    measured(RESIDUAL)[3].save(file)
    assert Statistics.load(file).n == N
    return file


def rewritten(path, change):
    """Write the file again with its header or tensors changed."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    tensors = load_file(path)
    metadata = {HEADER_KEY: change(header, tensors)}
    save_file(tensors, path, metadata=metadata)


def newer(header, _):
    return json.dumps({**header, "schema_version": 2})


def unknown_key(header, _):
    header["sites"][0]["colour"] = "red"
    return json.dumps(header)


def no_sites(header, _):
    del header["sites"]
    return json.dumps(header)


def no_json(*_):
    return "{"


def a_list(*_):
    return "[]"


def tensor_missing(header, tensors):
    del tensors["blocks.0.se/u2"]
    return json.dumps(header)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (newer, "schema version is 2, not 1"),
        (unknown_key, "sites|colour|unexpected"),
        (no_sites, "sites"),
        (no_json, "Expecting property name"),
        (a_list, "list"),
        (tensor_missing, r"blocks\.0\.se/u2"),
    ],
    ids=lambda v: getattr(v, "__name__", "said"),
)
def test_damaged_files_are_refused_with_the_reason(path, change, said):
    rewritten(path, lambda header, _: json.dumps(header))
    Statistics.load(path)
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        Statistics.load(path)
    assert str(path) in str(caught.value)
    assert "is not a statistics file of `se-prune analyze`" in str(caught.value)
    assert str(caught.value).endswith("make it again.")


def test_missing_truncated_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist; make it with `se-prune analyze`"):
        Statistics.load(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(path)
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=f"{HEADER_KEY}.*make it again"):
        Statistics.load(path)


def test_shifts_survive_the_file_and_belong_to_one_pass(tmp_path):
    first, second = (made([column(0.1, 0.9, 0.2, 0.8)], [0, 0, 1, 1]) for _ in range(2))
    first.shifts = second.shifts = {"site0": 0.25}
    first.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").shifts == {"site0": 0.25}
    assert first.merged(second).shifts is None  # the constants were those of one half
    second.shifts = None
    second.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").shifts is None
    second.shifts = {"other": 0.25}
    second.save(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="not a statistics file"):
        Statistics.load(tmp_path / "s.safetensors")
