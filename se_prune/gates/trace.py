"""A record of the operations of one forward pass: what ran, on whose outputs, inside which module.

Both the network's own control flow and functional code are seen, since the pass is real. Operations are
ATen's, so that `x.mean((2, 3))` and `AdaptiveAvgPool2d(1)` are the same thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

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
    """One operation's result: `inputs` are indices of earlier nodes, `parameters` the names of those it read.

    `operands` are the nodes among its positional arguments, `args` the plain values among them; in each, None
    stands for what the other holds. `multiply` is its number among the multiplies that its module calls, None
    where no Python code called one (also in scripted code).
    """

    op: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    module: str
    call: int
    multiply: int | None
    operands: tuple[int | None, ...] = ()
    args: tuple[Any, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules whose parameters it read."""
        return tuple(name.rpartition(".")[0] for name in self.parameters)


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
    """Appends a node per ATen operation; tensors are known by identity and die when the network drops them."""

    def __init__(self, trace: Trace, stack: list[Frame], multiplies: _Multiplies, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.stack, self.multiplies = trace, stack, multiplies
        self.producer: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()
        self.parameters: MutableMapping[torch.Tensor, str] = WeakIdKeyDictionary()
        self.stored = [*model.named_parameters(), *model.named_buffers()]
        for name, value in self.stored:
            self.parameters[value] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        inputs = tuple(i for i in map(self.producer.get, tensors) if i is not None)
        parameters = tuple(name for name in map(self.parameters.get, tensors) if name is not None)
        operands = tuple(self.producer.get(a) if isinstance(a, torch.Tensor) else None for a in args)
        plain = tuple(_plain(a) for a in args)
        out = func(*args, **(kwargs or {}))
        op = str(func.overloadpacket).removeprefix("aten.")
        if kwargs and "alpha" in kwargs:
            op += "_alpha"  # a + alpha·b; such sums are not followed
        results = list(_tensors((out,)))
        frame = self.stack[-1]
        for position, result in enumerate(results):
            # the parts of a split are different tensors; the further results of a norm or a pool are not maps
            if position == 0 or isinstance(out, list):
                node = Node(
                    op=op,
                    inputs=inputs,
                    parameters=parameters,
                    shape=tuple(result.shape),
                    module=frame.name,
                    call=frame.call,
                    multiply=self.multiplies.current,
                    operands=operands,
                    args=plain,
                )
                self.trace.nodes.append(node)
            if parameters and not inputs:
                self.parameters[result] = parameters[0]  # a view of a parameter still names its layer
                self.producer.pop(result, None)
            else:
                self.producer[result] = len(self.trace.nodes) - 1
        return out


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments or results, which nest once at most."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def _plain(value: Any) -> Any:
    """Return an argument as a plain value, None for tensors and lists of them."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float)) for v in value):
        return tuple(value)
    return None


@contextlib.contextmanager
def module_stack(model: nn.Module, stack: list[Frame]) -> Iterator[None]:
    """While open, keep the modules that are running on a stack, whose first frame is the network itself."""
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
        if name and not isinstance(module, torch.jit.ScriptModule):  # those take no hooks
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
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    multiplies = _Multiplies(stack)
    recorder = _Recorder(result, stack, multiplies, model)
    result.nodes.append(Node("input", (), (), tuple(example.shape), "", 0, None))
    recorder.producer[example] = 0
    try:
        with torch.no_grad(), module_stack(model, stack), recorder, multiplies:
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
