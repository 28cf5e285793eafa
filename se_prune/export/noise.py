"""Which layers pay for int8: the noise that each adds, and those that stay in float because it pays.

Every layer is tried alone in int8, which tells what it adds to the noise of the network's output. The worst ones are
then put back into float one after the other, as long as their weights are few, and kept there where the whole network's
noise falls.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.export.int8 import decibel
from se_prune.results import LayerNoise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.export.qdq import Candidate, Int8Form

#: Pixels of all images that the noise is measured on, and the least and largest number of images.
PIXELS, FEWEST, MOST = 2**18, 4, 64
#: Layers that may go back to float, the worst first.
TRIALS = 8
#: What a layer in float must win, in dB of the network's output, and the share of all weights that it may hold.
GAIN_DB, WEIGHT_SHARE = 0.5, 0.01


def choose(form: Int8Form, images: NDArray[Any]) -> tuple[set[int], tuple[LayerNoise, ...]]:
    """Return the places of the layers that stay in float, and the noise of every layer.

    Args:
        form: The calibrated graph.
        images: Images (N, …) that were not used for calibration.
    """
    images = images[: max(FEWEST, min(MOST, PIXELS // math.prod(images.shape[1:])))]
    exact = _run(form, form.model, images)
    every = {c.index for c in form.candidates}
    alone = {c.index: _noise(form, {c.index}, images, exact) for c in form.candidates}
    worst = sorted((c for c in form.candidates if _is_small(form, c)), key=lambda c: alone[c.index])
    kept: set[int] = set()
    best = _noise(form, every, images, exact)
    for candidate in worst[:TRIALS]:
        reached = _noise(form, every - kept - {candidate.index}, images, exact)
        if reached >= best + GAIN_DB:
            kept.add(candidate.index)
            best = reached
    inside = _inside(form, every - kept, images)
    layers = tuple(
        LayerNoise(
            layer=c.layer,
            kind=c.kind,
            inside_db=inside.get(c.settled),
            alone_db=_finite(alone[c.index]),
            kept_float=c.index in kept,
        )
        for c in form.candidates
    )
    return kept, layers


def _is_small(form: Int8Form, candidate: Candidate) -> bool:
    """Say whether a layer may stay in float: it holds few of the weights."""
    sizes = {c.index: form.weight_size(c) for c in form.candidates}
    return sizes[candidate.index] <= WEIGHT_SHARE * max(1, sum(sizes.values()))


def _run(form: Int8Form, model: Any, images: NDArray[Any]) -> NDArray[np.float32]:
    [source] = [value.name for value in model.graph.input]
    return np.asarray(form.session(model).run(None, {source: images})[0])


def _noise(form: Int8Form, chosen: set[int], images: NDArray[Any], exact: NDArray[np.float32]) -> float:
    """Return the signal-to-noise ratio of the output in dB with these layers in int8; infinite without noise."""
    ratio = decibel(exact, _run(form, form.build(chosen), images))
    return math.inf if ratio is None else ratio


def _inside(form: Int8Form, chosen: set[int], images: NDArray[Any]) -> dict[str, float | None]:
    """Return the signal-to-noise ratio of what every layer in int8 gives, in the whole network."""
    [source] = [value.name for value in form.model.graph.input]
    names = [
        c.settled for c in form.candidates if c.index in chosen and not c.last and c.settled in form.ranges
    ]
    if not names:
        return {}
    feeds = {source: images}
    exact = form.session(form.model, names).run(names, feeds)
    made = form.build(chosen)
    quantised = [f"{name}/dq" for name in names]
    found = form.session(made, quantised).run(quantised, feeds)
    return {name: decibel(a, b) for name, a, b in zip(names, exact, found, strict=True)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
