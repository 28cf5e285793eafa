"""ncnn: a `.param` with its `.bin`, made of the ONNX model by pnnx; one image at a time.

The input blob is `in0` (C, H, W) of preprocessed floats, the output `out0`. Class names and preprocessing are a JSON
file beside it. The packages are imported inside functions only.

Shapes: N images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import SePruneError
from se_prune.export.base import Run, Subject, Target, one_by_one
from se_prune.export.onnx import model_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise

SECONDS = 600
SOURCE, TARGET = ("in0", "out0")


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write `path`, and the `.bin` and `.json` beside it.

    Raises:
        SePruneError: pnnx cannot convert the network.
    """
    import pnnx

    assert not int8, "this target takes no int8"
    work = path.parent / "pnnx"
    work.mkdir()
    (work / "net.onnx").write_bytes(model_of(subject).SerializeToString())
    size = ",".join(map(str, (1, *subject.images.shape[1:])))
    command = [pnnx.EXEC_PATH, "net.onnx", f"inputshape=[{size}]f32", "fp16=0"]
    try:
        ended = subprocess.run(  # noqa: S603 - the package's own program and our own file
            command, cwd=work, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        (work / "net.ncnn.bin").replace(path.with_suffix(".bin"))
        (work / "net.ncnn.param").replace(path)
    except subprocess.TimeoutExpired as error:
        raise SePruneError(f"pnnx did not convert {subject.arch} in {SECONDS} s.") from error
    except FileNotFoundError as error:
        told = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise SePruneError(f"pnnx cannot convert {subject.arch} ({told[:200]}).") from error
    path.with_suffix(".json").write_text(json.dumps(subject.metadata()), encoding="utf-8")
    return ()


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a pair of files, image by image, in float32.

    Raises:
        SePruneError: ncnn cannot read them.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise SePruneError(
            f"ncnn cannot read what pnnx made of {subject.arch}; one of its operations is unknown to it."
        )

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        with net.create_extractor() as extractor:
            extractor.input(SOURCE, ncnn.Mat(np.ascontiguousarray(images[0])).clone())
            failed, found = extractor.extract(TARGET)
            if failed:
                raise SePruneError(f"ncnn cannot run what pnnx made of {subject.arch} (code {failed}).")
            return np.array(found, np.float32).reshape(1, -1)

    return one_by_one(run)


NCNN = Target(
    name="ncnn",
    suffix=".ncnn.param",
    others=(".bin", ".json"),
    packages=("ncnn", "pnnx"),
    install="pip install 'se-prune[ncnn]'",
    write=write,
    open=open_file,
    takes_pixels=False,
)
