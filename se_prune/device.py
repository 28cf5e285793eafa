"""One choice of device for everything."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from se_prune import distributed
from se_prune.errors import UsageError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name; `auto` is cuda, then mps, then cpu. Each of several processes has its own GPU.

    Raises:
        UsageError: The device is unknown or not on this machine, or the processes cannot share it.
    """
    several = distributed.size() > 1
    if several and name not in {"auto", "cuda", "cpu"}:
        raise UsageError(f"--device {name} cannot be shared by several processes; use auto, cuda or cpu.")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank()) if several else torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() and not several else "cpu")
    if name == "cuda" and several:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # `meta` makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name} cannot be used here ({reason}); use auto, cuda, mps or cpu."
        ) from error
    return device


def inference_batch(device: torch.device) -> int:
    """Return how many images to run at once: small batches stay in a CPU's cache, large ones fill a GPU."""
    return 64 if device.type == "cpu" else 256


def processor() -> str:
    """Return the name of this machine's processor."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()
