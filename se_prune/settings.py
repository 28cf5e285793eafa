"""How to train: the keys of a recipe's `[train]` and `[finetune]` tables."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from se_prune.schema import FORBID_EXTRA, record

#: Share of a split whose images may be unreadable and are left out, unless told otherwise.
MAX_BAD_IMAGES = 0.001
#: Where a training is followed, beside the log that is always written.
Tracker = Literal["tensorboard", "mlflow", "wandb"]


@record
class TrainSettings:
    """How to train or fine-tune; every field is a key of a recipe's `[train]` or `[finetune]` table.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images of one forward pass; under torchrun of all processes together.
        accumulate: Forward passes of one step; the gradient is their mean.
        optimizer: SGD with Nesterov momentum, or AdamW.
        lr: The largest learning rate.
        momentum: Of SGD.
        weight_decay: Of weights; biases, BN and the gates' own layers have none.
        schedule: After the warm-up `cosine` falls to zero and `constant` stays. `onecycle` rises from lr / 25 along
            a cosine over the share `warmup` of the steps, and falls along another one to lr / 250,000.
        warmup: Share of the steps in which the rate rises.
        label_smoothing: Share of the target that is spread over all classes, in mixed labels too.
        ema_decay: Decay per step of the average of the weights that is kept in place of the last ones; 0 for none.
        ema_bn_images: Training images on which BN statistics of the average are taken anew at the end; 0 keeps
            their own average.
        crop_padding: Random shift by up to so many pixels (images in memory).
        flip: Probability of a horizontal flip.
        erase: Probability of random erasing.
        rand_augment: Operations of RandAugment per image; 0 for none.
        rand_augment_magnitude: Their strength, 0 to 10.
        mixup: Alpha of mixup; 0 for none. With `cutmix` as well, each batch takes one of the two.
        cutmix: Alpha of CutMix; 0 for none.
        mix_prob: Probability that a batch is mixed at all.
        clip_norm: Largest norm of the gradient; 0 for no bound.
        sync_bn: Under torchrun, BN takes its statistics over the whole batch (`on`) or over each process's share
            (`off`); `auto` is on where a share has fewer than 32 images.
        amp: Mixed precision; `auto` is bf16 where the device computes in it, else fp16 on GPUs.
        channels_last: Memory layout (N, H, W, C).
        compile: Compile the network with torch.compile.
        distill_weight: Share of the loss that follows the teacher's outputs rather than the labels.
        distill_temperature: Softens both outputs.
        distill_features: Weight of the squared distance of the recalibrated features at the gates, relative to the
            teacher's energy there; 0 for none. With 0.5 the bundled networks got more back at 30 % of the MACs
            (`reports/distill.md`); it takes more memory, and asks the teacher at every step.
        group_lasso: Strength of a penalty that makes channels ready to leave: the sum, over the channels that can be
            cut, of the norm of what scales each (BN factors and the rows of its gate together). In a run of several
            steps the last one has none.
        group_lasso_ramp: Share of the steps of training over which that strength rises from zero.
        held_out: Share of the training images that is not trained on, and measures each epoch.
        patience: Epochs without a better top-1 on held-out images after which training stops; 0 to go on.
        keep: The weights of the `last` epoch, or of the `best` one on held-out images.
        track: Where the training is followed, beside its log.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.1
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    ema_bn_images: int = 0
    crop_padding: int = 2
    flip: float = 0.5
    erase: float = 0.0
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    clip_norm: float = 0.0
    sync_bn: Literal["auto", "on", "off"] = "auto"
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    distill_weight: float = 0.7
    distill_temperature: float = 2.0
    distill_features: float = 0.0
    group_lasso: float = 0.0
    group_lasso_ramp: float = 0.5
    held_out: float = 0.0
    patience: int = 0
    keep: Literal["last", "best"] = "last"
    track: tuple[Tracker, ...] = ()


@record
class SearchTable:
    """`[search]`: find the smallest network that keeps a drop, by bisection over the MACs; stands in place of a budget.

    Attributes:
        max_drop: Points of top-1 that may be lost at most, such as 0.5.
        confidence: How sure it must be that no more is lost: what counts is the upper end of the one-sided interval
            of the drop at this level, from pairs of answers to the same images; 0.5 takes the drop as measured.
        images: What the search decides on: images held out of the training ones (`train`), which flatter a dense
            network that was trained on them, so that more is kept than need be; or a part of the test images (`test`),
            which the proof at the end then leaves out.
        held_out: Share of those images; no try is measured, repaired or fine-tuned on them. The network that is found
            is then made anew, with all training images.
        least: The smallest fraction of the MACs that is tried.
        tolerance: The search ends where the smallest fraction that keeps the drop, and the largest that does not, are
            no further apart.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    max_drop: float
    confidence: float = 0.8
    images: Literal["train", "test"] = "train"
    held_out: float = 0.2
    least: float = 0.05
    tolerance: float = 0.03
