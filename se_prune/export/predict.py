"""Classify images with an exported network: needs numpy and the file's runtime, and Pillow for PNG, JPEG and the like.

    python predict.py net.onnx images.npy photo.png …

Written beside an export by `se-prune export --runner`; it knows nothing of se-prune or torch. Class names and
preprocessing come from the export itself. Files of images: .npy and idx (plain or .gz) with bytes of shape (N, H, W),
(N, H, W, C) or (N, C, H, W); .ppm and .pgm; anything else is opened with Pillow, its shorter side resized and the
middle cropped. Runtimes: onnxruntime (.onnx), openvino (.xml), ai-edge-litert
(.tflite), ncnn (.param).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: Share of the resized image's sides that the crop keeps.
CROP = 0.875
#: The first four bytes of a NetPBM file, grey and colour.
NETPBM = {b"P5": 1, b"P6": 3}
Run = Callable[[Any], Any]


def open_network(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """Return what runs a file on images, and what is known of it."""
    kinds = {".onnx": _onnx, ".xml": _openvino, ".tflite": _litert, ".param": _ncnn}
    if path.suffix not in kinds:
        sys.exit(f"error: {path} is none of the files that this program runs: {', '.join(kinds)}.")
    if not path.is_file():
        sys.exit(f"error: there is no file {path}.")
    try:
        return kinds[path.suffix](path, threads)
    except ImportError as error:
        sys.exit(f"error: {path.suffix} files need a package that is missing ({error}); pip install it.")


def _beside(path: Path) -> dict[str, Any]:
    notes = path.with_suffix(".json")
    if not notes.is_file():
        sys.exit(f"error: {notes} is missing, which was written with {path.name}; copy both.")
    return dict(json.loads(notes.read_text(encoding="utf-8")))


def _onnx(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    known = {
        k.removeprefix("se_prune."): json.loads(v) for k, v in notes.items() if k.startswith("se_prune.")
    }
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0], known


def _openvino(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would send usage data
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    known = json.loads(model.get_rt_info(["se_prune"]).astype(str))
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda images: np.array(compiled(images)[0]), known


def _litert(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(str(path), num_threads=threads)
    network.allocate_tensors()
    [source], [target] = network.get_input_details(), network.get_output_details()

    def one(image: Any) -> Any:
        network.set_tensor(source["index"], image[None])
        network.invoke()
        return network.get_tensor(target["index"])[0]

    return lambda images: np.stack([one(image) for image in images]), _beside(path)


def _ncnn(path: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute, net.opt.use_fp16_storage = threads, False, False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))

    def one(image: Any) -> Any:
        with net.create_extractor() as work:
            work.input("in0", ncnn.Mat(np.ascontiguousarray(image)).clone())
            return np.array(work.extract("out0")[1])

    return lambda images: np.stack([one(image) for image in images]), _beside(path)


def read_images(path: Path, size: tuple[int, int, int]) -> Any:
    """Return a file's images as bytes (N, C, H, W)."""
    try:
        images = _arrays(path, size[0])
        if images is None:
            return _with_pillow(path, size)
    except (OSError, ValueError, struct.error) as error:
        sys.exit(f"error: {path} cannot be read ({error}).")
    if images.shape[1:] != size:
        sys.exit(f"error: {path} holds images of {images.shape[1:]}, the network takes {size}; resize them.")
    return images


def _arrays(path: Path, channels: int) -> Any:
    """Return the bytes of a file of arrays, (N, C, H, W); None for any other kind of file."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
    elif raw[:3] == b"\0\0\x08":
        shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    elif raw[:2] in NETPBM:
        if b"#" in raw[:40]:
            return None  # a comment in its head: Pillow reads it
        width, height, most = raw[2:60].split()[:3]
        if most != b"255":
            return None
        start = len(raw) - int(width) * int(height) * NETPBM[raw[:2]]
        values = np.frombuffer(raw, np.uint8, offset=start).reshape(1, int(height), int(width), -1)
    else:
        return None
    if values.dtype != np.uint8 or values.ndim not in {3, 4}:
        raise ValueError(
            f"bytes (N, H, W), (N, H, W, C) or (N, C, H, W) are wanted, it holds {values.dtype} {values.shape}"
        )
    if values.ndim == 3:
        values = values[:, None]
    elif values.shape[1] != channels:
        values = values.transpose(0, 3, 1, 2)
    return values


def _with_pillow(path: Path, size: tuple[int, int, int]) -> Any:
    try:
        from PIL import Image
    except ImportError:
        sys.exit(
            f"error: {path} needs Pillow to be read (pip install pillow), or give .npy, idx, .ppm or .pgm files."
        )
    channels, height, width = size
    with Image.open(path) as opened:
        image = opened.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        scale = max(math.floor(width / CROP) / image.width, math.floor(height / CROP) / image.height)
        image = image.resize(
            (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
            Image.Resampling.BILINEAR,
        )
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.uint8).reshape(1, height, width, channels).transpose(0, 3, 1, 2)


def prepared(images: Any, known: dict[str, Any]) -> Any:
    """Return bytes (N, C, H, W) as the file takes them."""
    if known["input"] == "uint8 nhwc":
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if known["input"] == "uint8 nchw":
        return np.ascontiguousarray(images)
    mean, std = (np.array(known[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    return (images.astype(np.float32) / 255 - mean) / std


def probabilities(output: Any, known: dict[str, Any]) -> Any:
    """Return probabilities (N, K) from what a file gives."""
    if known["output"] == "probabilities":
        return output
    powers = np.exp(output - output.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def answers(
    run: Run, known: dict[str, Any], paths: list[Path], batch: int, top: int
) -> Iterator[dict[str, Any]]:
    """Yield the best classes of every image."""
    classes = known["classes"]
    for path in paths:
        images = read_images(path, tuple(known["input_size"]))
        for start in range(0, len(images), batch):
            found = probabilities(run(prepared(images[start : start + batch], known)), known)
            for number, row in enumerate(found, start):
                best = np.argsort(-row, kind="stable")[:top]
                named = [
                    {
                        "class": classes[i] if i < len(classes) else str(i),
                        "label": int(i),
                        "probability": float(row[i]),
                    }
                    for i in best
                ]
                yield {"file": str(path), "image": number, "top": named}


def main() -> None:
    """Print a line for every image."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", type=Path, help="the exported file")
    parser.add_argument("images", type=Path, nargs="+", help="files of images")
    parser.add_argument("--top", type=int, default=1, help="classes to print for each image")
    parser.add_argument("--batch", type=int, default=32, help="images at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    run, known = open_network(asked.network, asked.threads)
    for found in answers(run, known, asked.images, max(1, asked.batch), max(1, asked.top)):
        if asked.json:
            print(json.dumps(found, ensure_ascii=False))
        else:
            best = ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in found["top"])
            print(f"{found['file']} [{found['image']}]: {best}")


if __name__ == "__main__":
    main()
