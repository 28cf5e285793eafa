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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from se_prune import distributed
from se_prune.artifact import NORM_TYPES
from se_prune.data.source import share_unreadable, shared_batches
from se_prune.device import inference_batch
from se_prune.records import Preprocessing
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
#: Least spread of a channel, in whose units it is shifted, and how many images tell it.
LEAST_SPREAD, SPREAD_IMAGES = 1e-6, 16
#: Least images per scale or shift; with fewer nothing is tried.
LEAST_SHARE = 0.25
#: Bytes of the held-out images of all processes, at most.
HELD_BYTES = 1 << 28
#: Bytes of the images' rows (N, P) of one process; where they would take more, fewer images are used.
ROW_BYTES = 1 << 29


@dataclass(slots=True)
class _Knob:
    """A module whose channels y are scaled around their shift and moved: y + a·(y − β) + b·σ.

    Of a BN, y is what its own scale and shift give, whatever activation the same module puts behind them.
    """

    module: Any
    spread: torch.Tensor  # σ (C,)
    slopes: torch.Tensor | None = None  # of a, then of b: (N, 2·C), of the batch that runs
    leaves: list[torch.Tensor] = field(default_factory=list)  # where gradients end, of all knobs

    @property
    def channels(self) -> int:
        return len(self.module.weight)

    def watch(self) -> Any:
        """Watch what comes backwards, while the handle that is returned stands."""
        if isinstance(self.module, NORM_TYPES):
            return self.module.register_forward_pre_hook(self._before)
        return self.module.register_forward_hook(self._after)

    def _before(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Watch a BN's input, which BN keeps itself: its scale and shift are one of the input as well.

        With u = (x − μ)/√(σ² + ε), the slope of x is γ/√(σ² + ε) times that of y = γ·u + β. Of a scale of 0 it tells
        nothing, and such a shift stays.
        """
        seen = inputs[0].detach()

        def backwards(slope: torch.Tensor) -> None:
            moved, scaled = (t.flatten(2).sum(2) if t.ndim > 2 else t for t in (slope, slope * seen))
            factor = (module.running_var + module.eps).sqrt() / module.weight
            shift = torch.where(module.weight == 0, 0.0, factor * self.spread)
            self._add(scaled - moved * module.running_mean, moved * shift)

        return (self._watched(inputs[0], backwards), *inputs[1:])

    def _after(self, module: Any, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Watch a classifier's output."""
        seen = output.detach()

        def backwards(slope: torch.Tensor) -> None:
            self._add(slope * (seen - module.bias), slope * self.spread)

        return self._watched(output, backwards)

    def _add(self, scaled: torch.Tensor, moved: torch.Tensor) -> None:
        slopes = torch.cat([scaled, moved], 1)
        self.slopes = slopes if self.slopes is None else self.slopes + slopes

    def _watched(self, tensor: torch.Tensor, backwards: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return the same values, whose slope is told; a leaf where no other knob stands before."""
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
            self.leaves.append(tensor)
        own = tensor.view_as(tensor)  # others that read the tensor have slopes of their own
        own.register_hook(backwards)  # type: ignore[no-untyped-call]
        return own

    @torch.no_grad()
    def move(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Put a change (C,) of both into the weights."""
        weight, own = self.module.weight, scale.to(self.module.weight)
        weight.mul_((1 + own).view(-1, *(1,) * (weight.ndim - 1)))
        self.module.bias.add_(shift.to(own) * self.spread)


def _knobs(model: nn.Module, example: torch.Tensor) -> list[_Knob]:
    """Return what can be moved: BN with scale and shift, and the linear layer that gives the output.

    The spreads are those of the example.
    """
    found: list[_Knob] = []
    seen: dict[str, torch.Tensor] = {}
    spreads: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            wanted = (len(example), len(module.weight))
            if (
                not isinstance(output, torch.Tensor)
                or output.ndim not in {2, 4}
                or output.shape[:2] != wanted
            ):
                return
            seen[name] = output
            is_norm = isinstance(module, NORM_TYPES)
            spread = (inputs[0] if is_norm else output).transpose(0, 1).flatten(1).std(1)
            if is_norm:
                spread = spread * module.weight.abs() / (module.running_var + module.eps).sqrt()
            spreads[name] = spread.clamp_min(LEAST_SPREAD)

        return hook

    modules: dict[str, Any] = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (*NORM_TYPES, nn.Linear)) and m.weight is not None and m.bias is not None
    }
    handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, spread in spreads.items():
        if isinstance(modules[name], NORM_TYPES) or seen[name].data_ptr() == logits.data_ptr():
            found.append(_Knob(module=modules[name], spread=spread))
    return found


@contextmanager
def _turning(model: nn.Module, knobs: Sequence[_Knob]) -> Iterator[None]:
    """Let gradients reach the knobs of every image, and nothing else."""
    needed = [p for p in model.parameters() if p.requires_grad]
    handles = [knob.watch() for knob in knobs]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _rows(q: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return (diag q − qqᵀ)^½·ξ for probabilities and random signs ξ, both (N, K); its square has that mean."""
    root = q.sqrt() * signs
    return root - q * root.sum(1, keepdim=True)


def _slopes(
    model: nn.Module,
    knobs: Sequence[_Knob],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a random row (N, P) of the curvature per image, by batches, and the summed gradient (P,).

    A batch is images, the dense network's probabilities (N, K), and the signs (N, K) of the rows, without which it
    gives none.
    """
    rows: list[torch.Tensor] = []
    gradient = torch.zeros(sum(2 * knob.channels for knob in knobs), dtype=torch.float64)
    with _turning(model, knobs), torch.enable_grad():
        for images, wanted, signs in batches:
            leaves: list[torch.Tensor] = []
            for knob in knobs:
                knob.leaves = leaves
            logits = model(images).float()
            q = logits.detach().softmax(1)
            if signs is not None:
                row = _rows(q, signs.to(q))
                rows.append(_backwards(logits, row, knobs, leaves, again=True))
            slope = _backwards(logits, q - wanted, knobs, leaves, again=False)
            gradient += slope.double().sum(0).cpu()
    for knob in knobs:
        knob.slopes = None
        knob.leaves = []
    return rows, gradient


def _backwards(
    logits: torch.Tensor,
    slope: torch.Tensor,
    knobs: Sequence[_Knob],
    leaves: Sequence[torch.Tensor],
    *,
    again: bool,
) -> torch.Tensor:
    """Return what a slope (N, K) of the logits is of every scale and shift (N, P)."""
    for knob in knobs:
        knob.slopes = None
    torch.autograd.grad(logits, list(leaves), slope, retain_graph=again, allow_unused=True)
    return torch.cat(
        [
            logits.new_zeros(len(logits), 2 * knob.channels) if knob.slopes is None else knob.slopes
            for knob in knobs
        ],
        1,
    )


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
    knobs = _knobs(model, first.to(device))
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
    knobs: Sequence[_Knob],
    judge: _Judge,
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]],
    count: int,
) -> list[float]:
    """Take the steps over `count` images of all processes; return the held-out divergence before and after each."""
    current = judge.divergences(model)
    found, rows, diagonal = [_mean(current)[0]], list[torch.Tensor](), 0.0
    for step in range(STEPS):
        own, gradient = _slopes(model, knobs, batches())
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
    knobs: Sequence[_Knob],
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
    knobs: Sequence[_Knob], before: Sequence[tuple[torch.Tensor, torch.Tensor]], step: torch.Tensor
) -> None:
    parts = iter(torch.split(step, [n for knob in knobs for n in (knob.channels,) * 2]))
    for knob, (weight, bias) in zip(knobs, before, strict=True):
        knob.module.weight.copy_(weight)
        knob.module.bias.copy_(bias)
        knob.move(next(parts), next(parts))
