"""Training and fine-tuning: one loop for both, distillation, resume."""

from se_prune.training.loop import TrainResult, fit

__all__ = ["TrainResult", "fit"]
