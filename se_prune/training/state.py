"""The state of a training run in one safetensors file, so that a stopped run goes on at the step where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from se_prune import distributed
from se_prune.errors import CheckpointError
from se_prune.files import make_folder, remove_folder, require_shared, write_tensors

STATE_FILE = "training-state.safetensors"
#: Beside it, the ids of the runs in MLflow and W&B.
TRACKING_FILE = "tracking.json"
#: Seconds between two saves within an epoch, and the largest share of the time that saving may take.
SAVE_SECONDS, SAVE_SHARE = 60.0, 1 / 30


@dataclass(slots=True, kw_only=True)
class Position:
    """How far a run has come: `step` steps of epoch `epoch`, with the sums over the `seen` images of that epoch.

    `loss` and `top1` are those of the last whole epoch. `best_top1`, on held-out images, is that of `best_epoch`;
    `stopped` says that training ended early. `seconds` were spent in all.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    right: int = 0
    seen: int = 0
    loss: float = float("nan")
    top1: float = float("nan")
    held_out: float | None = None
    best_top1: float = -1.0
    best_epoch: int = -1
    stopped: bool = False
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything that changes while a network is trained; `best` are the weights of the best epoch, where kept."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    best: dict[str, torch.Tensor] = field(default_factory=dict)


class StateFile:
    """Saves the state of one run in a folder: after every epoch, and within one after so many seconds."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = folder / STATE_FILE, fingerprint
        self.saved_at, self.cost = time.monotonic(), 0.0
        make_folder(folder)

    def due(self) -> bool:
        """Say whether the state should be saved now, in the middle of an epoch."""
        return time.monotonic() - self.saved_at >= max(SAVE_SECONDS, self.cost / SAVE_SHARE)

    def save(self, position: Position, parts: Parts) -> None:
        """Write the state, whole or not at all; all processes take part, the main one writes."""
        started = time.monotonic()
        tensors, plain = _optimizer_state(parts.optimizer)
        for part, module in parts.modules.items():
            tensors |= {f"{part}/{key}": value for key, value in module.state_dict().items()}
        tensors |= {f"best/{key}": value for key, value in parts.best.items()}
        tensors |= _random_states(parts.device)
        metadata = {
            "fingerprint": self.fingerprint,
            "position": json.dumps(asdict(position)),
            "optimizer": json.dumps(plain),
            "scaler": json.dumps(parts.scaler.state_dict()),
        }
        write_tensors(self.path, tensors, metadata)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - started

    def load(self, parts: Parts) -> Position:
        """Load the state into the parts of a run; where there is none, the run is at its start.

        Raises:
            CheckpointError: The file is broken or belongs to another run.
        """
        require_shared(self.path.parent)
        if not distributed.from_main(self.path.exists):
            return Position()
        metadata, tensors = _read(self.path)
        if metadata.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{self.path} belongs to a run with other settings; give the same settings, or delete it to start "
                "again (--no-resume does)."
            )
        for part, module in parts.modules.items():
            module.load_state_dict(_below(tensors, f"{part}/"))
        parts.best = _below(tensors, "best/")
        _load_optimizer(parts.optimizer, tensors, json.loads(metadata["optimizer"]))
        parts.scaler.load_state_dict(json.loads(metadata["scaler"]))
        _set_random_states(tensors, parts.device)
        return Position(**json.loads(metadata["position"]))


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators of all processes, by kind and process."""
    kinds = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        kinds["cuda"] = torch.cuda.get_rng_state(device)
    return {
        f"rng/{kind}/{number}": state
        for kind, own in kinds.items()
        for number, state in enumerate(distributed.gather_bytes(own))
    }


def _set_random_states(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators of this process; they stay as they are where the state was that of fewer processes."""
    cpu, cuda = (tensors.get(f"rng/{kind}/{distributed.rank()}") for kind in ("cpu", "cuda"))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def state_beside(output: Path) -> Path:
    """Return the folder that keeps the state of a training whose artifact will be `output`."""
    return output.with_name(f"{output.name}.state")


def fingerprint(told: str, labels: Sequence[torch.Tensor], networks: Sequence[nn.Module]) -> str:
    """Identify a run by what it was told, the labels (N,) of its images, and the networks that it starts from."""
    digest = hashlib.sha256(told.encode())
    for values in labels:
        digest.update(f"{len(values)}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    for network in networks:
        for name, value in network.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def remove_state(folder: Path) -> None:
    """Remove the state in a folder, and the folder where nothing else is in it."""
    if not folder.is_dir() or not distributed.is_main():
        return
    for name in (STATE_FILE, TRACKING_FILE):
        for left in [*folder.glob(name), *folder.glob(f".{name}.*")]:
            left.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        remove_folder(folder)


def trained_seconds(folder: Path) -> float:
    """Return how long the run whose state lies in a folder has trained, over all its starts."""

    def read() -> float:
        metadata, _ = _read(folder / STATE_FILE)
        return Position(**json.loads(metadata["position"])).seconds

    return float(distributed.from_main(read))


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start again.") from error
    return metadata, tensors


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's state, and the rest of it as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                plain["state"][f"{index}/{key}"] = value
    return tensors, plain


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**_below(tensors, "optimizer/"), **plain["state"]}.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
