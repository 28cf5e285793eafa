"""Preprocessing and the options that overrule it."""

import pytest
from torch import nn

from se_prune import preprocessing
from se_prune.errors import UsageError
from se_prune.preprocessing import override, parse_floats, parse_size
from se_prune.records import Preprocessing
from tests.unit.test_checkpoint import says

BASE = Preprocessing(input_size=(3, 224, 224), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_overrides_replace_their_own_part_only():
    assert override(BASE) == BASE
    assert override(BASE, input_size=(64, 32)).input_size == (3, 64, 32)
    assert override(BASE, input_size=(3, 64, 32)).mean == BASE.mean
    changed = override(BASE, mean=[0, 0, 0], std=(1, 1, 1))
    assert changed == Preprocessing(input_size=(3, 224, 224), mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"input_size": (224,)}, ["C,H,W", "3,224,224", "'224'"]),
        ({"input_size": (3, 0, 5)}, ["C,H,W", "'3,0,5'"]),
        ({"input_size": (1, 28, 28)}, ["1,28,28", "takes 3", "--input-size 3,28,28", "a network for 1"]),
        ({"mean": (0.5,)}, ["--mean", "3 for this network, got 1"]),
        ({"std": (0.5,) * 4}, ["--std", "3 for this network, got 4"]),
        ({"std": (0.5, 0.0, 0.5)}, ["--std must be above 0, got 0.0", "standard deviation"]),
    ],
)
def test_overrides_of_the_wrong_form(options, parts):
    with pytest.raises(UsageError, match=says(*parts)):
        override(BASE, **options)


def test_an_input_size_that_the_network_cannot_take():
    with pytest.raises(UsageError, match=says("zoo:flat", "1,8,8", "choose another --input-size")):
        preprocessing._check_size(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
            Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,)),
            "zoo:flat",
        )


@pytest.mark.parametrize(("text", "size"), [("3,224,192", (3, 224, 192)), ("28, 32", (28, 32))])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["224", "", "3x224x224", "1,2,3,4", "3,-1,5", "3,2.5,5"])
def test_parse_size_refuses(text):
    with pytest.raises(UsageError, match=says("--input-size takes C,H,W or H,W, such as", f"'{text}'")):
        parse_size(text)


def test_parse_floats():
    assert parse_floats("0.485, 0.456,1", "--mean") == (0.485, 0.456, 1.0)


@pytest.mark.parametrize("text", ["", "a", "0.5,", "nan", "0.5,inf"])
def test_parse_floats_refuses(text):
    with pytest.raises(UsageError, match=says("--mean takes numbers with commas between", f"'{text}'")):
        parse_floats(text, "--mean")
