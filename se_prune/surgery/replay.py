"""Forward passes that begin in the middle of a network, whatever its code: what they need of the part before is kept.

The first pass over a batch size is recorded as ATen operations in their order, with the storages that each makes and
reads. A later pass runs the network's own code from its start, but the operations before some point compute nothing:
they give tensors of the recorded shapes, which are never written to, so that they take no memory on a CPU; and those
that are read after the point are filled with what an earlier pass has put down (`surgery.spill`) there.

A network that cannot be replayed runs from its start each time: one whose operations depend on values, or that
changes a buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from se_prune.surgery.spill import Spill, Spilled

#: A pass puts down what the next one begins with where that saves computing so many times its size.
WORTH = 2.0


class _DivergedError(Exception):
    """A pass whose operations are not those of the recorded one."""


class _ReachedError(Exception):
    """Ends a pass at the layer that was wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A tensor that an operation made: the number of its storage, and its form."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """An operation that made tensors, wrote into its argument number `written`, or gave a view (neither)."""

    function: Any
    made: tuple[_Made, ...] = ()
    several: bool = False
    written: int | None = None


@dataclass(slots=True, kw_only=True)
class Tape:
    """The operations of a pass over batches of one size, and before which of them each layer began.

    Of every storage: the bytes, the operation that made it (-1 for the network's input, number 0), the last that used
    it. `weights` are the bytes that are live before each operation. `whole` is False where the pass cannot be replayed.
    """

    operations: list[_Operation] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    whole: bool = True
    weights: list[int] = field(default_factory=list)

    def live(self, point: int) -> list[int]:
        """Return the storages that a pass from operation `point` on needs."""
        return [s for s, born in enumerate(self.born) if born < point <= self.used[s]]

    def close(self) -> None:
        """Add up the bytes that are live before each operation, and after the last, when all are there."""
        changes = [0] * (len(self.operations) + 2)
        for size, born, used in zip(self.sizes, self.born, self.used, strict=True):
            changes[born + 1] += size
            changes[used + 1] -= size
        self.weights = list(itertools.accumulate(changes))

    def next_point(self, start: int, stop: int) -> int | None:
        """Return where a pass from `start` to `stop` best puts down what is live, None where that is not worth it."""
        saved, best, found = 0, WORTH, None
        for point in range(start + 1, stop + 1):
            saved += sum(self.sizes[made.storage] for made in self.operations[point - 1].made)
            gain = saved / max(1, self.weights[point])
            if gain >= best:
                best, found = gain, point
        return found

    def largest(self) -> int:
        """Return the most bytes that are put down at a time when the layers are taken in turn."""
        start, most = 0, self.sizes[0]
        for stop in sorted(self.starts.values()):
            point = self.next_point(start, stop)
            if point is not None:
                start, most = point, max(most, self.weights[point])
        return most


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a tape; tensors are known by identity, and die when the network drops them."""

    def __init__(self, example: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape(sizes=[example.untyped_storage().nbytes()], born=[-1], used=[-1])
        self.storage: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()
        self.storage[example] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        try:
            operation = self._recorded(func, args, kwargs or {}, out)
        except NotImplementedError:  # a tensor without storage, such as a sparse one
            operation = None
        self.tape.whole = self.tape.whole and operation is not None
        self.tape.operations.append(operation or _Operation(function=func))
        return out

    def _recorded(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> _Operation | None:
        """Return the operation, None where it cannot be replayed."""
        index = len(self.tape.operations)
        read = [*_tensors(args), *_tensors(kwargs.values())]
        known = {t.untyped_storage()._cdata: self.storage.get(t) for t in read}
        for number in known.values():
            if number is not None:
                self.tape.used[number] = index
        results = list(_tensors(out if isinstance(out, (list, tuple)) else (out,)))
        if not results:
            return None
        if func._schema.is_mutable:
            written = next((i for i, value in enumerate(args) if value is out), None)
            number = None if written is None else self.storage.get(args[written])
            if number is None or out.untyped_storage().nbytes() != self.tape.sizes[number]:
                return None
            return _Operation(function=func, written=written)
        views = [t for t in results if t.untyped_storage()._cdata in known]
        for view in views:
            number = known[view.untyped_storage()._cdata]
            if number is not None:
                self.storage[view] = number
        if views:
            return _Operation(function=func) if len(views) == len(results) else None
        made = tuple(self._made(t, index) for t in results)
        if any(one is None for one in made):
            return None
        return _Operation(
            function=func,
            made=tuple(one for one in made if one is not None),
            several=isinstance(out, (list, tuple)),
        )

    def _made(self, tensor: torch.Tensor, index: int) -> _Made | None:
        number = len(self.tape.sizes)
        made = _Made(
            storage=number,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        size = tensor.untyped_storage().nbytes()
        self.storage[tensor] = number
        self.tape.sizes.append(size)
        self.tape.born.append(index)
        self.tape.used.append(index)
        return made if made.empty().untyped_storage().nbytes() == size else None


class _Player(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the operations from `start` on; keeps what is live at the point where the pass puts it down."""

    def __init__(self, tape: Tape, start: int, kept: Mapping[int, Spilled], point: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.start, self.kept, self.point = tape, start, kept, point
        self.count = 0
        self.wanted = frozenset(() if point is None else tape.live(point))
        self.held: dict[int, torch.Tensor] = {}
        self.saved: dict[int, Spilled] | None = None
        self.spill: Spill | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reach(self.count)
        if self.count >= len(self.tape.operations) or self.tape.operations[self.count].function is not func:
            raise _DivergedError
        operation = self.tape.operations[self.count]
        skipped = self.count < self.start
        self.count += 1
        if skipped and operation.written is not None:
            return args[operation.written]
        if not (skipped and operation.made):
            out = func(*args, **(kwargs or {}))
            for made, tensor in zip(
                operation.made, _tensors(out if operation.several else (out,)), strict=False
            ):
                if (made.shape, made.stride) != (tuple(tensor.shape), tensor.stride()):
                    raise _DivergedError
                self.hold(made.storage, tensor)
            return out
        tensors = [self.restored(made) for made in operation.made]
        return tuple(tensors) if operation.several else tensors[0]

    def restored(self, made: _Made) -> torch.Tensor:
        """Return a tensor of a form, with what was put down of it, if that is needed."""
        tensor = made.empty()
        if made.storage in self.kept:
            self.kept[made.storage].into(_storage_of(tensor))
        self.hold(made.storage, tensor)
        return tensor

    def hold(self, number: int, tensor: torch.Tensor) -> None:
        """Keep a tensor that is to be put down."""
        if number in self.wanted and self.saved is None:
            self.held[number] = tensor

    def reach(self, count: int) -> None:
        """Put down what is live, if the next operation is the one before which that is to be done."""
        if self.point == count and self.saved is None and self.spill is not None:
            self.saved = {number: self.spill.put(_storage_of(self.held[number])) for number in self.wanted}
            self.held.clear()


def _storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all bytes of a tensor's storage as a flat tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments or results, which nest once at most."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))


def record(model: nn.Module, images: torch.Tensor, layers: Mapping[str, nn.Module]) -> Tape:
    """Run a network on a batch (N, C, H, W); return the tape of it, with where each of some layers began."""
    recorder = _Recorder(images)

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            recorder.tape.starts.setdefault(name, len(recorder.tape.operations))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        with recorder:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    recorder.tape.close()
    return recorder.tape


@dataclass(slots=True, kw_only=True)
class Passing:
    """A batch on its way through a network: its images, and what its next pass begins with, at operation `start`."""

    images: Spilled
    tape: Tape | None
    start: int = 0
    kept: dict[int, Spilled] = field(default_factory=dict)

    def input_of(
        self, model: nn.Module, name: str, layer: nn.Module, spill: Spill, device: torch.device
    ) -> torch.Tensor:
        """Run the network up to a layer; return what that reads. What the next pass begins with goes into `spill`."""
        reached: list[torch.Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            reached.append(inputs[0])
            raise _ReachedError

        handle = layer.register_forward_pre_hook(stop)
        try:
            if self.tape is not None and self.tape.whole:
                try:
                    self._replay(self.tape, model, name, spill, device)
                except _DivergedError:
                    self.tape, self.kept = None, {}
            if not reached:
                _until_reached(model, self.images.load(device))
        finally:
            handle.remove()
        return reached[0]

    def _replay(self, tape: Tape, model: nn.Module, name: str, spill: Spill, device: torch.device) -> None:
        point = tape.next_point(self.start, tape.starts[name])
        player = _Player(tape, self.start, self.kept, point)
        player.spill = spill
        images = torch.empty(self.images.shape, dtype=self.images.dtype, device=device)
        if self.start == 0:
            self.images.into(images)
        elif 0 in self.kept:
            self.kept[0].into(_storage_of(images))
        player.hold(0, images)
        with player:
            _until_reached(model, images)
        player.reach(player.count)
        if player.saved is not None:
            assert point is not None
            self.start, self.kept = point, player.saved


def _until_reached(model: nn.Module, images: torch.Tensor) -> None:
    try:
        model(images)
    except _ReachedError:
        return
    raise AssertionError("the layer did not run")
