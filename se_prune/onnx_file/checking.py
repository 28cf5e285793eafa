"""The proof of an import: the network gives what onnxruntime gives for the file, or the first operator is named.

Shapes: N images, C channels, H×W positions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from se_prune.errors import CheckpointError, SePruneError
from se_prune.onnx_file.converting import Converted
from se_prune.onnx_file.reading import INSTALL, Graph
from se_prune.zoo.steps import WithFinal

#: Largest difference, relative to the largest value of the same output.
TOLERANCE = 1e-4


def check_images(size: tuple[int, int, int], batch: int) -> list[torch.Tensor]:
    """Return batches (N, C, H, W) of noise, of smooth shapes as in photographs, and of flat grey with an edge."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *size, generator=generator)
    coarse = torch.randn(batch, size[0], 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size[1:], mode="bicubic", align_corners=False)
    edge = torch.full((batch, *size), -1.0)
    edge[:, :, size[1] // 3 :, : -(-size[2] // 2)] = 1.0
    return [noise, smooth, edge]


def require_equal(graph: Graph, converted: Converted, path: Path) -> float:
    """Compare the network with onnxruntime, alone and in a batch where the file allows one.

    Returns:
        The largest difference of the logits or of the file's own output, relative to the largest value.

    Raises:
        CheckpointError: onnxruntime cannot run the file, or the network differs; the operator is named.
        SePruneError: onnxruntime is missing.
    """
    wanted = list(dict.fromkeys([converted.logits, graph.output]))
    session = _session(graph, wanted, path)
    module = converted.module
    worst = 0.0
    batches = [graph.size[0]] if graph.size[0] else [1, 2]
    for batch in batches:
        for images in check_images(module.steps.input_size, batch):
            theirs = _run(session, graph, images, wanted)
            if theirs is None and batch > 1 and len(batches) > 1:
                break  # the file says that its batch is open, and fixes it inside
            if theirs is None:
                raise CheckpointError(f"{path}: onnxruntime cannot run it; export it again.")
            with torch.no_grad():
                ours = [module(images), WithFinal(module)(images)]
            gaps = [
                _relative(a, b) for a, b in zip((ours[0], ours[-1]), (theirs[0], theirs[-1]), strict=True)
            ]
            if not max(gaps) <= TOLERANCE:
                raise CheckpointError(_first_difference(graph, converted, images, path))
            worst = max(worst, *gaps)
    return worst


def _session(graph: Graph, outputs: Sequence[str], path: Path) -> Any:
    """Open the graph, as it was read and checked, with further values of it as outputs."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise SePruneError(
            f"opening an ONNX file needs a package that is missing ({error}): {INSTALL}"
        ) from error
    model = onnx.ModelProto.FromString(graph.model.SerializeToString())
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs if n != graph.output)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has exceptions of its own for every cause
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path}: onnxruntime cannot open it ({first}); export it again.") from error


def _run(session: Any, graph: Graph, images: torch.Tensor, outputs: Sequence[str]) -> list[Any] | None:
    """Return the outputs for some images; None where onnxruntime cannot compute them."""
    try:
        return list(session.run(list(outputs), {graph.images: images.numpy()}))
    except Exception:  # noqa: BLE001 - as above
        return None


def _relative(ours: torch.Tensor, theirs: Any) -> float:
    """Return the largest difference relative to the largest value of onnxruntime's; infinite for other shapes."""
    values = np.asarray(theirs)
    if tuple(ours.shape) != values.shape or not np.isfinite(values).all():
        return float("inf")
    scale = float(np.abs(values).max())
    return float(np.abs(ours.numpy() - values).max()) / max(scale, 1e-12)


def _first_difference(graph: Graph, converted: Converted, images: torch.Tensor, path: Path) -> str:
    """Return a sentence that names the first operator whose output differs."""
    names = list(dict.fromkeys(value for value, _ in converted.origins.values()))
    theirs = _run(_session(graph, names, path), graph, images, names)
    found = dict(zip(names, theirs or [], strict=False))
    with torch.no_grad():
        for step, made in converted.module.walk(images):
            value, op = converted.origins.get(step.name, ("", ""))
            if value in found and not (gap := _relative(made, found[value])) <= TOLERANCE:
                return (
                    f"{path}: the network differs from onnxruntime by {gap:.1e} from the operator {op} ({value}) on, "
                    f"and {TOLERANCE:.0e} of the largest value is allowed; nothing was done with it. Please report "
                    "the file."
                )
    return (
        f"{path}: the network's output differs from onnxruntime's, or is not finite; nothing was done with it. "
        "Please report the file."
    )
