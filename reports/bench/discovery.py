"""Gate sites found in the networks of our zoo, timm, torchvision and pytorchcv against the SE modules in their code.

Weights are random and inputs small: which sites there are depends on neither. A finished network is a line of
`reports/discovery.jsonl` and is not run again. pytorchcv is taken where it is installed.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import importlib.util
import itertools
import json
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from reports.bench.common import FOLDER, append_row, markdown_table, read_rows, write_report
from se_prune.gates.sites import discover
from se_prune.gates.trace import trace
from se_prune.zoo import registry

ROWS = FOLDER / "discovery.jsonl"
LIBRARIES = ("zoo", "timm", "torchvision", "pytorchcv")
#: Larger networks are left out, by millions of parameters.
LARGEST = 150
#: Sides that are tried before the network's own input size.
SIDES = (64, 128)
#: Networks whose discovery is timed, and their input sides.
DEEP = {"senet154": 224, "efficientnet_b7": 600}
#: Classes whose every call is one multiply by a per-channel gate of the input's own pooled values.
SE_CLASSES = frozenset(
    {
        "timm.layers.squeeze_excite.SEModule",
        "timm.layers.squeeze_excite.SqueezeExciteCl",
        "timm.layers.squeeze_excite.EffectiveSEModule",
        "timm.layers.eca.EcaModule",
        "timm.layers.eca.CecaModule",
        "timm.layers.cbam.ChannelAttn",
        "timm.layers.cbam.LightChannelAttn",
        "timm.models._efficientnet_blocks.SqueezeExcite",
        "timm.models.senet.SEModule",
        "timm.models.hgnet.EseModule",
        "torchvision.ops.misc.SqueezeExcitation",
        "torchvision.models.quantization.mobilenetv3.QuantizableSqueezeExcitation",
        "pytorchcv.models.common.att.SEBlock",
        "se_prune.zoo.blocks.SEBlock",
        "se_prune.zoo.blocks.SEModule",
        "se_prune.zoo.linear_gate.LinearSE",
        "pytorchcv.models.cbamresnet.ChannelGate",
    }
)
#: Classes of which some instances are: a test tells which.
SOME = {
    "timm.layers.gather_excite.GatherExcite": lambda m: m.extent == 0 and m.gather is None,
    "timm.layers.global_context.GlobalContext": lambda m: m.conv_attn is None and m.mlp_scale is not None,
    "timm.layers.split_attn.SplitAttn": lambda m: m.radix == 1,
}
#: Names of pytorchcv's networks that have SE modules (and a few that have not).
PYTORCHCV = re.compile(r"^se|^efficientnet|^mobilenetv3|^regnety|^ghostnet|^mixnet|^mnasnet|^tresnet|^fbnet")
#: The same networks for other classes, other paddings of EfficientNet, the deepest for CIFAR-10.
LEFT_OUT = re.compile(r"cifar100|svhn|_cub|net_b\d[bc]$|(164bn|272bn|542bn|1001|1202)_cifar10")
TORCHVISION = (
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l",
    "mobilenet_v3_small", "mobilenet_v3_large", "quantized_mobilenet_v3_large", "regnet_y_400mf", "regnet_y_800mf",
    "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "maxvit_t",
    "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large",
)  # fmt: skip
WITHOUT = {
    "timm": (
        "resnet18", "resnet50d", "resnext50_32x4d", "resnet10t", "res2net50_26w_4s", "densenet121", "vgg11_bn",
        "inception_v3", "inception_v4", "inception_resnet_v2", "xception41", "dpn68", "dla34", "hrnet_w18_small",
        "mobilenetv2_050", "mobilenetv4_conv_small", "mnasnet_100", "fbnetc_100", "spnasnet_100", "mixer_s32_224",
        "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto",
        "convnextv2_atto", "regnetx_002", "repvgg_a0", "mobileone_s0", "edgenext_xx_small", "poolformer_s12",
        "levit_128s", "mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1", "fastvit_t8", "cspresnet50",
        "cspdarknet53", "selecsls42", "vovnet39a", "gmlp_s16_224", "resmlp_12_224", "coat_lite_tiny", "pvt_v2_b0",
        "cait_xxs24_224", "crossvit_tiny_240", "visformer_tiny", "tnt_s_legacy_patch16_224", "twins_svt_small",
        "nest_tiny", "focalnet_tiny_srf", "maxvit_tiny_pm_256", "efficientvit_b0", "ghostnetv3_100", "starnet_s1",
        "mambaout_femto", "hgnetv2_b0", "lambda_resnet26t", "botnet26t_256", "skresnet18", "resnest14d",
        "gcresnet33ts", "inception_next_atto", "xcit_nano_12_p16_224", "pit_ti_224", "hiera_tiny_224",
        "davit_tiny", "nextvit_small", "tiny_vit_5m_224", "repghostnet_050",
    ),
    "torchvision": (
        "alexnet", "vgg11", "resnet18", "squeezenet1_1", "densenet121", "googlenet", "inception_v3",
        "shufflenet_v2_x0_5", "mobilenet_v2", "mnasnet0_5", "regnet_x_400mf", "convnext_tiny", "swin_t", "vit_b_32",
        "wide_resnet50_2", "fcn_resnet50",
    ),
    "pytorchcv": (
        "resnet10", "preresnet10", "bam_resnet18", "cbam_resnet18", "mobilenet_w1", "shufflenetv2_wd2",
        "sknet50", "resnesta18", "scnet50", "fishnet99", "airnet50_1x64d_r2", "diaresnet20_cifar10", "menet108_8x1_g3",
        "densenet121", "darknet53", "dicenet_wd5", "xdensenet121_2", "condensenet74_c4_g4", "hardnet39ds",
        "nin_cifar10",
    ),
}  # fmt: skip


def qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def is_se(module: nn.Module) -> bool:
    name = qualified(module)
    return name in SE_CLASSES or (name in SOME and SOME[name](module))


def build(library: str, name: str) -> nn.Module:
    """Build a network with random weights."""
    if library == "zoo":
        return registry.build(registry.resolve(f"zoo:{name}"))
    if library == "timm":
        import timm

        return timm.create_model(name)
    if library == "torchvision":
        from torchvision import models

        extra = {"weights_backbone": None} if "_mobilenet_v3" in name or name.startswith("fcn") else {}
        if name.startswith("quantized_"):
            return models.get_model(name, weights=None, quantize=False)
        return models.get_model(name, weights=None, **extra)
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False)


def own_size(library: str, name: str, network: nn.Module) -> tuple[int, int, int]:
    """Return the input size (C, H, W) that a network is made for."""
    if library == "zoo":
        return registry.default_preprocessing(registry.resolve(f"zoo:{name}")).input_size
    if library == "timm":
        return tuple(network.default_cfg["input_size"])
    if library == "pytorchcv":
        return (3, *network.in_size)
    return (3, 224, 224)


def names(library: str, done: set[str]) -> Iterable[str]:
    """Return the networks of a library to look at but those `done`: of timm, all that may have SE modules."""
    if library == "zoo":
        return registry.names("zoo")
    if library == "torchvision":
        return [*TORCHVISION, *WITHOUT[library]]
    if library == "timm":
        import timm

        rest = (n for n in timm.list_models() if n not in done and n not in WITHOUT[library])
        return itertools.chain(WITHOUT[library], (n for n in rest if has_se(library, n)))
    if importlib.util.find_spec("pytorchcv") is None:
        return []
    from pytorchcv.model_provider import _models

    return [*(n for n in _models if PYTORCHCV.search(n) and not LEFT_OUT.search(n)), *WITHOUT[library]]


def has_se(library: str, name: str) -> bool:
    """Say whether any module of a network, built without memory, is of a listed class."""
    with torch.device("meta"):
        try:
            return any(is_se(m) or qualified(m) in SOME for m in build(library, name).modules())
        except (RuntimeError, NotImplementedError):
            return True  # it can only be built for real


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[list[str]]:
    """While open, note the name of each SE module that runs, once per call."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in network.named_modules()
        if is_se(module)
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def sizes(library: str, name: str, network: nn.Module) -> list[tuple[int, int, int]]:
    channels, height, width = own_size(library, name, network)
    return [(channels, side, side) for side in SIDES if side < min(height, width)] + [
        (channels, height, width)
    ]


def study(library: str, name: str) -> dict[str, Any]:
    """Count SE modules and sites of one network."""
    row: dict[str, Any] = {"library": library, "name": name}
    with torch.device("meta"), contextlib.suppress(RuntimeError, NotImplementedError):
        row["params"] = sum(p.numel() for p in build(library, name).parameters())
        if row["params"] > LARGEST * 1e6:
            return row | {"skipped": f"more than {LARGEST} M parameters"}
    torch.manual_seed(0)
    network = build(library, name).eval()
    row["params"] = sum(p.numel() for p in network.parameters())
    for size in sizes(library, name, network):
        try:
            found = measured(network, torch.randn(1, *size))
            row.pop("error", None)
            return row | found | {"size": size}
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return row


def measured(network: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    with counted(network) as ran:
        found = discover(network, example)
    modules = dict(network.named_modules())
    left = collections.Counter(ran)
    extra = []
    for site in found.sites:
        inside = [n for n in left if left[n] > 0 and (site.expand or "").startswith(f"{n}.")]
        if inside:
            left[inside[0]] -= 1
        else:
            extra.append(site.name)
    return {
        "modules": dict(collections.Counter(type(modules[n]).__name__ for n in ran)),
        "sites": len(found.sites),
        "kinds": dict(
            collections.Counter(f"{s.kind}, {s.squeeze}, {s.gate_activation}" for s in found.sites)
        ),
        "missing": sorted(left.elements()),
        "extra": extra,
        "left_alone": dict(collections.Counter(a.reason for a in found.left_alone)),
    }


def speed() -> list[list[str]]:
    """Time a forward pass and discovery of two deep networks."""
    table = []
    for name, size in DEEP.items():
        network, example = build("timm", name).eval(), torch.randn(1, 3, size, size)
        seconds: dict[str, list[float]] = {"forward": [], "discovery": []}
        with torch.no_grad():
            network(example)
            for _ in range(3):
                started = time.process_time()
                network(example)
                seconds["forward"].append(time.process_time() - started)
                started = time.process_time()
                sites = discover(network, example).sites
                seconds["discovery"].append(time.process_time() - started)
            operations = len(trace(network, example).nodes)
        times = [f"{min(values):.2f} s" for values in seconds.values()]
        table.append([f"timm:{name}", f"3×{size}×{size}", str(len(sites)), str(operations), *times])
    return table


def verdict(row: dict[str, Any]) -> str:
    """Return what the last column says of a network."""
    if row.get("skipped"):
        return f"skipped: {row['skipped']}"
    if row.get("error"):
        return f"not run: {row['error']}"
    if row["missing"] or row["extra"]:
        return f"differs: missing {', '.join(row['missing']) or 'none'}; extra {', '.join(row['extra']) or 'none'}"
    return "match"


def family(name: str) -> str:
    return re.split(r"[_\d]", name.removeprefix("tf_").removeprefix("legacy_"))[0]


def report(rows: list[dict[str, Any]]) -> str:
    ran = [r for r in rows if not r.get("skipped") and not r.get("error")]
    lines = ["# Gate sites found against SE modules in the code\n"]
    lines.append(
        "Each network is built with random weights and run once on one image of the size shown. *SE modules* counts "
        "the calls of the SE classes of each library (squeeze-and-excitation, effective SE, ECA, the channel half "
        "of CBAM, Gather-Excite of global extent, split attention of radix 1) in that pass; *sites* what "
        "`find_sites` finds from the operations, without looking at a class or a name. A network matches where "
        "every call has one site, fed by a layer of that very module, and there is no other site. Networks of more "
        f"than {LARGEST} M parameters are skipped.\n"
    )
    table = []
    for library in LIBRARIES:
        part = [r for r in ran if r["library"] == library]
        have, have_not = [r for r in part if r["modules"]], [r for r in part if not r["modules"]]
        same = [r for r in part if verdict(r) == "match"]
        table.append(
            [
                library,
                str(len(have)),
                str(sum(r in same for r in have)),
                str(len({family(r["name"]) for r in have})),
                f"{sum(sum(r['modules'].values()) for r in have):,}",
                f"{sum(r['sites'] for r in have):,}",
                str(len(have_not)),
                str(sum(r["sites"] == 0 for r in have_not)),
                str(sum(r["library"] == library and r not in ran for r in rows)),
            ]
        )
    columns = [
        "library",
        "networks with SE",
        "of which match",
        "name families",
        "SE modules run",
        "sites",
        "networks without SE",
        "of which no site",
        "skipped or not run",
    ]
    lines.append(markdown_table(columns, table))
    if not any(r["library"] == "pytorchcv" for r in rows):
        lines.append("pytorchcv is not installed here, so its networks were not looked at.\n")
    lines += ["## Time\n", "CPU seconds at the networks' own sizes, the least of three, one thread.\n"]
    lines.append(markdown_table(["network", "input", "sites", "operations", "forward", "discovery"], speed()))
    reasons: collections.Counter[str] = collections.Counter()
    examples: dict[str, set[str]] = collections.defaultdict(set)
    for row in ran:
        for reason, times in row["left_alone"].items():
            reasons[reason] += times
            examples[reason].add(f"{row['library']}:{row['name']}")
    lines.append("## What looks like a gate and was left alone\n")
    lines.append(
        markdown_table(
            ["reason", "multiplies", "networks", "for example"],
            [
                [reason, str(times), str(len(examples[reason])), ", ".join(sorted(examples[reason])[:3])]
                for reason, times in reasons.most_common()
            ],
        )
    )
    lines.append("## Networks\n")
    lines.append(
        markdown_table(
            ["network", "M parameters", "input", "SE modules", "sites", "left alone", "verdict"],
            [
                [
                    f"{r['library']}:{r['name']}",
                    f"{r['params'] / 1e6:.1f}" if "params" in r else "",
                    "×".join(map(str, r["size"])) if "size" in r else "",
                    ", ".join(f"{n} {c}" for c, n in r["modules"].items()) or "0" if "modules" in r else "",
                    str(r.get("sites", "")),
                    str(sum(r.get("left_alone", {}).values()) or ""),
                    verdict(r),
                ]
                for r in rows
            ],
        )
    )
    return "\n".join(lines)


def main() -> None:
    """Write `reports/discovery.md`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for library in LIBRARIES:
        done = {r["name"] for r in read_rows(ROWS) if r["library"] == library}
        for name in names(library, done):
            if name in done:
                continue
            row = study(library, name)
            append_row(ROWS, row)
            print(json.dumps(row), flush=True)
            gc.collect()
    rows = sorted(read_rows(ROWS), key=lambda r: (LIBRARIES.index(r["library"]), r["name"]))
    write_report("discovery", "python -m reports.bench discovery", report(rows), rows)
