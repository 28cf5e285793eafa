"""An ONNX file to a network of steps with its weights, equal to onnxruntime on the file itself."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from se_prune.artifact import Network
from se_prune.foreign import check_values, digest
from se_prune.onnx_file.checking import require_equal
from se_prune.onnx_file.converting import convert
from se_prune.onnx_file.nodes import NODES
from se_prune.onnx_file.reading import classes_of, input_size, preprocessing_of, read_graph
from se_prune.records import ArchSpec, ArtifactHeader, HistoryEntry
from se_prune.schema import to_json
from se_prune.zoo import registry
from se_prune.zoo.steps import LIBRARY

#: Says at level WARNING what was assumed of a file: how its images are normalised.
LOG = logging.getLogger(__name__)


def open_onnx(path: Path, *, asked: Sequence[int] | None = None, normalised: bool = False) -> Network:
    """Open an ONNX classifier, and compare it with onnxruntime before anything else.

    A last softmax or sigmoid is taken off, so that the module gives logits, and noted; an export puts it back.

    Args:
        path: The file.
        asked: (C, H, W) or (H, W) of `--input-size`, where the file leaves it open.
        normalised: Whether the caller knows mean and standard deviation; without, and without our own export's
            notes in the file, ImageNet's are assumed and a warning says so.

    Raises:
        CheckpointError: The file is broken or unsafe, holds an operator that is not read, or the network does not
            compute what onnxruntime computes; the message names the operator.
        UsageError: The size of its images is open and was not given.
        SePruneError: A package is missing.
    """
    graph = read_graph(path)
    size = input_size(graph, asked, path)
    converted = convert(graph, size, path, NODES)
    check_values(converted.module.state_dict(), path)
    difference = require_equal(graph, converted, path)
    preprocessing = preprocessing_of(graph, size)
    if preprocessing is None:
        spec = ArchSpec(ref=f"{LIBRARY}:", kwargs={"in_channels": size[0]})
        preprocessing = dataclasses.replace(registry.default_preprocessing(spec), input_size=size)
        if not normalised:
            LOG.warning(
                "%s does not say how its images are normalised; ImageNet's mean and deviation are assumed, and "
                "--mean and --std overrule them.",
                path,
            )
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem) or "network"
    final = converted.module.steps.final
    details = {
        "file": path.name,
        "sha256": digest(path),
        "onnxruntime_difference": difference,
        "final": final,
    }
    entry = HistoryEntry(stage="opened", details=details)
    header = ArtifactHeader(
        arch=ArchSpec(ref=f"{LIBRARY}:{name}", kwargs={"steps": to_json(converted.module.steps)}),
        preprocessing=preprocessing,
        classes=classes_of(graph, converted.classes),
        history=(entry,),
    )
    return Network(module=converted.module, header=header)
