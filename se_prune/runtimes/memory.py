"""Peak memory of a network in a runtime: a process of its own opens it, runs it, and reports.

`python -m se_prune.runtimes.memory RUNTIME FILE N,C,H,W THREADS` prints the bytes; FILE is an ONNX file or an artifact.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

from se_prune.errors import SePruneError

RUNS = 3
SECONDS = 600


def peak_memory(runtime: str, file: Path, input_size: tuple[int, int, int], batch: int, threads: int) -> int:
    """Return the bytes of resident memory that running a network takes, above a process that only loaded the runtime.

    Weights, activations and the runtime's own buffers while it runs; what opening the file took and gave back is left
    out where the system can tell (Linux).

    Raises:
        SePruneError: The process ended without an answer; the message holds its last line.
    """
    size = ",".join(map(str, (batch, *input_size)))
    command = [sys.executable, "-W", "ignore", "-m", "se_prune.runtimes.memory", runtime, str(file), size]
    try:
        ended = subprocess.run(  # noqa: S603 - our own module and our own files
            [*command, str(threads)], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        return int(json.loads(ended.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        told = "no answer in time" if late else (ended.stderr.strip().splitlines() or ["no answer"])[-1]
        raise SePruneError(
            f"the memory of {file.name} in {runtime} could not be measured ({told}); "
            "leave it out with --no-memory."
        ) from error


def measure(runtime: str, file: Path, size: tuple[int, ...], threads: int) -> int:
    """Return the bytes, of this process."""
    import torch

    from se_prune import artifact
    from se_prune.runtimes.base import Source, require_runtime

    chosen = require_runtime(runtime)
    torch.set_num_threads(threads)
    images = torch.zeros(size)
    importlib.import_module(chosen.package)  # before the baseline is taken
    before = resident()
    source: Source = file if chosen.form == "onnx" else artifact.load(file).module.eval()
    run = chosen.open(source, images, threads)
    forget_peak()
    for _ in range(RUNS):
        run()
    return max(0, resident(peak=True) - before)


def resident(*, peak: bool = False) -> int:
    """Return this process's resident bytes, now or at most."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        return next(
            1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)
        )
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def forget_peak() -> None:
    """Let the peak begin anew, where the system can."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def main() -> None:
    """Measure what the command line names."""
    runtime, file, size, threads = sys.argv[1:5]
    shape = tuple(int(side) for side in size.split(","))
    sys.stdout.write(f"{measure(runtime, Path(file), shape, int(threads))}\n")


if __name__ == "__main__":
    main()
