"""What the SENet paper prints about its networks (Hu et al., CVPR 2018), to stand beside our counts.

The paper counts a multiply-add as one operation, like our MACs. It also counts the multiplies of the gates, which
our MACs leave out: that is most of the difference in SE-MobileNet (569.2 and 572 M) and SE-ShuffleNet (138.1 and
142 M). Its parameters include BN's running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """The paper's figures of one network for one image; None where it prints none."""

    macs: float | None = None
    params: float | None = None


PRINTED: dict[str, Printed] = {
    "resnet50": Printed(macs=3.86e9, params=25.6e6),
    "se_resnet50": Printed(macs=3.87e9, params=28.1e6),
    "se_resnet50_r4": Printed(params=35.7e6),
    "se_resnet50_r8": Printed(params=30.7e6),
    "se_resnet50_r32": Printed(params=26.9e6),
    "resnet101": Printed(macs=7.58e9),
    "se_resnet101": Printed(macs=7.60e9),
    "resnet152": Printed(macs=11.30e9),
    "se_resnet152": Printed(macs=11.32e9),
    "resnext50_32x4d": Printed(macs=4.24e9),
    "se_resnext50_32x4d": Printed(macs=4.25e9),
    "resnext101_32x4d": Printed(macs=7.99e9),
    "se_resnext101_32x4d": Printed(macs=8.00e9),
    "vgg16_bn": Printed(macs=15.47e9),
    "se_vgg16_bn": Printed(macs=15.48e9),
    "bn_inception": Printed(macs=2.03e9),
    "se_bn_inception": Printed(macs=2.04e9),
    "inception_resnet_v2": Printed(macs=11.75e9),
    "se_inception_resnet_v2": Printed(macs=11.76e9),
    "mobilenet": Printed(macs=569e6, params=4.2e6),
    "se_mobilenet": Printed(macs=572e6, params=4.7e6),
    "shufflenet_g3": Printed(macs=140e6, params=1.8e6),
    "se_shufflenet_g3": Printed(macs=142e6, params=2.4e6),
}
