"""Telling a checkpoint's architecture by the names and shapes of its tensors.

Every architecture of the libraries is tried: it is built without values, and given up at its first few layers whose
shapes the checkpoint does not have, so that some 1,400 candidates take a few seconds. One fits if all names and shapes
are equal, apart from the class count and the channels of the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from se_prune.errors import UsageError
from se_prune.foreign import Weights, differences, renamed, some
from se_prune.records import ArchSpec
from se_prune.zoo import linear_gate, registry

#: Only pytorchcv names its tensors so, and it names all of them so.
PYTORCHCV = re.compile(r"features\.(init_block|stage\d+)\.")
#: What pytorchcv ends the names of one network with that it trained on several data sets.
DATA_SET = re.compile(r"^(pytorchcv:.+)_(cub|cifar100|cifar10|svhn)$")
#: Tensors of a candidate that may have other shapes before it is given up: the first convolution, the classifier's
#: two, four of a gate that timm's EfficientNets make to see which arguments it takes, and a couple that a file may
#: have lost.
SLACK = 9
#: A candidate that differs in at most this share of its tensors is worth telling.
CLOSE = 0.1
SHOWN = 8
ADD_ARCH = "add --arch, such as --arch timm:seresnet50 (`se-prune archs` lists them)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """A candidate built to its end: how many tensors differ, and whether its first or last layer must be resized."""

    ref: str
    module: nn.Module
    different: int
    resized: bool


def recognise(weights: Weights, what: str) -> str:
    """Return the reference of the one architecture that a checkpoint fits.

    Among architectures with the same tensors, one whose class count and input channels are the checkpoint's own
    goes first, then one that the file names.

    Args:
        weights: What was read from the file.
        what: The file, for messages.

    Raises:
        UsageError: None fits, or several do; the message says what to add.
    """
    state = renamed(weights.tensors)
    with torch.random.fork_rng(devices=[]):  # so that a caller's seed means the same with --arch and without
        tried = list(_tried(state, what))
    fitting = [candidate for candidate in tried if not candidate.different]
    fitting = [candidate for candidate in fitting if not candidate.resized] or fitting
    networks = {DATA_SET.sub(r"\1", candidate.ref): candidate for candidate in reversed(fitting)}
    fitting = list(reversed(networks.values()))
    named = [candidate for candidate in fitting if candidate.ref.partition(":")[2] in weights.stated]
    fitting = named if len(named) == 1 else fitting
    if len(fitting) == 1:
        return fitting[0].ref
    if fitting:
        refs = [candidate.ref for candidate in fitting]
        raise UsageError(
            f"{what} has the tensors of {len(refs)} architectures ({some(refs, SHOWN)}); choose one, such as "
            f"--arch {refs[0]}."
        )
    closest = min(tried, key=lambda candidate: candidate.different, default=None)
    if closest is not None and closest.different <= CLOSE * len(state):
        raise UsageError(
            f"{what} is of no architecture known here; the closest is {closest.ref}: "
            f"{differences(_resized(closest, state).state_dict(), state)}; {ADD_ARCH}."
        )
    raise UsageError(
        f"{what} does not say its architecture, and its {len(state)} tensors ({some(list(state))}) are of none known "
        f"here; {ADD_ARCH}."
    )


def _resized(candidate: _Tried, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a candidate with the checkpoint's class count and input channels, which are no differences."""
    sizes = stored_sizes(candidate.module, state)
    found: dict[str, Any] = {name: stored for name, built, stored in sizes if stored != built}
    with _shapes_only(lambda *_: None):
        return registry.build(ArchSpec(ref=candidate.ref, kwargs=found)) if found else candidate.module


def adapted(spec: ArchSpec, state: Mapping[str, torch.Tensor]) -> ArchSpec:
    """Return a spec with the reduction of the checkpoint's gates, where its training script takes that as an option."""
    if not spec.ref.startswith(f"zoo:{linear_gate.PREFIX}"):
        return spec
    reduction = linear_gate.reduction_of({key: tensor.shape for key, tensor in state.items()})
    if reduction == linear_gate.REDUCTION:
        return spec
    return dataclasses.replace(spec, kwargs={"reduction": reduction, **spec.kwargs})


def _tried(state: Mapping[str, torch.Tensor], what: str) -> Iterator[_Tried]:
    shapes = {key: tensor.shape for key, tensor in state.items() if _counts(key)}
    leaves = Counter((key.rpartition(".")[2], shape) for key, shape in shapes.items())
    for spec in _candidates(shapes, what):
        module = _outline(adapted(spec, state), leaves)
        if module is not None:
            different, resized = _compared(module, shapes)
            yield _Tried(ref=spec.ref, module=module, different=different, resized=resized)


def _candidates(shapes: Mapping[str, torch.Size], what: str) -> Iterator[ArchSpec]:
    """Yield what the checkpoint could be, library by library and sorted by name."""
    theirs = any(PYTORCHCV.match(key) for key in shapes)
    for library in ("pytorchcv",) if theirs else ("zoo", "timm", "torchvision"):
        try:
            names = registry.names(library)
        except UsageError as error:
            raise UsageError(f"{what} has tensors named as in {library}, but {error}.") from error
        yield from (ArchSpec(ref=f"{library}:{name}") for name in names)


def _counts(key: str) -> bool:
    """Say whether a tensor must be there: old checkpoints have no batch counters."""
    return not key.endswith("num_batches_tracked")


class _OtherNetworkError(Exception):
    """The network under construction cannot be the checkpoint's."""


def _outline(spec: ArchSpec, leaves: Counter[tuple[str, torch.Size]]) -> nn.Module | None:
    """Build an architecture on `meta`; None where it is soon seen to be another one, or cannot be built."""
    left, others = Counter(leaves), 0

    def check(name: str, shape: torch.Size) -> None:
        nonlocal others
        left[name, shape] -= 1
        others += left[name, shape] < 0
        if others > SLACK:
            raise _OtherNetworkError

    try:
        with _shapes_only(check), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return registry.build(spec)
    except Exception:  # noqa: BLE001 - a library may refuse to build a network for reasons of its own
        return None


@contextlib.contextmanager
def _shapes_only(check: Callable[[str, torch.Size], None]) -> Iterator[None]:
    """Move every tensor that modules of this thread register to `meta`, and show each parameter to `check`.

    Nothing is initialised and no memory is held. Unlike `torch.device("meta")` this leaves alone what constructors
    compute with, such as the widths of torchvision's RegNets.
    """
    thread = threading.get_ident()

    def on_parameter(_: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or threading.get_ident() != thread:
            return None
        check(name, value.shape)
        return nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    def on_buffer(_: nn.Module, __: str, value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None or threading.get_ident() != thread else value.to("meta")

    handles = [
        # What a hook returns is registered instead, though torch annotates that it returns nothing.
        hooks.register_module_parameter_registration_hook(on_parameter),  # type: ignore[arg-type]
        hooks.register_module_buffer_registration_hook(on_buffer),  # type: ignore[arg-type]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compared(module: nn.Module, shapes: Mapping[str, torch.Size]) -> tuple[int, bool]:
    """Return how many tensors differ, and whether the first or the last layer must be resized."""
    own = {key: tensor.shape for key, tensor in module.state_dict().items() if _counts(key)}
    head, stem = head_of(module), stem_of(module)
    free = {} if head is None else {f"{head[0]}.weight": 0, f"{head[0]}.bias": 0}
    free |= {} if stem is None else {f"{stem[0]}.weight": 1}
    different, resized = len(own.keys() ^ shapes.keys()), False
    for key in own.keys() & shapes.keys():
        if own[key] == shapes[key]:
            continue
        side = free.get(key)
        if side is not None and _without(own[key], side) == _without(shapes[key], side):
            resized = True
        else:
            different += 1
    return different, resized


def _without(shape: torch.Size, side: int) -> tuple[int, ...]:
    return (*shape[:side], *shape[side + 1 :])


# What a checkpoint says of the network's sizes.


def stored_sizes(module: nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int, int]]:
    """Yield for the class count and the input channels what the module has, and what the checkpoint has."""
    head, stem = head_of(module), stem_of(module)
    if head is not None:
        weight = state.get(f"{head[0]}.weight")
        if weight is not None and weight.ndim == head[1].weight.ndim:
            yield "num_classes", outputs(head[1]), weight.shape[0]
    if stem is not None:
        weight = state.get(f"{stem[0]}.weight")
        if weight is not None and weight.ndim == stem[1].weight.ndim:
            yield "in_channels", stem[1].in_channels, weight.shape[1] * stem[1].groups


def head_of(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """Return the last layer that can be a classifier: linear, or a 1×1 convolution."""
    found = None
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
            found = name, layer
    return found


def outputs(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the class count of a classifier."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def stem_of(module: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Return the first convolution."""
    return next((pair for pair in module.named_modules() if isinstance(pair[1], nn.Conv2d)), None)
