"""`predict.py` beside an export: the program that classifies images with it, without se-prune and torch."""

from __future__ import annotations

from pathlib import Path

from se_prune.errors import SePruneError, UsageError
from se_prune.files import write_text

NAME = "predict.py"
SOURCE = Path(__file__).with_name(NAME)
#: Targets whose runtimes need no torch.
TARGETS = ("onnx", "openvino", "litert", "ncnn")
MARK = "Written beside an export by `se-prune export --runner`"


def require_runner(target: str, output: Path) -> None:
    """Check that `predict.py` can be written beside an export, and is not somebody else's file.

    Raises:
        UsageError: The target's runtime needs torch itself, or does not run here.
        SePruneError: There is a `predict.py` that is not ours.
    """
    if target not in TARGETS:
        raise UsageError(
            f"--runner writes a program for {', '.join(TARGETS)}; the Python runtime of {target} needs torch."
        )
    place = output.with_name(NAME)
    if place.exists() and MARK not in place.read_text(encoding="utf-8", errors="replace"):
        raise SePruneError(
            f"{place} is there and not ours; move it, or write the export into another folder."
        )


def write_runner(output: Path) -> Path:
    """Write `predict.py` into the folder of an export and return its path."""
    place = output.with_name(NAME)
    write_text(place, SOURCE.read_text(encoding="utf-8"))
    return place
