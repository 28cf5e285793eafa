"""Passes that begin in the middle of a network: they give a layer what a whole pass gives it, bit for bit."""

import pytest
import torch
from torch import nn

from se_prune.errors import DataError
from se_prune.surgery import spill as spill_module
from se_prune.surgery.replay import Passing, record
from se_prune.surgery.spill import Spill
from tests.built import built

CPU = torch.device("cpu")


def inputs_of(model, x):
    """Return what every convolution and linear layer reads, in the order in which they run."""
    read = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, args[0].clone()))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return read


@torch.no_grad()
def passed(model, x, layers, *, before_each=lambda _: None):
    """Take a batch through a network layer by layer; return what the layers read, and the passing."""
    modules = dict(model.named_modules())
    tape = record(model, x, {name: modules[name] for name in layers})
    passing = Passing(images=Spill().put(x), tape=tape)
    read = {}
    for name in sorted(layers, key=lambda layer: tape.starts[layer]):
        before_each(name)
        read[name] = passing.input_of(model, name, modules[name], Spill(), CPU).clone()
    return read, passing


class InPlace(nn.Module):
    """Writes into maps that are read later, takes parts of them, makes a constant, and changes its layout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 3)
        self.d, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).relu_()
        kept = x
        x = self.b(x).add_(kept).relu_()
        first, second = x.chunk(2, 1)
        first.mul_(2)
        x = self.c(second + torch.ones(1, 4, 1, 1)).relu_()
        kept[:, :, 0] = 0
        x = self.d(x.to(memory_format=torch.channels_last)) + kept[:, :, 1:-1, 1:-1]
        return self.fc(x.mean((2, 3)))


def example(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_maps_that_are_written_into_come_back_as_they_were():
    torch.manual_seed(0)
    model, x = InPlace().eval(), example(5, 2, 8, 8)
    wanted = inputs_of(model, x)
    read, passing = passed(model, x, list(wanted))
    assert list(read) == list(wanted)
    assert [name for name in wanted if not torch.equal(read[name], wanted[name])] == []
    assert passing.tape.whole
    assert passing.start > 0


@pytest.mark.parametrize("name", ["residual", "depthwise", "functional", "zoo:se_resnet20"])
def test_layers_read_what_they_would_in_a_whole_pass(name):
    network = built(name)
    model = network.model.eval()
    x = example(3, *network.preprocessing.input_size)
    wanted = inputs_of(model, x)
    read, passing = passed(model, x, list(wanted))
    assert [name for name in wanted if not torch.equal(read[name], wanted[name])] == []
    assert passing.tape.whole
    assert passing.start > 0


@torch.no_grad()
def test_a_pass_sees_the_layers_that_changed_since_the_last():
    torch.manual_seed(0)
    model, x = InPlace().eval(), example(5, 2, 8, 8)
    layers = dict(model.named_children())
    before = inputs_of(model, x)
    done = []

    def change(name):
        if done:  # the layer of the last pass, as a fit would
            layers[done[-1]].weight.mul_(1.5)
        done.append(name)

    read, _ = passed(model, x, list(before), before_each=change)
    wanted = inputs_of(model, x)
    assert not torch.equal(before["fc"], wanted["fc"])
    assert [name for name in wanted if not torch.equal(read[name], wanted[name])] == []


@torch.no_grad()
def test_what_came_before_is_not_computed_again():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))).eval()
    x, runs = example(2, 4, 8, 8), []
    # the weights of what has been passed are ruined: a pass that computed it again would read NaN
    read, _ = passed(
        model,
        x,
        [str(i) for i in range(8)],
        before_each=lambda name: (
            runs.append(name) or (int(name) > 3 and model[int(name) - 4].weight.fill_(torch.nan))
        ),
    )
    assert runs == [str(i) for i in range(8)]
    assert all(value.isfinite().all() for value in read.values())
    assert model[0].weight.isnan().all()


class Branching(InPlace):
    """Runs its code by what it sees: such a pass is taken from its start each time."""

    def forward(self, x):
        return super().forward(x * 2 if float(x.mean()) > 0 else x)


def test_a_network_that_branches_by_values_runs_from_its_start():
    torch.manual_seed(0)
    model, x = Branching().eval(), example(5, 2, 8, 8)
    wanted = inputs_of(model, x)
    read, passing = passed(model, x, list(wanted))
    assert not passing.tape.whole
    assert passing.start == 0
    assert [name for name in wanted if not torch.equal(read[name], wanted[name])] == []


class Cached(InPlace):
    """Computes something at its first pass alone."""

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.scale = torch.ones(1) * 2
        return super().forward(x * self.scale)


def test_a_pass_of_other_operations_than_the_recorded_one_runs_from_its_start():
    torch.manual_seed(0)
    model, x = Cached().eval(), example(5, 2, 8, 8)
    layers = [name for name, module in model.named_children()]
    read, passing = passed(model, x, layers)
    wanted = inputs_of(model, x)
    assert passing.tape is None
    assert [name for name in wanted if not torch.equal(read[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_put_down_is_taken_up(dtype):
    spill = Spill()
    tensors = [(example(3, 4, 2) * 50).abs().to(dtype), (example(5) * 50).abs().to(dtype)]
    places = [spill.put(tensor) for tensor in tensors]
    strided = torch.zeros(2, 4, 3, dtype=dtype).permute(2, 1, 0)
    assert all(torch.equal(p.load(CPU), t) for p, t in zip(places, tensors, strict=True))
    assert torch.equal(places[0].into(strided), tensors[0])
    assert spill.size == sum(tensor.nbytes for tensor in tensors)


def test_a_full_disk_says_what_to_do():
    class Full:
        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    with pytest.raises(
        DataError, match=r"temporary file in .* \(No space left on device\); make room .* TMPDIR"
    ):
        Spill(file=Full()).put(torch.zeros(3))
    assert spill_module.room() > 0


@torch.no_grad()
def test_the_bytes_that_are_live_are_those_of_the_storages():
    torch.manual_seed(0)
    tape = record(InPlace().eval(), example(5, 2, 8, 8), {})
    assert len(tape.operations) > 15
    by_hand = [sum(tape.sizes[s] for s in tape.live(point)) for point in range(len(tape.operations) + 1)]
    assert tape.weights[: len(by_hand)] == by_hand
    assert len(set(by_hand)) > 4
    assert by_hand[0] == 5 * 2 * 8 * 8 * 4  # the images
    assert by_hand[-1] == 0
