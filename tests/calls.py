"""Running `se-prune` in this process."""

import contextlib
import io
import json
import shlex
import sys
from unittest import mock

import pytest
from se_prune_cli import app

NET = "zoo:se_resnet20 --pretrained"


APPLY = f"apply {NET} --data data -o x.safetensors"


RECIPE = """
data = "data"
export = ["onnx"]
latency_rounds = 2
[model]
ref = "zoo:se_resnet20"
pretrained = true
[apply]
macs = 0.5
[finetune]
epochs = 1
"""


def call(line):
    """Run `se-prune LINE` in this process as the console script does; return (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["se-prune", *shlex.split(line)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        app.main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


def document(line):
    """Run a command with `--json`, and return what stdout holds: one document and nothing else."""
    code, out, err = call(f"{line} --json")
    assert code == 0, err
    assert err.strip() or line.startswith("archs")
    return json.loads(out)


def files(place):
    return {p.relative_to(place).as_posix(): p.stat().st_size for p in sorted(place.rglob("*"))}
