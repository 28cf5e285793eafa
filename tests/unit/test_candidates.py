"""How the candidates for a checkpoint are built."""

import threading

import torch
from torch import nn

from se_prune import recognise
from se_prune.records import ArchSpec
from se_prune.zoo import registry
from tests.unit.test_recognise import build


def test_candidates_hold_no_values_and_leave_nothing_behind():
    state = build("torchvision:regnet_y_400mf").state_dict()
    before = torch.random.get_rng_state()
    weights = recognise.Weights(tensors=state)
    assert recognise.recognise(weights, "a.pth") == "torchvision:regnet_y_400mf"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_only_the_thread_that_recognises_builds_without_values():
    built = {}
    seen = []
    with recognise._shapes_only(lambda name, shape: seen.append((name, tuple(shape)))):
        thread = threading.Thread(target=lambda: built.update(theirs=nn.Linear(2, 3)))
        thread.start()
        thread.join()
        built["ours"] = nn.BatchNorm2d(4)
    assert not any(tensor.is_meta for tensor in built["theirs"].state_dict().values())
    assert all(tensor.is_meta for tensor in built["ours"].state_dict().values())
    assert seen == [("weight", (4,)), ("bias", (4,))]


def test_a_candidate_is_given_up_at_its_first_layers(monkeypatch):
    state = build("timm:seresnet18").state_dict()
    leaves = recognise.Counter((key.rpartition(".")[2], tensor.shape) for key, tensor in state.items())
    layers = []
    build_spec = registry.build

    def counted(spec):
        handle = recognise.hooks.register_module_parameter_registration_hook(lambda *_: layers.append(1))
        try:
            return build_spec(spec)
        finally:
            handle.remove()

    monkeypatch.setattr(registry, "build", counted)
    assert recognise._outline(ArchSpec(ref="timm:regnety_002"), leaves) is None
    assert len(layers) < 20
    assert recognise._outline(ArchSpec(ref="timm:seresnet18"), leaves) is not None
    assert len(layers) > 80
