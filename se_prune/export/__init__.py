"""Networks to files of edge runtimes; every file is checked against the torch network before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from se_prune.errors import DataError, UsageError, nearest
from se_prune.export import int8
from se_prune.export.base import (
    Measured,
    Pixels,
    Subject,
    Target,
    compare,
    latencies_ms,
    require_parity,
    size_of,
    subject,
)
from se_prune.export.coreml import COREML
from se_prune.export.executorch import EXECUTORCH
from se_prune.export.litert import LITERT
from se_prune.export.ncnn import NCNN
from se_prune.export.onnx import ONNX
from se_prune.export.openvino import OPENVINO
from se_prune.export.torch_export import TORCH
from se_prune.files import whole_files
from se_prune.results import Exported

if TYPE_CHECKING:
    from se_prune.artifact import Network
    from se_prune.data import Split

__all__ = ["TARGETS", "export", "require_target", "suffix_of"]

TARGETS: dict[str, Target] = {
    target.name: target for target in (ONNX, OPENVINO, EXECUTORCH, LITERT, COREML, NCNN, TORCH)
}


def export(
    network: Network,
    target: str,
    output: str | Path,
    images: torch.Tensor,
    *,
    pixels: Pixels | None = None,
    quantised: bool = False,
    calibration: torch.Tensor | None = None,
    test: Split | None = None,
    max_drop: float | None = None,
) -> Exported:
    """Write `network` for a runtime, check it on real images, and measure it; files appear whole or not at all.

    Args:
        network: The network with its header; it is copied, not changed.
        target: A key of `TARGETS`.
        output: The file to write.
        images: Real images (N, C, H, W), preprocessed as the header says; white noise misleads, because
            its logits lie far outside of what the network was trained for.
        pixels: Put the preprocessing into the file: bytes of this layout in, probabilities out.
        quantised: Write whole numbers of 8 bits. The file then differs from the network; its accuracy tells how much.
        calibration: Other real images, for the ranges of int8; the same where None.
        test: Test images on which an int8 file is compared with the float one.
        max_drop: Largest top-1 accuracy, a fraction, that int8 may lose on them; without, a loss above
            `int8.USUAL_DROP` is a warning.

    Raises:
        UsageError: The target is unknown, or does not take what was asked for.
        DataError: The images do not have the network's input size.
        DropError: int8 loses more than `max_drop`.
        SePruneError: A package is missing, the network cannot be converted, or the file does not compute
            what the network computes.
    """
    chosen = require_target(target, quantised=quantised, pixels=pixels)
    if quantised:
        int8.require_drop(max_drop, test)
    size = network.header.preprocessing.input_size
    for given in (images, calibration):
        if given is not None:
            _require_images(given, size)
    _require_place(chosen, Path(output))
    chosen.require_packages(int8=quantised)
    exported = subject(network, images, calibration=calibration, pixels=pixels)
    names = chosen.files(Path(output))
    with whole_files(names) as folder:
        written = folder / names[0].name
        if quantised:
            found = int8.write(chosen, exported, written, test=test, max_drop=max_drop)
        else:
            found = _write_float(chosen, exported, written)
        return Exported(
            target=target,
            output=str(output),
            bytes=size_of(chosen, written),
            files=tuple(map(str, names)),
            images_checked=0 if found.parity is None else len(images),
            input=str(exported.metadata()["input"]),
            max_abs_diff=None if found.parity is None else found.parity.difference,
            relative_diff=None if found.parity is None else found.parity.relative,
            top1_agreement=None if found.parity is None else found.parity.agreement,
            latency_ms=found.latency_ms,
            note=found.note,
            int8=found.int8,
        )


def _write_float(target: Target, exported: Subject, path: Path) -> Measured:
    """Write the files, and compare and time them where this machine can run them."""
    target.write(exported, path, False)
    reason = target.unverifiable()
    if reason is not None:
        return Measured(note=f"converted and saved, not verified: {reason}")
    run = target.open(path, exported, 1)
    parity = compare(exported, run)
    require_parity(parity, exported, target.name)
    [latency] = latencies_ms([run], exported.example(1))
    return Measured(parity=parity, latency_ms=latency, note=target.note)


def require_target(target: str, *, quantised: bool = False, pixels: Pixels | None = None) -> Target:
    """Return the export target of a name.

    Raises:
        UsageError: There is none, and the message lists all; or it takes no int8, or no bytes as its input.
    """
    if target not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise UsageError(
            f"there is no export target '{target}'{nearest(target, TARGETS)}; --to takes {known}."
        )
    chosen = TARGETS[target]
    for asked, able, option in (
        (quantised, "takes_int8", "--int8"),
        (pixels is not None, "takes_pixels", "--with-preprocessing"),
    ):
        if asked and not getattr(chosen, able):
            others = ", ".join(sorted(name for name, t in TARGETS.items() if getattr(t, able)))
            raise UsageError(f"--to {target} does not go with {option}; {option} goes with {others}.")
    return chosen


def _require_place(target: Target, output: Path) -> None:
    """Check the name of the main file, and that no file of others takes the name of a further one.

    Raises:
        UsageError: The main file ends otherwise, or a further one is there without the main one.
    """
    if target is not ONNX and output.suffix != Path(f"net{target.suffix}").suffix:
        raise UsageError(f"a file for {target.name} ends with {target.suffix}, got {output}; change -o.")
    for other in target.files(output)[1:]:
        if other.exists() and not output.exists():
            raise UsageError(
                f"the export would replace {other}, which belongs to something else, since there is no {output}; "
                "choose another name with -o."
            )


def suffix_of(target: str) -> str:
    """Return how the file of a target ends, such as `.onnx`."""
    return require_target(target).suffix


def _require_images(images: torch.Tensor, input_size: tuple[int, int, int]) -> None:
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != tuple(input_size):
        expected = ", ".join(str(size) for size in input_size)
        raise DataError(
            f"the export is checked on images of shape (N, {expected}) with N of at least 1, "
            f"got {tuple(images.shape)}; check --data and --input-size."
        )
