"""Gauss-Newton steps that bring a cut network's outputs nearer to the dense network's, by scales and shifts alone.

Least squares repairs one layer at a time and cannot see what its error does further on. Here the scale and the shift of
every channel after a BN, and of every output of the classifier, move together: a step minimises the second-order model
of the KL divergence from the dense network's class probabilities. Its curvature is the Gauss-Newton matrix
E[Jᵀ(diag q − qqᵀ)J] (Martens, "New insights and perspectives on the natural gradient method", JMLR 2020), of which
every image gives one random row ξᵀ(diag q − qqᵀ)^½J, and conjugate gradients solve with it. No labels, no learning
rate: held-out images choose a step's damping and length, and refuse it where it does not help there.

Shapes: N images, K classes, C channels of a module, P scales and shifts in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from se_prune import distributed
from se_prune.data.source import share_unreadable, shared_batches
from se_prune.device import inference_batch
from se_prune.records import Preprocessing
from se_prune.surgery.knobs import Knob, find_knobs, slopes_of
from se_prune.surgery.repair import divergences

if TYPE_CHECKING:
    from se_prune.data import Split

#: Steps at most; all take the curvature of the first.
STEPS = 2
#: Every n-th image is held out.
HELD_OUT = 8
#: Damping of a step, as a share of the curvature's mean diagonal, and its length.
DAMPING = (0.1, 1.0)
LENGTHS = (0.5, 1.0)
#: A step is taken where the held-out divergence falls by more standard errors than this.
CERTAIN = 1.0
#: Conjugate gradients stop at this residual, relative to the gradient, or after so many products.
RESIDUAL, PRODUCTS = 1e-3, 200
#: How many images tell the spread of a channel, in whose units it is shifted.
SPREAD_IMAGES = 16
#: Least images per scale or shift; with fewer nothing is tried.
LEAST_SHARE = 0.25
#: Bytes of the held-out images of all processes, at most.
HELD_BYTES = 1 << 28
#: Bytes of the images' rows (N, P) of one process; where they would take more, fewer images are used.
ROW_BYTES = 1 << 29


def _solve(
    product: Callable[[torch.Tensor], torch.Tensor], wanted: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Solve a positive definite system by conjugate gradients."""
    x = start.clone()
    residual = wanted - product(x)
    direction, size = residual.clone(), residual @ residual
    for _ in range(PRODUCTS):
        if size <= RESIDUAL**2 * (wanted @ wanted):
            break
        moved = product(direction)
        length = size / (direction @ moved)
        x = x + length * direction
        residual = residual - length * moved
        size, before = residual @ residual, size
        direction = residual + size / before * direction
    return x


def _directions(
    rows: Sequence[torch.Tensor], diagonal: float, gradient: torch.Tensor, count: int
) -> Iterator[torch.Tensor]:
    """Yield the step (P,) of each damping, for sums over the `count` images of all processes."""
    step = torch.zeros_like(gradient)
    for damping in sorted(DAMPING, reverse=True):

        def product(v: torch.Tensor, damping: float = damping) -> torch.Tensor:
            result = torch.zeros_like(v)
            for part in rows:
                result += (part.mT @ (part @ v.to(part))).cpu().double()
            distributed.add_up(result)
            return result / count + damping * diagonal * v

        step = _solve(product, -gradient / count, step)
        yield step


@dataclass(slots=True)
class _Judge:
    """The held-out images of this process with the dense network's log-probabilities (N, K)."""

    batches: list[tuple[torch.Tensor, torch.Tensor]]

    def divergences(self, model: nn.Module) -> torch.Tensor:
        """Return the KL divergence (N,) of each image."""
        parts = [divergences(model(images), wanted) for images, wanted in self.batches]
        return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean over the images of all processes, and its standard error."""
    sums = torch.stack([torch.tensor(float(len(values))).double(), values.sum(), values.square().sum()])
    distributed.add_up(sums)
    count, total, squares = sums.tolist()
    count = max(count, 1.0)
    variance = max(0.0, squares / count - (total / count) ** 2)
    return total / count, (variance / max(count - 1, 1.0)) ** 0.5


@torch.no_grad()
def tune(
    dense: nn.Module,
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch_size: int,
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> list[float]:
    """Move the scales and shifts of `model`, in place, towards the dense network's outputs.

    Args:
        dense: The network before the cut.
        model: The same network cut and repaired; both end on `device` in eval mode.
        split: Images; every `HELD_OUT`-th only chooses and checks.
        preprocessing: How the networks want their images.
        device: Where to compute.
        batch_size: Images that run at once, with gradients.
        seed: Of the random rows.
        on_images: Called with the count of images that are done.

    Returns:
        The divergence on the held-out images before the first step and after every step taken; nothing where there
        are too few images for the scales and shifts, or none of these.
    """
    dense.to(device).eval()
    model.to(device).eval()
    order = torch.arange(len(split))
    used = order[order % HELD_OUT != HELD_OUT - 1]
    first, _ = next(iter(split.take(order[:SPREAD_IMAGES]).batches(SPREAD_IMAGES, preprocessing)))
    knobs = find_knobs(model, first.to(device))
    parameters = 2 * sum(knob.channels for knob in knobs)
    used = used[: ROW_BYTES // (4 * max(1, parameters)) * distributed.size()]
    if not parameters or len(used) < LEAST_SHARE * parameters:
        return []
    judge = _Judge([])
    held = split.take(order[HELD_OUT - 1 :: HELD_OUT][: HELD_BYTES // first[0].nbytes])
    for images, _ in shared_batches(held, inference_batch(device), preprocessing):
        judge.batches.append((images.to(device), dense(images.to(device)).float().log_softmax(1)))
    places = distributed.share(len(used), batch_size)
    mine, known = split.take(used[places]), list[torch.Tensor]()
    generator = torch.Generator().manual_seed(seed)  # the signs of an image do not depend on who has it

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield this process's batches; the dense network and the signs are asked for once."""
        signs: list[torch.Tensor] = []
        for number, (images, _) in enumerate(mine.batches(batch_size, preprocessing)):
            seen = images.to(device)
            if number == len(known):
                with torch.no_grad():
                    known.append(dense(seen).float().softmax(1))
                if not signs:
                    shape = (len(used), known[0].shape[1])
                    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
                    signs = list(torch.split(2 * drawn[places] - 1, batch_size))
            yield seen, known[number], signs[number][: len(seen)] if signs else None
            if on_images is not None:
                on_images(len(images) * distributed.size())
        share_unreadable(mine)

    return _steps(model, knobs, judge, batches, len(used))


def _steps(
    model: nn.Module,
    knobs: Sequence[Knob],
    judge: _Judge,
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]],
    count: int,
) -> list[float]:
    """Take the steps over `count` images of all processes; return the held-out divergence before and after each."""
    current = judge.divergences(model)
    found, rows, diagonal = [_mean(current)[0]], list[torch.Tensor](), 0.0
    for step in range(STEPS):
        own, gradient = slopes_of(model, knobs, batches())
        if not step:
            rows = own
            squares = torch.tensor(sum(float(r.square().sum()) for r in rows), dtype=torch.float64)
            distributed.add_up(squares)
            diagonal = float(squares) / count / len(gradient)
        distributed.add_up(gradient)
        better = _best(model, knobs, judge, current, _directions(rows, diagonal, gradient, count))
        if better is None:
            break
        current = better
        found.append(_mean(current)[0])
    return found


def _best(
    model: nn.Module,
    knobs: Sequence[Knob],
    judge: _Judge,
    current: torch.Tensor,
    directions: Iterator[torch.Tensor],
) -> torch.Tensor | None:
    """Take the best of the steps and return the divergences (N,) after it, or None where none is sure to help."""
    before = [(knob.module.weight.clone(), knob.module.bias.clone()) for knob in knobs]
    best: tuple[float, torch.Tensor, torch.Tensor] | None = None
    for direction in directions:
        for length in LENGTHS:
            _move(knobs, before, length * direction)
            values = judge.divergences(model)
            fall, error = _mean(current - values)
            if fall > CERTAIN * error and (best is None or fall > best[0]):
                best = fall, length * direction, values
    _move(knobs, before, torch.zeros(2 * sum(k.channels for k in knobs)) if best is None else best[1])
    return None if best is None else best[2]


def _move(
    knobs: Sequence[Knob], before: Sequence[tuple[torch.Tensor, torch.Tensor]], step: torch.Tensor
) -> None:
    parts = iter(torch.split(step, [n for knob in knobs for n in (knob.channels,) * 2]))
    for knob, (weight, bias) in zip(knobs, before, strict=True):
        knob.module.weight.copy_(weight)
        knob.module.bias.copy_(bias)
        knob.move(next(parts), next(parts))
