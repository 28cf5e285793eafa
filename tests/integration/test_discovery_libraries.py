"""Every SE module that runs in small networks of timm is a site, and a tap reaches it; nothing else is one."""

import pytest
import timm
import torch

from se_prune.gates.sites import discover
from se_prune.gates.tap import tap

SE_CLASSES = {"EcaModule", "EffectiveSEModule", "EseModule", "SEModule", "SqueezeExcite"}
#: Calls of SE modules in the code, counted by hand from the network's definition.
WITH_SE = {
    "test_efficientnet": 2,
    "test_nfnet": 4,
    "test_byobnet": 4,
    "test_coatnet": 2,
    "test_maxvit": 4,
    "mobilenetv3_small_050": 9,
    "lcnet_035": 2,
    "lcnetv2_small": 4,
    "ese_vovnet19b_slim_dw": 4,
    "mnasnet_small": 10,
    "tinynet_e": 10,
    "semnasnet_050": 8,
    "repghostnet_050": 7,
    "ghostnet_050": 7,
    "ghostnetv2_100": 7,
    "efficientvit_m0": 2,
    "cspnext_tiny": 4,
    "regnety_002": 13,
    "regnetz_005": 21,
    "fastvit_t8": 1,
    "mixnet_s": 13,
    "rexnet_100": 13,
    "hardcorenas_a": 8,
    "repvit_m0_9": 10,
    "shvit_s1": 2,
    "efficientvim_m1": 2,
    "nf_regnet_b0": 16,
}
#: Networks without SE, and words of the reason for which multiplies in them are left alone.
WITHOUT_SE = {
    "mobilenetv2_035": None,
    "resnet10t": None,
    "convnext_atto": None,
    "efficientvit_b0": None,
    "mobilevitv2_050": "attention",
    "skresnet18": "softmax over branches",
}


def built(name):
    """Return a network with random weights and an image, a small one where the network takes any size."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    side = net.default_cfg["input_size"][-1] if net.default_cfg.get("fixed_input_size") else 64
    return net, torch.randn(1, 3, side, side)


@pytest.mark.parametrize(("name", "count"), WITH_SE.items(), ids=WITH_SE)
def test_every_se_module_is_a_site_that_a_tap_reads(name, count):
    net, image = built(name)
    ran, seen = [], []
    for module_name, module in net.named_modules():
        if type(module).__name__ in SE_CLASSES:
            module.register_forward_hook(lambda *_, n=module_name: ran.append(n))
    found = discover(net, image)
    assert len(ran) == count
    assert len(found.sites) == count
    assert all(site.expand.startswith(f"{n}.") for site, n in zip(found.sites, ran, strict=True))
    with torch.no_grad():
        plain = net(image)
        with tap(net, found.sites, lambda site, _, s: (seen.append((site.name, s)), s.clone())[1]):
            assert torch.equal(net(image), plain)
    assert [name for name, _ in seen] == [site.name for site in found.sites]
    assert all(0 <= s.min() <= s.max() <= 1 for _, s in seen)


@pytest.mark.parametrize(("name", "reason"), WITHOUT_SE.items(), ids=WITHOUT_SE)
def test_none_is_invented(name, reason):
    found = discover(*built(name))
    assert found.sites == ()
    assert bool(found.left_alone) == (reason is not None)
    assert all(reason in a.reason for a in found.left_alone)
