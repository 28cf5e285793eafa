"""The state of a training run in one safetensors file, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from se_prune.errors import CheckpointError
from se_prune.files import write_tensors

STATE_FILE = "training-state.safetensors"


def save_state(
    folder: Path, fingerprint: str, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after `step` steps, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    for part, module in modules.items():
        tensors |= {f"{part}/{key}": value for key, value in module.state_dict().items()}
    state = optimizer.state_dict()
    plain: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                plain["state"][f"{index}/{key}"] = value
    metadata = {"fingerprint": fingerprint, "step": str(step), "optimizer": json.dumps(plain)}
    write_tensors(folder / STATE_FILE, tensors, metadata)


def load_state(
    folder: Path, fingerprint: str, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> int:
    """Load the state in a folder into modules and optimizer; return the steps done (0 where there is none).

    Raises:
        CheckpointError: The file is broken or belongs to a run with other settings.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start again.") from error
    if metadata.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run with other settings; give the same settings, or delete it to start again."
        )
    for part, module in modules.items():
        prefix = f"{part}/"
        module.load_state_dict(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )
    plain = json.loads(metadata["optimizer"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    for key, value in plain["state"].items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    return int(metadata["step"])
