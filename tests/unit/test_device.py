"""The choice of a device."""

import pytest
import torch

from se_prune.device import choose_device
from se_prune.errors import UsageError


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_that_is_there(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == choose_device("auto") == torch.device(expected)


def test_a_device_that_is_there():
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used(name):
    """`meta` makes tensors like any other device, but they hold no values."""
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    message = str(caught.value)
    assert message.startswith(f"--device {name} cannot be used here (")
    assert message.endswith("; use auto, cuda, mps or cpu.")
    assert "\n" not in message
    assert caught.value.exit_code == 2
