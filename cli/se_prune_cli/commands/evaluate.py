"""`se-prune evaluate`: accuracy with its uncertainty."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from se_prune import text
from se_prune_cli.output import (
    Arch,
    Data,
    Device,
    Ema,
    InputSize,
    Json,
    MaxBadImages,
    Mean,
    Model,
    Output,
    Pretrained,
    Progressed,
    Std,
    Workers,
    command_line,
    model_options,
    preprocessing_line,
)
from se_prune_cli.tables import accuracy


def command(
    model: Model,
    data: Data,
    against: Annotated[
        str | None, typer.Option(help="Another MODEL on the same images, for a paired test.")
    ] = None,
    against_pretrained: Annotated[
        bool, typer.Option("--against-pretrained", help="Load the library's weights for it.")
    ] = False,
    card: Annotated[
        Path | None, typer.Option(help="Model card to write, in Hugging Face's form, such as MODEL_CARD.md.")
    ] = None,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    workers: Workers = None,
    max_bad_images: MaxBadImages = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Top-1 with its 95 % interval, top-5 and per-class accuracy on the test images."""
    from se_prune import pipeline
    from se_prune.checkpoint import open_model
    from se_prune.data import open_data
    from se_prune.device import choose_device
    from se_prune.evaluate import paired
    from se_prune.files import require_writable
    from se_prune.pipeline.details import write_card
    from se_prune.schema import to_dict

    out, show = Output(as_json), Progressed()
    if card is not None:
        require_writable(card)
    target, source = choose_device(device), open_data(data, workers=workers, max_bad_images=max_bad_images)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    other = None if against is None else open_model(against, pretrained=against_pretrained)
    out.say(preprocessing_line(network.header.preprocessing))
    _, result = pipeline.assess(network, source, device=target, reporter=show)
    rows, document = [(model, result)], to_dict(result)
    document.pop("predictions")
    test = reference = None
    if other is not None:
        other = pipeline.like(other, network, source)
        _, reference = pipeline.assess(other, source, device=target, reporter=show)
        test = paired(reference, result, pipeline.matching(network, source).test)
        rows.append((str(against), reference))
        document["against"] = {**to_dict(test), "top1": reference.top1}
    out.table("accuracy on test images", *accuracy(rows))
    out.table(
        "per class",
        ["class", *[name for name, _ in rows]],
        [[name, *[text.percent(e.per_class[name]) for _, e in rows]] for name in result.per_class],
    )
    if test is not None:
        out.console.print(
            f"difference {100 * test.top1_difference:+.2f} points; {test.only_second_right} images only the first "
            f"gets right, {test.only_first_right} only the second; exact McNemar p = {test.p_value:.3g}",
            highlight=False,
        )
    if card is not None:
        write_card(
            card, network, source, result, file=model, command=command_line(data), device=target, paired=test,
            against=None if reference is None else (Path(str(against)).name, reference),
        )  # fmt: skip
        out.say(f"model card: {card}")
        document["card"] = str(card)
    out.document(document)
