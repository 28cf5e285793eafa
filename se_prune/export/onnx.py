"""ONNX: torch's dynamo exporter, opset 18, a dynamic batch, checked and timed in onnxruntime.

The output is the logits; a network whose own ONNX file ended with a softmax or sigmoid gets that back. The packages
onnx, onnxscript and onnxruntime are imported inside functions only.

Shapes: N images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import INPUT, Run, Subject, Target, subject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.artifact import Network
    from se_prune.results import LayerNoise

OPSET = 18
METADATA_PREFIX = "se_prune."
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install onnx onnxscript onnxruntime"


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write a network as one ONNX file that says how to preprocess images and what its classes are called.

    Returns:
        For int8, the noise of every layer.

    Raises:
        SePruneError: torch cannot convert the network, or the model is not valid.
    """
    model = model_of(subject)
    layers: tuple[LayerNoise, ...] = ()
    if int8:
        from se_prune.export.qdq import quantise

        model, layers = quantise(model, subject)
    _add_metadata(model, subject)
    path.write_bytes(_checked_bytes(model, subject.arch))
    return layers


def model_of(subject: Subject) -> Any:
    """Return the ONNX ModelProto of a network, without the exporter's notes.

    Raises:
        SePruneError: torch cannot convert it.
    """
    model = _convert(subject)
    _drop_exporter_notes(model)
    return model


def onnx_bytes(network: Network, images: torch.Tensor) -> bytes:
    """Return the ONNX file of a network, to be timed: not compared with torch, and without its metadata.

    Args:
        network: A copy on the CPU in eval mode and float32 is converted.
        images: Any images (N, C, H, W) of its input size.

    Raises:
        SePruneError: A package is missing, or torch cannot convert the network.
    """
    ONNX.require_packages()
    return bytes(_convert(subject(network, images)).SerializeToString())


def _convert(subject: Subject) -> Any:
    """Return the ONNX ModelProto of a module; the example has two images, because 1 would become a constant.

    Raises:
        SePruneError: An operation has no ONNX form, or the batch size is fixed inside the network.
    """
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                subject.module,
                (subject.example(2),),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[subject.output],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise SePruneError(
            f"torch cannot convert {subject.arch} to ONNX ({first_line(error.__cause__ or error)}); run the network "
            "through torch.export.export to see which operation is in the way, and replace it."
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


def _add_metadata(model: Any, subject: Subject) -> None:
    """Say in the model's metadata what network it is and how to feed it; values are JSON."""
    for key, value in subject.metadata().items():
        model.metadata_props.add(key=METADATA_PREFIX + key, value=json.dumps(value))


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


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a file of ours."""
    del subject  # the file knows all
    opened = session(path, threads)

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(opened.run(None, {INPUT: images})[0])

    return run


ONNX = Target(
    name="onnx",
    suffix=".onnx",
    packages=PACKAGES,
    install=INSTALL,
    write=write,
    open=open_file,
    takes_int8=True,
)
