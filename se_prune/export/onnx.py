"""ONNX: torch's dynamo exporter, opset 18, a dynamic batch, checked and timed in onnxruntime.

The output is the logits; a network whose own ONNX file ended with a softmax or sigmoid gets that back. The packages
onnx, onnxscript and onnxruntime are imported inside functions only.

Shapes: N images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from se_prune.errors import SePruneError, first_line
from se_prune.files import whole_file
from se_prune.records import ArtifactHeader
from se_prune.results import Exported
from se_prune.schema import to_dict, to_json
from se_prune.zoo.registry import shown
from se_prune.zoo.steps import WithFinal, final_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from se_prune.artifact import Network

OPSET = 18
INPUT, OUTPUT, SCORES = "images", "logits", "probabilities"
METADATA_PREFIX = "se_prune."
#: Largest allowed difference of a logit, relative to the largest logit (or to 1, if all are smaller).
TOLERANCE = 1e-3
CHECK_BATCH = 32
WARMUP, TIMED_RUNS = 5, 50
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
INSTALL = "pip install onnx onnxscript onnxruntime"


def export_onnx(network: Network, output: Path, images: torch.Tensor) -> Exported:
    """Write a network as one ONNX file that says how to preprocess images and what its classes are called.

    Args:
        network: The network and its header; a copy on the CPU in eval mode and float32 is exported.
        output: The `.onnx` file.
        images: Preprocessed real images (N, C, H, W).

    Returns:
        The largest difference of the logits and the share of equal top-1 classes over the images, at batch 1
        (the first image) and in batches of up to 32; the median latency at batch 1 on one CPU thread.

    Raises:
        SePruneError: A package is missing, torch cannot convert the network, or the file's logits differ
            from the network's by more than `TOLERANCE`; no file is left behind.
    """
    _require_packages()
    module = _as_filed(copy.deepcopy(network.module).cpu().float().eval())
    images = images.detach().cpu().float()
    arch = network.header.arch.ref
    model = _convert(module, images, arch)
    _drop_exporter_notes(model)
    _add_metadata(model, network.header)
    with whole_file(output) as temporary:
        temporary.write_bytes(_checked_bytes(model, arch))
        opened = session(temporary)
        difference, agreement = _parity(module, opened, images, arch)
        return Exported(
            target="onnx",
            output=str(output),
            bytes=temporary.stat().st_size,
            max_abs_diff=difference,
            top1_agreement=agreement,
            images_checked=len(images),
            latency_ms=_latency_ms(opened, images[:1].numpy()),
        )


def onnx_bytes(network: Network, images: torch.Tensor) -> bytes:
    """Return the ONNX file of a network, to be timed: not compared with torch, and without its metadata.

    Args:
        network: A copy on the CPU in eval mode and float32 is converted.
        images: Any images (N, C, H, W) of its input size.

    Raises:
        SePruneError: A package is missing, or torch cannot convert the network.
    """
    _require_packages()
    module = _as_filed(copy.deepcopy(network.module).cpu().float().eval())
    return bytes(_convert(module, images.detach().cpu().float(), network.header.arch.ref).SerializeToString())


def _as_filed(module: nn.Module) -> nn.Module:
    """Return the network with what its own ONNX file ended with, such as a softmax; any other as it is."""
    return module if final_of(module) == "none" else WithFinal(module).eval()


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SePruneError(
            f"exporting to ONNX needs a package that is missing ({error}): {INSTALL}"
        ) from error


def _convert(module: nn.Module, images: torch.Tensor, arch: str) -> Any:
    """Return the ONNX ModelProto of a module; the example has two images, because 1 would become a constant.

    Raises:
        SePruneError: An operation has no ONNX form, or the batch size is fixed inside the network.
    """
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT if final_of(module) == "none" else SCORES],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise SePruneError(
            f"torch cannot convert {arch} to ONNX ({first_line(error.__cause__ or error)}); run the network through "
            "torch.export.export to see which operation is in the way, and replace it."
        ) from error
    assert program is not None, "the dynamo exporter returns a program"
    return program.model_proto


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide what the exporter says about itself; errors are still raised."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module=r"(torch|onnx_ir|onnxscript|copyreg)\b"
        )
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"(torch|onnx_ir|onnxscript|copyreg)\b"
        )
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _drop_exporter_notes(model: Any) -> None:
    """Remove what the exporter notes on every node: stack traces with the paths of this machine, mostly."""
    graphs = [model.graph]
    holders: list[Any] = [model, *model.functions]
    nodes = [node for function in model.functions for node in function.node]
    while graphs:
        graph = graphs.pop()
        holders += [graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
        nodes += graph.node
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    for holder in [*holders, *nodes]:
        del holder.metadata_props[:]
        holder.ClearField("doc_string")


def _add_metadata(model: Any, header: ArtifactHeader) -> None:
    """Say in the model's metadata what network it is and how to feed it; values are JSON."""
    preprocessing = to_dict(header.preprocessing)
    values = {
        "arch": to_json(shown(header.arch)),
        "classes": json.dumps(header.classes),
        **{key: json.dumps(preprocessing[key]) for key in ("input_size", "mean", "std")},
    }
    for key, value in values.items():
        model.metadata_props.add(key=METADATA_PREFIX + key, value=value)


def _checked_bytes(model: Any, arch: str) -> bytes:
    """Return the serialised model after onnx's own checker has passed it with shape inference."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise SePruneError(
            f"the ONNX model of {arch} is not valid ({first_line(error)}); update the packages: {INSTALL} --upgrade"
        ) from error


def session(source: Path | bytes, threads: int = 1, profile: Path | None = None) -> Any:
    """Open a file, or its content, in onnxruntime on the CPU.

    Args:
        source: The ONNX model.
        threads: CPU threads; one, as an edge device would run it at its simplest, unless told otherwise.
        profile: The beginning of the path to which every operation's time is written; None for no profile.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    model = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _logits(session: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the output (N, K), logits or probabilities, of images (N, C, H, W)."""
    return np.asarray(session.run(None, {INPUT: images})[0])


@torch.no_grad()
def _parity(module: nn.Module, session: Any, images: torch.Tensor, arch: str) -> tuple[float, float]:
    """Return the largest difference of the logits, and the share of images with the same top-1 class.

    A single image is checked once more as a batch of two, so that the dynamic batch is always exercised.

    Raises:
        SePruneError: The difference is above the tolerance, or not a number.
    """
    batches = list(torch.split(images, CHECK_BATCH)) if len(images) > 1 else [images.repeat(2, 1, 1, 1)]
    expected = [module(batch).numpy() for batch in batches]
    actual = [_logits(session, batch.numpy()) for batch in batches]
    single = np.abs(module(images[:1]).numpy() - _logits(session, images[:1].numpy())).max()
    differences = [np.abs(e - a).max() for e, a in zip(expected, actual, strict=True)]
    difference = float(np.max([single, *differences]))
    allowed = TOLERANCE * max(1.0, float(max(np.abs(e).max() for e in expected)))
    if not difference <= allowed:  # also refuses NaN
        raise SePruneError(
            f"the ONNX file of {arch} differs from the torch network by {difference:.2g} on {len(images)} images "
            f"(allowed: {allowed:.2g}), so it was not kept; run `se-prune evaluate` to see that the network itself "
            "gives finite and repeatable outputs."
        )
    same = [(e.argmax(1) == a.argmax(1)) for e, a in zip(expected, actual, strict=True)]
    return difference, float(np.concatenate(same).mean())


def _latency_ms(session: Any, image: NDArray[np.float32]) -> float:
    """Return the median milliseconds of one image (1, C, H, W) after warm-up."""
    times = []
    for _ in range(WARMUP + TIMED_RUNS):
        start = time.perf_counter()
        _logits(session, image)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[WARMUP:])
