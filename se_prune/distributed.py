"""Several processes under torchrun: the one place that speaks to torch.distributed; in one process it does nothing.

Every process runs the same code on the same data set, and takes its share of every pass over images: whole batches,
the same that one process would make, so that sums in float64 are those of one process. Between processes go numbers
and JSON, never pickles. Files are written by the main process alone (`se_prune.files`). Functions that exchange
something must be called by all processes in the same order; one that fails ends the others there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from se_prune import errors
from se_prune.errors import PeerError, SePruneError, UsageError, first_line
from se_prune.schema import from_json, to_json

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
#: How long a process waits for the others: they wait while the main one times networks or exports.
PATIENCE = timedelta(hours=2)
#: What torchrun sets.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: What gloo and NCCL say of a process that is gone.
ENDED = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "remote process exited",
    "connection was",
)
FAILED = "se_prune/failed"


@dataclass(slots=True, kw_only=True)
class _Place:
    """Where this process stands among all of them, and on its machine; `store` outlives a process that fails."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    machines: int = 1
    store: Any = None
    failed: bool = False


_place = _Place()


def launched() -> bool:
    """Say whether torchrun has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in {"", "1"}


def start() -> None:
    """Join the processes that torchrun has started; alone, or where they are joined already, do nothing.

    Raises:
        UsageError: The variables that torchrun sets are not there, or it started more processes than there are GPUs.
        SePruneError: The other processes cannot be reached.
    """
    if not launched() or _place.size > 1:
        return
    try:
        values = {name: os.environ[name] for name in VARIABLES}
        rank, size, here = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        machines = size // int(values["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"WORLD_SIZE says that there are several processes, but {error} is wrong or missing; start them with "
            "torchrun, or unset WORLD_SIZE."
        ) from error
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if here >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()}); give it "
                "--nproc-per-node gpu."
            )
        torch.cuda.set_device(here)
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=PATIENCE)))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise SePruneError(
            f"the processes cannot reach one another at {values['MASTER_ADDR']}:{values['MASTER_PORT']} "
            f"({first_line(error)}); check the addresses that torchrun was given."
        ) from error
    _place.rank, _place.size, _place.local_rank = rank, size, here
    _place.machines, _place.store = machines, store
    atexit.register(stop)


def stop() -> None:
    """Leave the other processes; after a failure the system closes what is open."""
    if _place.size == 1 or _place.failed:
        return
    from torch import distributed

    distributed.destroy_process_group()
    _place.rank, _place.size, _place.local_rank, _place.store = 0, 1, 0, None


def rank() -> int:
    """Return the number of this process."""
    return _place.rank


def size() -> int:
    """Return how many processes there are."""
    return _place.size


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    return _place.local_rank


def machines() -> int:
    """Return on how many machines the processes run."""
    return _place.machines


def is_main() -> bool:
    """Say whether this process writes files and speaks."""
    return _place.rank == 0


def fails_first() -> bool:
    """Note that this process fails, and say whether it is the first: that one alone says why."""
    if _place.size == 1:
        return True
    _place.failed = True
    try:
        return int(_place.store.add(FAILED, 1)) == 1
    except RuntimeError:  # the process that kept the store has ended, and said why
        return False


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turn what the other processes' end raises here into an error of ours; anything else is our defect."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in ENDED):
            raise
        raise PeerError(
            "another process of this run has ended; its own message, or the system's log, says why."
        ) from error


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


def share(count: int, batch_size: int) -> torch.Tensor:
    """Return which of `count` images this process takes: every so many-th batch of `batch_size`, whole."""
    import torch

    positions = torch.arange(count)
    return positions[positions // batch_size % size() == rank()]


def share_of_batch(count: int) -> torch.Tensor:
    """Return which images of a batch this process trains on, as many as the others.

    As many are taken from the end as from the front, so that the image which mixup pairs with one of them, the one as
    far from the other end, is among them, and at that place.
    """
    import torch

    each = count // size()
    front, back = each // 2, each - each // 2
    first, last = torch.arange(front), torch.arange(back)
    return torch.cat([rank() * front + first, count - (rank() + 1) * back + last])


def add_up(*tensors: torch.Tensor) -> None:
    """Put the sum over all processes in the place of every tensor."""
    if size() == 1:
        return
    from torch import distributed

    with _exchange():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def largest(tensor: torch.Tensor) -> None:
    """Put the largest value of all processes in every place of a tensor."""
    if size() == 1:
        return
    from torch import distributed

    with _exchange():
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Put the mean over all processes in the place of every tensor, in one exchange per number type."""
    if size() == 1:
        return
    import torch

    with torch.no_grad():
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor.detach() for tensor in tensors if tensor.dtype is dtype]
            joined = torch.cat([tensor.reshape(-1) for tensor in chosen])
            add_up(joined)
            joined /= size()
            parts = torch.split(joined, [tensor.numel() for tensor in chosen])
            for tensor, part in zip(chosen, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def add_up_tables(tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sums of named tensors over all processes, some of which may lack some of them."""
    if size() == 1:
        return dict(tables)
    import torch

    known = gather({name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tables.items()})
    shapes: dict[str, Any] = {name: value for one in known for name, value in one.items()}
    device = next((tensor.device for tensor in tables.values()), None)
    if any(len(one) < len(shapes) for one in known):  # a process without images knows no device
        device = torch.device("cpu")
    summed = {}
    for name, (shape, dtype) in shapes.items():
        own = tables.get(name)
        there = torch.zeros(shape, dtype=getattr(torch, dtype)) if own is None else own.clone()
        where = there.device
        there = there.to(device) if device is not None else there
        add_up(there)
        summed[name] = there.to(where)
    return summed


def synchronise(module: nn.Module) -> None:
    """Give a network in every process the main one's parameters and buffers."""
    if size() == 1:
        return
    import torch
    from torch import distributed

    with torch.no_grad(), _exchange():
        for tensor in (*module.parameters(), *module.buffers()):
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, 0)
            tensor.copy_(whole)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Say of each flag whether any process has set it; the GPU is not waited for."""
    if size() == 1:
        return flags
    import torch

    values = torch.tensor(flags, dtype=torch.uint8)
    largest(values)
    return tuple(bool(value) for value in values)


def gather(value: Any) -> list[Any]:
    """Return what every process gives, in their order; values of JSON alone."""
    if size() == 1:
        return [value]
    import torch

    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in gather_bytes(own)]


def gather_bytes(own: torch.Tensor) -> list[torch.Tensor]:
    """Return the bytes (B,) that every process gives, in their order; as many or as few as each has."""
    if size() == 1:
        return [own]
    import torch
    from torch import distributed

    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    with _exchange():
        distributed.all_gather(lengths, torch.tensor([len(own)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
        distributed.all_gather(parts, padded)
    return [part[: int(length)].clone() for part, length in zip(parts, lengths, strict=True)]


def from_main(make: Callable[[], Any]) -> Any:
    """Return what the main process makes, a value of JSON, in all of them; the others wait for it.

    Raises:
        SePruneError: What it raises there is raised in all, so that all go on alike where it is caught.
    """
    if size() == 1:
        return make()
    own: dict[str, Any] = {}
    if is_main():
        try:
            own = {"value": make()}
        except SePruneError as error:
            own = {"error": [type(error).__name__, str(error)]}
    answer = gather(own)[0]
    if "error" in answer:
        kind, text = answer["error"]
        raise getattr(errors, kind, SePruneError)(text)
    return answer["value"]


def record_from_main(kind: type[T], make: Callable[[], T]) -> T:
    """Return the record that the main process makes, in all of them; the others wait for it."""
    if size() == 1:
        return make()
    return from_json(kind, from_main(lambda: to_json(make())), what=f"the main process's {kind.__name__}")


@contextlib.contextmanager
def first_here() -> Iterator[None]:
    """Let the first process of every machine through before the others, which find what it has left on the disk."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
