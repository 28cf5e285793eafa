"""Measured time: runners in turn, so that what else the machine does falls on all alike.

Shapes: a batch is (N, C, H, W).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import nn

from se_prune.errors import UsageError
from se_prune.results import Latency


def torch_runner(
    model: nn.Module, batch: torch.Tensor, device: torch.device | str = "cpu", threads: int | None = None
) -> Callable[[], None]:
    """Return a callable that runs `model` once on `batch` (N, C, H, W), for `measure_latency`.

    Args:
        model: Is moved to `device` and set to eval mode.
        batch: Is moved to `device` once, outside of what is timed.
        device: Where to run.
        threads: Torch's CPU threads during the run, restored after it; the current number where None.
    """
    model.to(device).eval()
    images = batch.to(device)

    @torch.inference_mode()
    def run() -> None:
        with _threads(threads):
            model(images)

    return run


def measure_latency(
    models: Sequence[tuple[str, Callable[[], None]]],
    rounds: int = 30,
    warmup: int = 3,
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    batch_size: int = 1,
) -> tuple[Latency, ...]:
    """Time runners in turn (A B A B …), so that what else the machine does falls on all alike.

    Args:
        models: For each the name of its runtime and a callable that runs one batch.
        rounds: Timed runs of each.
        warmup: Runs of each before them that are not timed.
        device: Where they run; CUDA and MPS are synchronised around each run.
        threads: Torch's CPU threads during the measurement, restored after it; the current number where None.
        batch_size: Images in one batch; recorded, not used.

    Returns:
        In the order of `models`, milliseconds per batch and the median over rounds of (first / this).

    Raises:
        UsageError: `rounds` or `warmup` is too small.
    """
    if rounds < 1 or warmup < 0:
        raise UsageError(
            f"a latency needs at least 1 round and 0 warm-ups, got {rounds} and {warmup}; 30 and 3 are usual."
        )
    target = torch.device(device)
    with _threads(threads):
        used = torch.get_num_threads()
        times = interleaved([run for _, run in models], rounds, warmup, device=target)
    first = times[0]
    return tuple(
        Latency(
            runtime=runtime,
            device=str(target),
            threads=used,
            batch_size=batch_size,
            rounds=rounds,
            median_ms=statistics.median(own),
            p10_ms=float(np.quantile(own, 0.1)),
            p90_ms=float(np.quantile(own, 0.9)),
            ratio=statistics.median(a / b for a, b in zip(first, own, strict=True)),
        )
        for (runtime, _), own in zip(models, times, strict=True)
    )


def interleaved(
    runners: Sequence[Callable[[], None]], rounds: int, warmup: int, *, device: torch.device
) -> list[list[float]]:
    """Run in turn (A B A B …); return per runner the milliseconds of each round, warm-ups left out."""
    for _ in range(warmup):
        for run in runners:
            _milliseconds(run, device)
    times = [[_milliseconds(run, device) for run in runners] for _ in range(rounds)]
    return [list(own) for own in zip(*times, strict=True)]


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    _synchronise(device)
    start = perf_counter()
    run()
    _synchronise(device)
    return (perf_counter() - start) * 1e3


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's CPU threads inside the block; nothing is set where the number is right already."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
