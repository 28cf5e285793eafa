"""LiteRT: a `.tflite` in float32 for XNNPACK, one image at a time, made by litert-torch.

Class names and preprocessing are a JSON file beside it. There is no int8: XNNPACK of ai-edge-litert 2.3 does not open
what ai-edge-quantizer 0.10 makes of a network with gates. The packages are imported inside functions only.

Shapes: N images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import Run, Subject, Target, one_by_one, quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise

LOGGERS = ("torch.utils._pytree", "torch.export", "absl")
#: Read by the native libraries once, when they are loaded: 2 leaves errors alone.
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write `path` and the `.json` beside it.

    Raises:
        SePruneError: litert-torch cannot convert the network.
    """
    assert not int8, "this target takes no int8"
    try:
        with importing():
            import litert_torch
        with quiet(*LOGGERS), contextlib.redirect_stdout(io.StringIO()):  # its progress
            converted = litert_torch.convert(subject.module, (subject.example(1),))
            path.write_bytes(converted.model_content())
    except Exception as error:  # the converter has exceptions of its own for every cause
        raise SePruneError(f"LiteRT cannot convert {subject.arch} ({first_line(error)}).") from error
    path.with_suffix(".json").write_text(json.dumps(subject.metadata()), encoding="utf-8")
    return ()


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a file, image by image."""
    from ai_edge_litert.interpreter import Interpreter

    del subject  # the file knows all
    with without_native_notes():
        interpreter = Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
    [source], [target] = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(target["index"]))

    return one_by_one(run)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Load the packages without what they and their libraries say about themselves."""
    had = os.environ.get(LOG_LEVEL)
    os.environ.setdefault(LOG_LEVEL, "2")
    try:
        with quiet(*LOGGERS), without_native_notes():
            yield
    finally:
        if had is None:
            del os.environ[LOG_LEVEL]


@contextlib.contextmanager
def without_native_notes() -> Iterator[None]:
    """Hide what native code writes to the second file descriptor, which Python's redirections do not reach."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


LITERT = Target(
    name="litert",
    suffix=".tflite",
    others=(".json",),
    packages=("litert_torch", "ai_edge_litert"),
    install="pip install 'se-prune[litert]'",
    importing=importing,
    write=write,
    open=open_file,
)
