"""OpenVINO: an `.xml` with its `.bin`, made of the ONNX model; int8 by NNCF.

NNCF's overflow fix keeps weights in 7 bits, so that nothing saturates on CPUs without VNNI. Activations keep the whole
range seen in calibration: the mean of the images' ranges, NNCF's own choice, cuts off the few large values of gated
channels (17.6 dB against 26.9 dB of the logits of SE-MobileNet at half of its MACs, `reports/int8.md`). Class names and
preprocessing are the model's runtime information `se_prune`, as JSON. Both packages would send usage data through
openvino-telemetry; it is not imported. The packages are imported inside functions only.

Shapes: N images.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from se_prune.errors import SePruneError, first_line
from se_prune.export.base import Run, Subject, Target, quiet
from se_prune.export.onnx import model_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.results import LayerNoise

KEY = "se_prune"
TELEMETRY = "openvino_telemetry"


def write(subject: Subject, path: Path, int8: bool) -> tuple[LayerNoise, ...]:
    """Write `path` and the `.bin` beside it.

    Raises:
        SePruneError: OpenVINO or NNCF cannot convert the network.
    """
    import openvino

    source = path.with_suffix(".onnx")
    source.write_bytes(model_of(subject).SerializeToString())
    try:
        model = openvino.Core().read_model(source)
        if int8:
            model = _int8(model, subject)
        model.set_rt_info(json.dumps(subject.metadata()), [KEY])
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise SePruneError(f"OpenVINO cannot convert {subject.arch} ({first_line(error)}).") from error
    return ()


def _int8(model: Any, subject: Subject) -> Any:
    with without_telemetry(), quiet("nncf"):
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        images = subject.calibration.numpy()
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            return nncf.quantize(
                model,
                nncf.Dataset([images[i : i + 1] for i in range(len(images))]),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                advanced_parameters=AdvancedQuantizationParameters(
                    overflow_fix=OverflowFix.ENABLE,
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                ),
            )


def compiled(source: Path | bytes, threads: int, size: Sequence[int] | None = None, **settings: Any) -> Any:
    """Compile a file, or the content of an ONNX file, for the CPU, in float32 where nothing is int8.

    Args:
        source: The model.
        threads: CPU threads.
        size: The size of its one input (N, …), where it is to be fixed; any number of images where None.
        **settings: Further settings of the runtime.
    """
    with without_telemetry():
        import openvino

    core = openvino.Core()
    model = core.read_model(source)
    if size is not None:
        model.reshape(list(size))
    usual = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # a thread bound to a processor waits there for other programs
    }
    return core.compile_model(model, "CPU", {**usual, **settings})


def open_file(path: Path, subject: Subject, threads: int) -> Run:
    """Return what runs a pair of files."""
    del subject  # the file knows all
    network = compiled(path, threads)

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.array(network(images)[0])

    return run


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Keep openvino-telemetry from being imported; OpenVINO and NNCF go on without it."""
    had = TELEMETRY in sys.modules
    if not had:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not had:
            del sys.modules[TELEMETRY]


OPENVINO = Target(
    name="openvino",
    suffix=".xml",
    others=(".bin",),
    packages=("openvino",),
    install="pip install 'se-prune[openvino]'",
    importing=without_telemetry,
    write=write,
    open=open_file,
    takes_int8=True,
    int8_packages=("nncf",),
)
