"""A record of the operations of one forward pass: what ran, on whose outputs, inside which module.

Both the network's own control flow and functional code are seen, since the pass is real. Operations are
ATen's, so that `x.mean((2, 3))` and `AdaptiveAvgPool2d(1)` are the same thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: The spellings of a multiply; in each the two operands are the first two arguments.
MULTIPLIES = frozenset(
    {
        torch.mul,
        torch.multiply,
        torch.Tensor.mul,
        torch.Tensor.mul_,
        torch.Tensor.multiply,
        torch.Tensor.multiply_,
        torch.Tensor.__mul__,
        torch.Tensor.__rmul__,
        torch.Tensor.__imul__,
    }
)


@dataclass(slots=True)
class Node:
    """One operation: `inputs` are indices of earlier nodes, `layers` the parameters' modules it read."""

    op: str
    inputs: tuple[int, ...]
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    module: str
    call: int
    multiply: int | None
    operands: tuple[int | None, ...] = ()


@dataclass(slots=True)
class Frame:
    """A module whose forward is running: its name, which call of it, multiplies so far."""

    name: str
    call: int
    multiplies: int = 0


@dataclass(slots=True)
class Trace:
    """All nodes of a forward pass, in order."""

    nodes: list[Node] = field(default_factory=list)


class _Multiplies(TorchFunctionMode):
    """Numbers the multiplies that each running module calls, as `GateTap` will count them."""

    def __init__(self, stack: list[Frame]) -> None:
        super().__init__()
        self.stack = stack
        self.current: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in MULTIPLIES:
            return func(*args, **(kwargs or {}))
        self.current = self.stack[-1].multiplies
        for frame in self.stack:
            frame.multiplies += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = None


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends a node per ATen operation."""

    def __init__(
        self, trace: Trace, stack: list[Frame], multiplies: _Multiplies, layers: dict[int, str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.stack, self.multiplies, self.layers = trace, stack, multiplies, layers
        self.producer: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        inputs = tuple(self.producer[id(t)] for t in tensors if id(t) in self.producer)
        layers = tuple(self.layers[id(t)] for t in tensors if id(t) in self.layers)
        operands = tuple(self.producer.get(id(a)) if isinstance(a, torch.Tensor) else None for a in args)
        out = func(*args, **(kwargs or {}))
        frame = self.stack[-1]
        results = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)]
        node = Node(
            op=str(func.overloadpacket).removeprefix("aten."),
            inputs=inputs,
            layers=layers,
            shape=tuple(results[0].shape) if results else (),
            module=frame.name,
            call=frame.call,
            multiply=self.multiplies.current,
            operands=operands,
        )
        index = len(self.trace.nodes)
        self.trace.nodes.append(node)
        for result in results:
            if inputs or layers or id(result) not in self.layers:
                self.producer[id(result)] = index
            if layers and not inputs:
                self.layers[id(result)] = layers[0]  # a view of a parameter still names its layer
                self.producer.pop(id(result), None)
            self.alive.append(result)
        return out


@contextlib.contextmanager
def _module_stack(model: nn.Module, stack: list[Frame]) -> Iterator[None]:
    calls: dict[str, int] = {}

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            stack.append(Frame(name, calls.get(name, 0)))
            calls[name] = calls.get(name, 0) + 1

        return hook

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, example: torch.Tensor) -> Trace:
    """Run `model` on `example` (N, C, H, W) in eval mode without gradients and record every operation."""
    result = Trace()
    stack = [Frame("", 0)]
    layers = {}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        layers[id(parameter)] = name.rpartition(".")[0]
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    multiplies = _Multiplies(stack)
    recorder = _Recorder(result, stack, multiplies, layers)
    result.nodes.append(Node("input", (), (), tuple(example.shape), "", 0, None))
    recorder.producer[id(example)] = 0
    try:
        with torch.no_grad(), _module_stack(model, stack), recorder, multiplies:
            model(example)
    finally:
        for module in was_training:
            module.training = True
    return result


def norms_after(record: Trace) -> dict[str, str]:
    """Return, per layer whose output a BN reads and nothing else does, that BN."""
    readers: dict[int, list[Node]] = {}
    for node in record.nodes:
        for index in set(node.inputs):
            readers.setdefault(index, []).append(node)
    return {
        layer: read[0].layers[0]
        for index, read in readers.items()
        if len(read) == 1 and "batch_norm" in read[0].op and read[0].layers
        for layer in record.nodes[index].layers
    }
