"""How the command line shows an exported file: what was measured of it, and of int8 beside float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from se_prune import text
from se_prune_cli.tables import Table

if TYPE_CHECKING:
    from se_prune.results import Exported, Int8, LayerNoise

#: Layers of an int8 file that are shown, the noisiest first.
SHOWN_LAYERS = 12


def checked(item: Exported) -> str:
    """Return how a file agrees with the torch network, or why nobody knows."""
    if item.max_abs_diff is None or item.top1_agreement is None:
        return item.note
    return (
        f"largest difference {text.tiny(item.max_abs_diff)}, same top-1 on {text.percent(item.top1_agreement)} of "
        f"{item.images_checked} images"
    )


def exported_rows(item: Exported) -> Table:
    """Return size, parity and latency of a file."""
    columns = ["file", "bytes", "input", "largest difference", "same top-1", "latency, batch 1, 1 thread"]
    row = [
        ", ".join(item.files),
        text.file_size(item.bytes),
        item.input,
        text.MISSING if item.max_abs_diff is None else text.tiny(item.max_abs_diff),
        text.MISSING if item.top1_agreement is None else text.percent(item.top1_agreement),
        text.MISSING if item.latency_ms is None else f"{item.latency_ms:.2f} ms",
    ]
    return columns, [row]


def int8_rows(item: Exported, int8: Int8) -> Table:
    """Return int8 beside float."""
    columns = ["", "top-1 on test images", "size", "latency, batch 1, 1 thread"]
    accuracies = [text.MISSING if a is None else text.percent(a, 2) for a in (int8.top1_float, int8.top1)]
    return columns, [
        ["float", accuracies[0], text.file_size(int8.float_bytes), f"{int8.float_latency_ms:.2f} ms"],
        [
            "int8",
            accuracies[1],
            f"{text.file_size(item.bytes)} ({int8.size_ratio:.2f} ×)",
            f"{item.latency_ms:.2f} ms ({int8.latency_ratio:.2f} ×)",
        ],
    ]


def noise_rows(layers: tuple[LayerNoise, ...]) -> Table:
    """Return the layers that cost most in int8, and all that stay in float."""

    def decibel(value: float | None) -> str:
        return text.MISSING if value is None else f"{value:.1f} dB"

    worst = sorted(layers, key=lambda n: (not n.kept_float, n.alone_db is None, n.alone_db or 0.0))
    return ["layer", "kind", "output, this layer alone in int8", "its own output", "in the file"], [
        [n.layer, n.kind, decibel(n.alone_db), decibel(n.inside_db), "float" if n.kept_float else "int8"]
        for n in worst[:SHOWN_LAYERS]
    ]
