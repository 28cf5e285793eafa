"""`se-prune inspect`: gate sites, channel groups and cost of a network."""

from __future__ import annotations

from se_prune import text
from se_prune_cli.output import (
    Arch,
    Ema,
    InputSize,
    Json,
    Mean,
    Model,
    Output,
    Pretrained,
    Std,
    model_options,
    preprocessing_line,
)


def command(
    model: Model,
    arch: Arch = None,
    pretrained: Pretrained = False,
    ema: Ema = False,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Show the gate sites, the channel groups and the cost of a network."""
    from se_prune import pipeline
    from se_prune.checkpoint import open_model
    from se_prune.gates.sites import explain
    from se_prune.schema import to_dict

    out = Output(as_json)
    network = open_model(model, **model_options(arch, pretrained, input_size, mean, std, ema))
    out.say(preprocessing_line(network.header.preprocessing))
    found = pipeline.inspect(network)
    out.table(
        f"{len(found.sites)} gate sites",
        ["gate site", "kind", "channels", "gate, × what it scales"],
        [[s.name or "(the network)", s.kind, str(s.channels), explain(s)] for s in found.sites],
    )
    if found.left_alone:
        out.table(
            f"{len(found.left_alone)} multiplies that look like gates and are none",
            ["in", "product (C, H, W)", "left alone because"],
            [[a.name or "(the network)", "×".join(map(str, a.shape)), a.reason] for a in found.left_alone],
        )
    out.table(
        f"{len(found.groups)} channel groups",
        ["group", "kind", "channels", "layers", "can be cut"],
        [
            [g.name, g.kind, str(g.channels), str(len(g.members)), "yes" if g.prunable else f"no: {g.reason}"]
            for g in found.groups
        ],
    )
    cost = found.cost
    out.table(
        "cost of one image",
        ["", "", "share"],
        [
            ["learnable parameters", text.scaled(cost.params), ""],
            ["MACs (convolutions + fully connected)", text.scaled(cost.macs), ""],
            [
                "of which in SE blocks",
                text.scaled(cost.macs_se),
                text.percent(cost.macs_se / max(1, cost.macs), 2),
            ],
            ["squeeze, activation and multiply of gates", text.scaled(cost.macs_gate), "not in MACs"],
        ],
    )
    rest = ", ".join(f"{name} ×{times}" for name, times in cost.uncounted.items())
    out.say(f"not counted: {rest or 'nothing'}")
    document = to_dict(found)
    for values, site in zip(document["sites"], found.sites, strict=True):
        values["explanation"] = explain(site)
    document["cost"] = {key: value for key, value in document["cost"].items() if key != "per_layer"}
    out.document(document)
