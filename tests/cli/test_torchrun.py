"""Commands as torchrun starts them: two processes that speak and write once, and end together."""

import json
import shutil
from pathlib import Path

import pytest

from se_prune.artifact import load
from tests.ranks import start_two
from tests.tiny import png_folder

ARCH = "zoo:se_mobilenet_x025"
SIZE = ["--input-size", "1,16,16", "--mean", "0.5", "--std", "0.25"]


def together(folder: Path, *arguments: str) -> tuple[list[int], list[str], list[str]]:
    """Run a command in two processes; return their exit codes, stdout and stderr."""
    started = start_two(["-m", "se_prune_cli", *arguments], folder)
    outputs = [process.communicate(timeout=300) for process in started]
    return [process.returncode for process in started], [o for o, _ in outputs], [e for _, e in outputs]


@pytest.mark.slow
def test_commands_speak_and_write_once_and_end_together(tmp_path):
    png_folder(tmp_path / "data", per_class=10)
    for image in sorted((tmp_path / "data").rglob("*.png")):
        for number in (10, 20, 30):
            shutil.copy(image, image.with_stem(f"{int(image.stem) + number}"))
    data = ["--data", "data", "--workers", "0", "--device", "cpu"]
    train = ["train", "--arch", ARCH, *data, *SIZE, "--epochs", "2", "--batch-size", "16", "--json"]
    codes, out, errors = together(tmp_path, *train, "-o", "net.safetensors")
    assert codes == [0, 0], errors
    assert json.loads(out[0])["n"] == 80
    assert "train zoo:se_mobilenet_x025" in errors[0]
    assert (out[1], errors[1]) == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "net.safetensors", "net.training.csv"]
    steps = [line.split(",")[0] for line in (tmp_path / "net.training.csv").read_text().splitlines()]
    assert steps == ["step", "5", "10"]
    assert load(tmp_path / "net.safetensors").header.history[-1].details["n"] == 80

    # the second process evaluates images 64 to 79, and meets a damaged one; the first ends as well, and says nothing
    (tmp_path / "data" / "val" / "bee" / "9.png").write_bytes(b"damaged")
    codes, out, errors = together(tmp_path, "evaluate", "net.safetensors", *data)
    assert codes == [1, 1]
    assert "error:" not in errors[0]
    assert errors[1].count("error:") == 1
    assert "bee/9.png cannot be read" in errors[1]


def test_commands_for_one_process_say_so_once(tmp_path):
    codes, _, errors = together(tmp_path, "bench", "zoo:se_resnet20")
    assert sorted(codes) == [2, 2]
    assert "".join(errors).count("error:") == 1
    assert "`se-prune bench` runs in one process: start it without torchrun" in "".join(errors)
