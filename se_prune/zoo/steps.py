"""Networks written down step by step: what the import of a foreign graph leaves, as data and not as code.

A network of `ref` "onnx:NAME" has no factory; its architecture is the list of steps itself, JSON in the arguments of
its spec. Every step names an operation of the tables here, so that a file can ask for nothing else.

Shapes: N images, C channels, H×W positions, K classes.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from se_prune.errors import CheckpointError, SePruneError
from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, from_json, record

LIBRARY = "onnx"
#: The name that the steps give to the images.
IMAGES = "images"
#: No classifier has more values in one map of one image, nor more steps; a file that asks for more is refused.
LARGEST_MAP, MOST_STEPS, LARGEST_NUMBER = 1 << 28, 20_000, 1 << 20
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

Value = bool | int | float | tuple[int, ...]
#: What the file's network ends with and the module leaves out: it gives logits, and an export puts it back.
Final = Literal["none", "softmax", "log_softmax", "sigmoid"]
FINALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "sigmoid": torch.sigmoid,
}


@record
class Step:
    """One operation: its name is that of its output and, for a layer, of its module."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    op: str
    inputs: tuple[str, ...]
    args: dict[str, Value] = field(default_factory=dict)


@record
class Steps:
    """A classifier: its steps in the order in which they run; the last one makes the logits (N, K)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    input_size: tuple[int, int, int]
    steps: tuple[Step, ...]
    final: Final = "none"


def _conv(rank: int, **args: Any) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d)[rank - 1](**args)


def _norm(rank: int, channels: int, eps: float, momentum: float) -> nn.Module:
    return (nn.BatchNorm1d if rank < 2 else nn.BatchNorm2d)(channels, eps=eps, momentum=momentum)


#: Layers: operations with weights of their own. `rank` counts the positions' axes.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": _conv,
    "linear": lambda inputs, outputs, bias: nn.Linear(inputs, outputs, bias=bias),
    "norm": _norm,
}


def _reshape(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.reshape(x.shape[0], *shape)


def _hardsigmoid(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return (x * alpha + beta).clamp(0, 1)


def _max_pool(x: torch.Tensor, pads: Sequence[int], **args: Any) -> torch.Tensor:
    padded = F.pad(x, list(pads), value=-math.inf) if any(pads) else x
    pooled: torch.Tensor = F.max_pool2d(padded, **args)
    return pooled


#: Operations without weights, on one or more maps; those that end in `_by` take a number.
OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, negative_slope=alpha),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": _hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "softmax": lambda x, axis: x.softmax(axis),
    "log_softmax": lambda x, axis: x.log_softmax(axis),
    "clamp": lambda x, low=None, high=None: x.clamp(low, high),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "add_by": lambda x, value: x + value,
    "mul_by": lambda x, value: x * value,
    "div_by": lambda x, value: x / value,
    "mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "avg_pool": F.avg_pool2d,
    "max_pool": _max_pool,
    "pad": lambda x, pads, value: F.pad(x, list(pads), value=value),
    "reshape": _reshape,
    "expand": lambda x, shape: x.expand(-1, *shape),
    "permute": lambda x, axes: x.permute(list(axes)),
    "concat": lambda *maps: torch.cat(maps, 1),
}


class StepNetwork(nn.Module):
    """The network of some steps, with random weights; its layers are modules of the steps' names.

    Raises:
        CheckpointError: The steps are impossible; they may come from any file.
    """

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        _check(steps)
        for step in steps.steps:
            if step.op in LAYERS:
                _put(self, step.name, layer(step))
        self._last_use = {name: step.name for step in steps.steps for name in step.inputs}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        for _, value in self.walk(x):
            x = value
        return x

    def walk(self, x: torch.Tensor) -> Iterator[tuple[Step, torch.Tensor]]:
        """Run the network on images (N, C, H, W) and yield what every step makes."""
        values = {IMAGES: x}
        for step in self.steps.steps:
            inputs = [values[name] for name in step.inputs]
            for name in step.inputs:
                if self._last_use[name] == step.name:
                    values.pop(name, None)
            made = run(step, self.get_submodule(step.name) if step.op in LAYERS else None, inputs)
            values[step.name] = made
            yield step, made


def layer(step: Step) -> nn.Module:
    """Return the module of a step with weights; the memory of its weights is that of the device in force.

    Raises:
        CheckpointError: Its arguments are impossible.
    """
    try:
        return LAYERS[step.op](**step.args)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"the step '{step.name}' asks for an impossible {step.op} ({error})."
        ) from error


def run(step: Step, module: nn.Module | None, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what a step makes of its inputs."""
    if module is not None:
        made: torch.Tensor = module(*inputs)
        return made
    return OPERATIONS[step.op](*inputs, **step.args)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module under a dotted name, with plain modules in between."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def usable(name: str) -> bool:
    """Say whether a module may have this dotted name: parts that are no attribute of a module."""
    parts = name.split(".")
    return bool(NAME.fullmatch(name)) and not any(
        hasattr(nn.Module, part) or part in _OWN or keyword.iskeyword(part) for part in parts
    )


_OWN = frozenset({*vars(nn.Module()), "steps", "walk", "_last_use", "weight", "bias"})


def _check(steps: Steps) -> None:
    """Refuse steps that no network has, so that a damaged or hostile file ends in a sentence.

    Raises:
        CheckpointError: The message names the step.
    """
    if not 0 < len(steps.steps) <= MOST_STEPS or not _sane(steps.input_size, least=1):
        raise CheckpointError(
            f"a network of {len(steps.steps)} steps on images of {steps.input_size} is none; the file is damaged."
        )
    known, layers = {IMAGES}, set[str]()
    for step in steps.steps:
        wrong = (
            not usable(step.name)
            or step.name in known
            or step.op not in {*LAYERS, *OPERATIONS}
            or not step.inputs
            or not known.issuperset(step.inputs)
            or not all(map(_sane_argument, step.args.values()))
        )
        if wrong:
            raise CheckpointError(
                f"the step '{step.name[:80]}' ({step.op[:80]}) is not valid; the file is damaged."
            )
        known.add(step.name)
        if step.op in LAYERS:
            layers.add(step.name)
    inside = [n for n in layers if any(n.startswith(f"{other}.") for other in _parents(n) & layers)]
    if inside:
        raise CheckpointError(f"the layer '{inside[0]}' stands inside another one; the file is damaged.")


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _sane(numbers: Sequence[int], least: int) -> bool:
    return len(numbers) <= 16 and all(least <= n <= LARGEST_NUMBER for n in numbers)


def _sane_argument(value: Value) -> bool:
    if isinstance(value, tuple):
        return _sane(value, least=-LARGEST_NUMBER)
    return math.isfinite(value) and (isinstance(value, bool | float) or abs(value) <= LARGEST_NUMBER)


def require_small(step: Step, made: torch.Tensor, images: int) -> None:
    """Check the size of what a step makes of a batch of `images`.

    Raises:
        CheckpointError: No classifier has a map as large.
    """
    if made.numel() > LARGEST_MAP * images:
        raise CheckpointError(
            f"'{step.name}' ({step.op}) would make {made.numel():.3g} values of {images} image"
            f"{'s' * (images > 1)}, which no classifier does; the file is damaged or not to be trusted."
        )


def build(kwargs: Mapping[str, Any]) -> StepNetwork:
    """Build the network of a spec's arguments with random weights, after a pass of shapes alone.

    Raises:
        CheckpointError: They are no steps, or no network can be made of them.
    """
    text = kwargs.get("steps")
    if not isinstance(text, str) or set(kwargs) != {"steps"}:
        raise CheckpointError("a network of this kind is described by its steps, and these are missing.")
    try:
        steps = from_json(Steps, text, what="the network's description")
    except SePruneError as error:
        raise CheckpointError(str(error)[:500]) from error
    with torch.device("meta"):
        network = StepNetwork(steps).eval()
        images = made = torch.empty(1, *steps.input_size)
    try:
        for step, made in network.walk(images):
            require_small(step, made, 1)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"the network's steps do not go together ({first}); the file is damaged."
        ) from error
    if made.ndim != 2 or made.shape[1] < 2:
        raise CheckpointError(
            f"the network gives {tuple(made.shape)} for one image, not one number per class; "
            "only classifiers can be opened."
        )
    return StepNetwork(steps)


def final_of(module: nn.Module) -> str:
    """Return what the network of a file ended with; "none" for any other module."""
    if isinstance(module, WithFinal):
        return module.final
    return module.steps.final if isinstance(module, StepNetwork) else "none"


class WithFinal(nn.Module):
    """A network of logits with the last operation that its file had."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.final = network, final_of(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to what the file's network gave for them (N, K)."""
        return FINALS[self.final](self.network(x))
