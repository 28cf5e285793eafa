"""Names of architectures to networks: `zoo:`, `timm:`, `torchvision:`, `pytorchcv:`, `package.module:factory`.

`onnx:` networks have no factory: their spec holds them step by step (`zoo.steps`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import nn

from se_prune.errors import CheckpointError, UsageError, nearest
from se_prune.records import ArchSpec, Preprocessing
from se_prune.zoo import linear_gate, options, steps
from se_prune.zoo.bn_inception import BNInception
from se_prune.zoo.inception_resnet import InceptionResNetV2
from se_prune.zoo.mobilenet import MobileNet
from se_prune.zoo.resnet import CifarResNet
from se_prune.zoo.resnext import CifarResNeXt
from se_prune.zoo.senet import PLACEMENTS, SENet
from se_prune.zoo.shufflenet import ShuffleNet
from se_prune.zoo.vgg import VGG16

FASHION = Preprocessing(input_size=(1, 28, 28), mean=(0.2860,), std=(0.3530,))
IMAGENET = Preprocessing(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
INCEPTION = Preprocessing(input_size=(3, 299, 299), mean=(0.5,) * 3, std=(0.5,) * 3)
SMALL = {"num_classes": 10, "in_channels": 1}
LIBRARIES = ("zoo", "timm", "torchvision", "pytorchcv")
#: Arguments that may stand in an artifact for a library's factory; anything else could load files.
COMMON_KWARGS = frozenset({"num_classes", "in_channels"})


#: A factory, the arguments that make the network of that name, and what it sees.
Entry = tuple[Callable[..., nn.Module], dict[str, Any], Preprocessing]


def _zoo() -> dict[str, Entry]:
    table: dict[str, Entry] = {}

    def pair(name: str, factory: Callable[..., nn.Module], see: Preprocessing, **kwargs: Any) -> None:
        table[f"se_{name}"] = (factory, {**kwargs, "se": True}, see)
        table[name] = (factory, {**kwargs, "se": False}, see)

    for depth in (20, 32, 56, 110):
        pair(f"resnet{depth}", CifarResNet, FASHION, depth=depth, **SMALL)
    pair("resnext29_8x64d", CifarResNeXt, FASHION, **SMALL)
    narrow = {"base_width": 4, "channels": 16, "reduction": 8}
    pair("resnext29_8x4d", CifarResNeXt, FASHION, **narrow, **SMALL)
    small = {"width": 0.25, "small_input": True, "reduction": 8, "min_hidden": 4}
    pair("mobilenet_x025", MobileNet, FASHION, **small, **SMALL)
    for depth in (50, 101, 152):
        pair(f"resnet{depth}", SENet, IMAGENET, depth=depth)
    for reduction in (4, 8, 32):
        table[f"se_resnet50_r{reduction}"] = (SENet, {"depth": 50, "reduction": reduction}, IMAGENET)
    for placement in PLACEMENTS[1:]:
        table[f"se_resnet50_{placement}"] = (SENet, {"depth": 50, "placement": placement}, IMAGENET)
    for depth in (50, 101):
        pair(f"resnext{depth}_32x4d", SENet, IMAGENET, depth=depth, form="resnext")
    pair("vgg16_bn", VGG16, IMAGENET)
    pair("bn_inception", BNInception, IMAGENET)
    pair("inception_resnet_v2", InceptionResNetV2, INCEPTION)
    pair("mobilenet", MobileNet, IMAGENET)
    pair("shufflenet_g3", ShuffleNet, IMAGENET)
    for name, se in (("senet154", True), ("senet154_without_se", False)):
        table[name] = (SENet, {"depth": 152, "form": "senet", "se": se}, IMAGENET)
    for depth in linear_gate.DEPTHS:
        table[f"{linear_gate.PREFIX}{depth}"] = (linear_gate.linear_se_resnet, {"depth": depth}, IMAGENET)
    for depth in linear_gate.CIFAR_DEPTHS:
        entry = (linear_gate.linear_se_cifar, {"depth": depth}, linear_gate.CIFAR)
        table[f"{linear_gate.PREFIX}{depth}"] = entry
    return table


ZOO = _zoo()
#: Names that timm has too, mostly for another network: bare, they mean timm's, and ours need their `zoo:`.
PREFIXED = frozenset(
    {
        "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x4d", "vgg16_bn",
        "inception_resnet_v2", "senet154",
    }
)  # fmt: skip


def names(library: str) -> list[str]:
    """Return the architecture names of a library, sorted.

    Raises:
        UsageError: The library is not installed.
    """
    if library == "zoo":
        return sorted(ZOO)
    if library == "timm":
        import timm

        return list(timm.list_models())
    if library == "torchvision":
        from torchvision import models

        return sorted(models.list_models(module=models))
    return sorted(_pytorchcv_models())


@functools.cache
def _pytorchcv_models() -> dict[str, Any]:
    try:
        provider = importlib.import_module("pytorchcv.model_provider")
    except ImportError as error:
        raise UsageError("pytorchcv is not installed: pip install pytorchcv") from error
    return dict(provider._models)


def resolve(ref: str, **kwargs: Any) -> ArchSpec:
    """Return the spec of an architecture reference; a bare name is looked up library by library.

    The zoo comes first, except for the names in `PREFIXED`.

    Args:
        ref: As `--arch` takes it, with options behind a ? where there are any.
        **kwargs: Arguments of the factory, such as `num_classes`.

    Raises:
        UsageError: No library has that name, or the network no such option; the message gives the nearest one.
    """
    ref, given = options.split(ref)
    spec = _named(ref)
    options.require_known(spec.ref, given, _known_options(spec.ref) if given else ())
    return replace(spec, kwargs=options.merged(ref, given, kwargs))


def _known_options(ref: str) -> Collection[str]:
    """Return the options that a reference may have: the arguments of a factory of the zoo or the user."""
    library, _, name = ref.rpartition(":")
    if library in LIBRARIES and library != "zoo":
        return COMMON_KWARGS
    factory = ZOO[name][0] if library == "zoo" else _user_factory(library, name)
    return [n for n in inspect.signature(factory).parameters if n != "gate_gain"]


def _named(ref: str) -> ArchSpec:
    """Return the spec of a reference without options."""
    library, _, name = ref.rpartition(":")
    if library == steps.LIBRARY:
        raise UsageError(
            f"a network of an ONNX file is opened by its file: give {name}.onnx instead of {ref}."
        )
    if not library:
        for candidate in LIBRARIES:
            if candidate == "pytorchcv" and importlib.util.find_spec("pytorchcv") is None:
                continue
            if candidate == "zoo" and name in PREFIXED:
                continue
            if name in names(candidate):
                return ArchSpec(ref=f"{candidate}:{name}")
        known: Iterable[str] = [n for library in ("zoo", "timm") for n in names(library)]
        raise UsageError(
            f"no architecture is called '{ref}'{nearest(ref, known)}; `se-prune archs` lists them."
        )
    if library in LIBRARIES and name not in names(library):
        raise UsageError(
            f"{library} has no architecture '{name}'{nearest(name, names(library))}; `se-prune archs` lists them."
        )
    return ArchSpec(ref=ref)


def is_library(ref: str) -> bool:
    """Say whether a reference names a network of the zoo or a known library, and no user factory."""
    return ref.rpartition(":")[0] in {*LIBRARIES, steps.LIBRARY}


def shown(spec: ArchSpec) -> ArchSpec:
    """Return a spec as it may be printed: without the steps of an imported network, which are many."""
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "steps"}
    return replace(spec, kwargs=kwargs)


def is_trusted(spec: ArchSpec) -> bool:
    """Say whether a spec read from a file may be built: a known network, and arguments that load nothing."""
    library, _, name = spec.ref.rpartition(":")
    if library == steps.LIBRARY:
        return set(spec.kwargs) == {"steps"}
    if library == "zoo" and name in ZOO:
        factory = ZOO[name][0]
        return set(spec.kwargs) <= set(inspect.signature(factory).parameters)
    return library in LIBRARIES and set(spec.kwargs) <= COMMON_KWARGS and name in names(library)


def build(spec: ArchSpec) -> nn.Module:
    """Build the dense network of a spec with random weights.

    Raises:
        UsageError: The factory is missing or refuses its arguments.
        CheckpointError: The steps of an imported network are damaged.
    """
    library, _, name = spec.ref.rpartition(":")
    kwargs = dict(spec.kwargs)
    if library == steps.LIBRARY:
        return steps.build(kwargs)
    try:
        if library == "zoo":
            factory, defaults, _ = ZOO[name]
            return factory(**{**defaults, **kwargs})
        if library == "timm":
            import timm

            if "in_channels" in kwargs:
                kwargs["in_chans"] = kwargs.pop("in_channels")
            return cast(nn.Module, timm.create_model(name, pretrained=False, **kwargs))
        if library == "torchvision":
            from torchvision import models

            return cast(nn.Module, models.get_model(name, weights=None, **kwargs))
        if library == "pytorchcv":
            return cast(nn.Module, _pytorchcv_models()[name](pretrained=False, **kwargs))
        return _user_factory(library, name)(**kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"cannot build {spec.ref} with {kwargs}: {error}.") from error


def _user_factory(module: str, name: str) -> Callable[..., nn.Module]:
    try:
        return cast(Callable[..., nn.Module], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"cannot import '{name}' from '{module}': {error}; --arch takes LIBRARY:NAME or package.module:factory."
        ) from error


def default_preprocessing(spec: ArchSpec, model: nn.Module | None = None) -> Preprocessing:
    """Return the architecture's own input size, mean and standard deviation."""
    library, _, name = spec.ref.rpartition(":")
    if library == "zoo":
        if name not in ZOO:
            raise CheckpointError(f"the zoo has no architecture '{name}'{nearest(name, ZOO)}.")
        base = ZOO[name][2]
    elif library == "timm" and model is not None and hasattr(model, "pretrained_cfg"):
        from timm.data import resolve_data_config

        config = resolve_data_config({}, model=model)
        base = Preprocessing(
            input_size=tuple(config["input_size"]), mean=tuple(config["mean"]), std=tuple(config["std"])
        )
    else:
        base = IMAGENET
    channels = int(spec.kwargs.get("in_channels", base.input_size[0]))
    if channels == base.input_size[0]:
        return base
    mean, std = sum(base.mean) / len(base.mean), sum(base.std) / len(base.std)
    return Preprocessing(
        input_size=(channels, *base.input_size[1:]), mean=(mean,) * channels, std=(std,) * channels
    )
