"""Rows of layers and their Gram matrices: against the layers themselves."""

import pytest
import torch
from torch import nn

from se_prune.gates import moments
from se_prune.gates.moments import collect_grams, grouped_weights, has_rows, input_rows, sample_positions

LAYERS = {
    "1×1": nn.Conv2d(3, 5, 1),
    "3×3, stride 2": nn.Conv2d(3, 5, 3, padding=1, stride=2),
    "3×1, dilated": nn.Conv2d(3, 5, (3, 1), dilation=2, padding=(2, 0), stride=(1, 2)),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "linear": nn.Linear(7, 5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_rows_times_weights_are_the_outputs(layer, chunk, monkeypatch):
    monkeypatch.setattr(moments, "PATCH_ELEMENTS", chunk)
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else 3
    x = torch.randn(4, channels, 9, 7, generator=torch.Generator().manual_seed(1))
    weights = grouped_weights(layer)
    weights = torch.cat([weights, layer.bias.view(len(weights), 1, -1)], 1)
    parts = [(rows @ weights).permute(1, 0, 2).flatten(1) for _, rows in input_rows(layer, x)]
    got, out = torch.cat(parts), layer(x)
    wanted = out if isinstance(layer, nn.Linear) else out.permute(0, 2, 3, 1)
    wanted = wanted.reshape(-1, wanted.shape[-1])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_images_of_the_chunks_are_all_of_them_in_order(monkeypatch):
    monkeypatch.setattr(moments, "PATCH_ELEMENTS", 2 * 27 * 36)
    parts = [part for part, _ in input_rows(nn.Conv2d(3, 2, 3, padding=1), torch.randn(5, 3, 6, 6))]
    assert [i for part in parts for i in range(5)[part]] == list(range(5))
    assert len(parts) == 3


def test_positions_are_few_spread_and_always_the_same():
    chosen = sample_positions(1000, torch.device("cpu"))
    assert len(chosen) == moments.POSITIONS == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    assert torch.equal(chosen, sample_positions(1000, torch.device("cpu")))
    assert 400 < chosen.double().mean() < 600
    assert sample_positions(20, torch.device("cpu")).tolist() == list(range(20))


def test_a_gram_matrix_is_the_sum_over_batches():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), collect_grams(model, ["0", "3"]) as grams:
        model(x[:4])
        model(x[4:])
    model(x)  # no longer watched
    read = torch.cat([model[:3](x), torch.ones(6, 1)], 1).double()
    torch.testing.assert_close(grams["3"][0], read.T @ read, rtol=1e-5, atol=1e-5)
    assert grams["3"].dtype == torch.float64
    assert grams["0"].shape == (1, 19, 19)
    assert grams["0"][0, -1, -1] == 6 * 4
    assert set(grams) == {"0", "3"}


class Standardised(nn.Conv2d):
    """Changes its weights as it runs."""


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Conv2d(4, 4, 3), True),
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 3, groups=2), True),
        (nn.Conv2d(4, 4, 3, groups=4), False),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, padding="same"), False),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), False),
        (Standardised(4, 4, 3), False),
        (nn.Conv1d(4, 4, 3), False),
        (nn.Linear(moments.MAX_INPUTS + 1, 1), False),
        (nn.ReLU(), False),
    ],
)
def test_layers_whose_inputs_are_plain_rows(layer, known):
    assert has_rows(layer) is known
