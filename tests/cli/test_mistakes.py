"""One sentence for each mistake of a user, and nothing written."""

import contextlib
import io
import pickle
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from se_prune_cli import app

from tests.calls import APPLY, NET, RECIPE, call, files
from tests.tiny import png_folder

pytestmark = pytest.mark.slow


class Touch:
    def __reduce__(self):
        return (open, ("marker", "w"))


@pytest.fixture(scope="module")
def broken(place, first_applied, first_theirs):
    """Files with something wrong in them."""
    whole = Path("cut.safetensors").read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("code.pth").write_bytes(pickle.dumps({"fc.weight": Touch()}, protocol=2))
    Path("typo.toml").write_text(RECIPE.replace("macs =", "mac ="), encoding="utf-8")
    Path("file").write_text("", encoding="utf-8")
    png_folder(Path("torn"))
    Path("torn/train/bee/1.png").write_bytes(b"no image")


BAD = {
    "missing file": ("inspect gone.safetensors", "gone.safetensors"),
    "truncated artifact": ("inspect half.safetensors", "half.safetensors"),
    "wrong arch": ("inspect cut.safetensors --arch zoo:se_mobilenet_x025", "se_resnet20"),
    "unknown arch": ("inspect zoo:se_resnet2", "did you mean"),
    "wrong class count": (f"evaluate {NET} --data two", "10 of them are not in two: t-shirt"),
    "budgets of a sweep": (f"sweep {NET} --data data --macs half -o swept", "--macs takes numbers"),
    "budget 0": (f"{APPLY} --macs 0", "got 0"),
    "budget 1.5": (f"{APPLY} --macs 1.5", "got 1.5"),
    "budget -1": (f"{APPLY} --macs=-1", "got -1"),
    "budget nan": (f"{APPLY} --macs nan", "got nan"),
    "sparsity nan": (f"{APPLY} --sparsity nan", "got nan"),
    "two budgets": (f"{APPLY} --macs 0.5 --sparsity 0.5", "exactly one budget"),
    "no budget": (APPLY, "exactly one budget"),
    "no output": (f"apply {NET} --data data --macs 0.5", "--dry-run"),
    "no data to repair on": (f"apply {NET} --macs 0.5 -o x.safetensors", "--repair none"),
    "gates and nothing to measure them on": (
        f"apply {NET} --fold-gates all --repair none -o x.safetensors",
        "--fold-gates measures the gates: add --data, or --stats",
    ),
    "more gates than there are": (
        f"{APPLY} --stats stats.safetensors --fold-gates 10",
        "asks for more sites than the 9",
    ),
    "unknown gate": (
        f"{APPLY} --stats stats.safetensors --fold-gates layer1.0",
        "no gate site 'layer1.0' (did you mean",
    ),
    "tolerance without auto": (
        f"{APPLY} --fold-gates all --fold-tolerance 0.1",
        "goes with --fold-gates auto",
    ),
    "empty data": (f"evaluate {NET} --data empty", "empty"),
    "missing data": (f"evaluate {NET} --data nowhere", "nowhere"),
    "code in a pickle": ("inspect code.pth --arch zoo:se_resnet20", "code.pth is a pickle that calls"),
    "two architectures": ("inspect twofold.pth", "choose one, such as --arch timm:mobilenetv3_small_100"),
    "no average": ("inspect twofold.pth --ema", "holds no averaged weights"),
    "unknown criterion": (f"{APPLY} --macs 0.5 --criterion excitaton", "did you mean 'excitation'"),
    "unknown device": (f"evaluate {NET} --data data --device gpu", "--device gpu"),
    "device without values": (f"evaluate {NET} --data data --device meta", "--device meta"),
    "unknown recipe key": ("run typo.toml -o typo", "did you mean 'macs'"),
    "unknown recipe": ("run demmo -o typo", "did you mean 'demo'"),
    "output below a file": (f"{APPLY} --macs 0.5".replace("x.s", "file/x.s"), "file"),
    "statistics below a file": (f"analyze {NET} --data data -o file/stats.safetensors", "file"),
    "round to 0": (f"{APPLY} --macs 0.5 --round-to 0", "round-to"),
    "no epochs": ("finetune cut.safetensors --data data --epochs 0 -o x.safetensors", "epochs"),
    "a rate that is no number": (
        "finetune cut.safetensors --data data --lr nan -o x.safetensors",
        "lr must be at least 0.0 and finite, got nan",
    ),
    "a state below a file": (
        "finetune cut.safetensors --data data --epochs 1 --state file/state -o x.safetensors",
        "cannot make the folder file/state",
    ),
    "a broken image": (
        "train --arch zoo:se_resnet20 --data torn --epochs 1 -o x.safetensors",
        "torn/train/bee/1.png cannot be read",
    ),
    "statistics of another network": (
        "apply cut.safetensors --data data --stats stats.safetensors --macs 0.5 -o x.safetensors",
        "se-prune analyze",
    ),
    "no run record": ("report gone.json", "gone.json"),
    "unknown target": ("export cut.safetensors --data data --to onx -o x.onx", "onnx"),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will:UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_sentence(place, broken, name):
    line, part = BAD[name]
    before = files(place)
    code, out, err = call(line)
    assert code in {1, 2}
    assert files(place) == before  # no marker of the pickle either
    lines = [text for text in err.splitlines() if text.strip()]
    assert [text for text in lines if text.startswith("error: ")] == lines[-1:], err
    assert part in lines[-1]
    assert "Traceback" not in err + out
    assert lines[-1].endswith((".", "?"))


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("train", "train --arch zoo:se_resnet20 --data data -o file/x.safetensors"),
        ("finetune", "finetune cut.safetensors --data data -o file/x.safetensors"),
        ("plan", f"{APPLY} --macs 0.5".replace("x.s", "file/x.s")),
        ("analyze", f"analyze {NET} --data data -o file/x.safetensors"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(place, broken, job, line):
    with mock.patch(f"se_prune.pipeline.{job}", side_effect=ZeroDivisionError) as work:
        code, _, err = call(line)
        assert (code, work.call_count) == (1, 0)
        assert "cannot write file/x.safetensors" in err
        with pytest.raises(ZeroDivisionError):  # the control: with a good output, this is the work
            app_main(line.replace("file/x.s", "x.s"))
    assert not Path("x.safetensors").exists()


def app_main(line):
    with (
        mock.patch.object(sys, "argv", ["se-prune", *shlex.split(line)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        app.main()


def test_the_code_in_the_pickle_is_real(broken, tmp_path):
    code = Path("code.pth").read_bytes()
    with contextlib.chdir(tmp_path):
        pickle.loads(code)["fc.weight"].close()
        assert Path("marker").is_file()


def test_a_defect_of_ours_keeps_its_traceback(place):
    with (
        mock.patch("se_prune.pipeline.inspect", side_effect=ZeroDivisionError),
        mock.patch.object(sys, "argv", ["se-prune", "inspect", "zoo:se_resnet20"]),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(ZeroDivisionError),
    ):
        app.main()
