"""Reading and replacing gates while a network runs.

A tap sees the features `u` (N, C, H, W) and the gate `s` (N, C, 1, 1) at each site's own multiply, whatever
module or function computed them, and may put another gate in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from se_prune.errors import SurgeryError
from se_prune.gates.trace import MULTIPLIES
from se_prune.records import GateSite

#: Multiplies that write into their first operand.
IN_PLACE = frozenset({torch.Tensor.mul_, torch.Tensor.multiply_, torch.Tensor.__imul__})
#: Called with the site, `u` and `s`; returns the gate to use instead, or None to leave it.
OnGate = Callable[[GateSite, torch.Tensor, torch.Tensor], torch.Tensor | None]


class _Tap(TorchFunctionMode):
    """Active while one owner module runs; counts its multiplies as the trace did."""

    def __init__(self, sites: Mapping[int, GateSite], on_gate: OnGate) -> None:
        super().__init__()
        self.sites, self.on_gate, self.count = sites, on_gate, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in MULTIPLIES:
            site = self.sites.get(self.count)
            self.count += 1
            if site is not None:
                operands = (*args, *(named.pop(key) for key in ("input", "other") if key in named))
                args = self._replaced(site, operands, func in IN_PLACE)
        return func(*args, **named)

    def _replaced(self, site: GateSite, args: tuple[Any, ...], in_place: bool) -> tuple[Any, ...]:
        gate, features = args[site.gate_operand], args[1 - site.gate_operand]
        narrow = gate[:, :, :1, :1] if gate.ndim == 4 else gate
        if in_place and site.gate_operand == 0:
            narrow = narrow.clone()  # the product is about to be written over it
        new = self.on_gate(site, features, narrow)
        if new is None:
            return args
        operands = list(args)
        if site.gate_operand == 0:
            new = new.expand(features.shape)
            new = new.clone() if in_place else new
        operands[site.gate_operand] = new
        return tuple(operands)


@contextlib.contextmanager
def tap(model: nn.Module, sites: Sequence[GateSite], on_gate: OnGate) -> Iterator[None]:
    """While open, call `on_gate` at every site of `model`'s forward passes.

    Raises:
        SurgeryError: A site's owner is not in the model.
    """
    by_owner: dict[str, list[GateSite]] = {}
    for site in sites:
        by_owner.setdefault(site.owner, []).append(site)
    modules = dict(model.named_modules())
    missing = [name for name in by_owner if name not in modules]
    if missing:
        raise SurgeryError(
            f"the network has no module '{missing[0]}'; these gate sites belong to another network."
        )
    calls: dict[str, int] = {}
    handles = [
        modules[""].register_forward_pre_hook(lambda *_: calls.clear(), prepend=True),
    ]
    for owner, here in by_owner.items():
        handles.extend(_hooks(modules[owner], owner, here, on_gate, calls))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    module: nn.Module, owner: str, sites: Sequence[GateSite], on_gate: OnGate, calls: dict[str, int]
) -> list[Any]:
    stack: list[_Tap] = []

    def enter(*_: Any) -> None:
        call = calls.get(owner, 0)
        calls[owner] = call + 1
        mode = _Tap({s.multiply: s for s in sites if s.call == call}, on_gate)
        stack.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        stack.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def constant_gates(constants: Mapping[str, torch.Tensor]) -> OnGate:
    """Return a callback that puts a constant (C,) per site, by name, in place of the gate."""

    def replace(site: GateSite, features: torch.Tensor, _: torch.Tensor) -> torch.Tensor | None:
        value = constants.get(site.name)
        if value is None:
            return None
        return value.to(features).view(1, -1, 1, 1)

    return replace
