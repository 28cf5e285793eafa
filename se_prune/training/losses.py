"""What a step minimises: labels, the teacher's outputs, and the teacher's features at the gates.

Shapes: N images, K classes, C channels of the teacher at a gate, c of them kept in the student.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from se_prune import distributed
from se_prune.gates.tap import OnGate, tap
from se_prune.records import GateSite


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of softened outputs, times T² (Hinton et al. 2015); logits (N, K)."""
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def label_loss(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy with labels (N,), or with mixed targets (N, K), which hold the smoothing already."""
    if target.ndim == 2:
        return F.cross_entropy(logits, target)
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMatch:
    """Gate sites that student and teacher share, and per site, by name, which channels (c,) the student kept."""

    student: Sequence[GateSite]
    teacher: Sequence[GateSite]
    kept: Mapping[str, torch.Tensor]


class FeatureLoss:
    """The distance of the recalibrated features `v = s·u` at every shared gate from the teacher's.

    Of a site it is Σ (v - v')² / Σ v'², over images, kept channels and positions, where v' is the teacher's; the
    loss is the mean over sites. It reads what both networks compute while `watching` is open.
    """

    def __init__(self, match: FeatureMatch, device: torch.device) -> None:
        self.match = match
        self.kept = {name: index.to(device) for name, index in match.kept.items()}
        self.mine: dict[str, torch.Tensor] = {}
        self.theirs: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def watching(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """Read the gates of both networks."""
        with (
            tap(student, self.match.student, self._into(self.mine)),
            tap(teacher, self.match.teacher, self._into(self.theirs)),
        ):
            yield

    @staticmethod
    def _into(seen: dict[str, torch.Tensor]) -> OnGate:
        def keep(site: GateSite, features: torch.Tensor, gate: torch.Tensor) -> None:
            seen[site.name] = features * gate

        return keep

    def __call__(self) -> torch.Tensor:
        """Return the loss of the batch that both networks have just seen, and forget it."""
        gaps, energies = [], []
        for name, index in self.kept.items():
            wanted = self.theirs[name][:, index].float()
            gaps.append((self.mine[name].float() - wanted).square().sum())
            energies.append(wanted.square().sum())
        self.mine.clear()
        self.theirs.clear()
        whole = torch.stack(energies).detach()
        distributed.average([whole])  # so that the mean of the processes' losses is that of the whole batch
        return (torch.stack(gaps) / whole.clamp_min(1e-12)).mean()
