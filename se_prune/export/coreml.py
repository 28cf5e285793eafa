"""Core ML: an `.mlpackage` in float32, one image at a time; it can be written anywhere and run on macOS alone.

Class names and preprocessing are its metadata `se_prune`, as JSON. The package is imported inside functions only.

Shapes: N images.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import INPUT, Run, Subject, Target, one_by_one, quiet
from se_prune.export.torch_export import traced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise

KEY = "se_prune"


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write `path`, a folder.

    Raises:
        SePruneError: coremltools cannot convert the network.
    """
    assert not int8, "this target takes no int8"
    program = traced(subject, batch=1).run_decompositions({})
    try:
        with quiet("coremltools"), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            import coremltools

            model = coremltools.convert(
                program,
                inputs=[coremltools.TensorType(name=INPUT, shape=tuple(subject.example(1).shape))],
                outputs=[coremltools.TensorType(name=subject.output)],
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=coremltools.precision.FLOAT32,
            )
            model.user_defined_metadata[KEY] = json.dumps(subject.metadata())
            model.save(str(path))
    except Exception as error:  # coremltools has exceptions of its own for every cause
        raise SePruneError(f"coremltools cannot convert {subject.arch} ({first_line(error)}).") from error
    return ()


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a package, on macOS."""
    import coremltools

    del threads
    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(model.predict({INPUT: images})[subject.output])

    return one_by_one(run)


def elsewhere() -> str | None:
    """Return why this machine cannot run a package; None on macOS."""
    return None if sys.platform == "darwin" else f"Core ML runs on macOS only, and this is {sys.platform}"


COREML = Target(
    name="coreml",
    suffix=".mlpackage",
    packages=("coremltools",),
    install="pip install 'se-prune[coreml]'",
    write=write,
    open=open_file,
    takes_pixels=False,
    unverifiable=elsewhere,
    note="Core ML ran on as many threads as it chose itself",
)
