"""The number type that a network computes in while it trains."""

from __future__ import annotations

import torch

from se_prune.settings import TrainSettings


def amp_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: `auto` is bf16 on devices that compute in it, fp16 on older GPUs, else none."""
    if settings.amp == "off":
        return None
    if settings.amp != "auto":
        return torch.float16 if settings.amp == "fp16" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_computes_bf16() else None


def cpu_computes_bf16() -> bool:
    """Say whether this CPU has instructions for bf16; without them bf16 is slower than float32."""
    able: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch before 2.11 has no such list
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
