"""`se-prune archs`: architectures with gate sites, their parameters and MACs."""

from __future__ import annotations

from typing import Annotated

import typer

from se_prune import text
from se_prune_cli.output import Json, Output, Progressed


def command(
    pattern: Annotated[
        str, typer.Argument(help="Names to list, with * and ?; all of the zoo without.")
    ] = "*",
    library: Annotated[str, typer.Option(help="zoo, timm, torchvision or pytorchcv.")] = "zoo",
    as_json: Json = False,
) -> None:
    """List architectures with their gate sites, parameters and MACs (builds each: narrow it for timm)."""
    import fnmatch

    from se_prune.checkpoint import open_model
    from se_prune.cost import count_cost
    from se_prune.errors import UsageError
    from se_prune.gates.sites import find_sites
    from se_prune.pipeline import example_input
    from se_prune.zoo.registry import LIBRARIES, names

    out = Output(as_json)
    if library not in LIBRARIES:
        raise UsageError(f"--library takes {', '.join(LIBRARIES)}, got '{library}'.")
    if library != "zoo" and pattern == "*":
        raise UsageError(
            f"{library} has {len(names(library))} architectures; give a pattern such as 'seresnet*'."
        )
    chosen = [name for name in names(library) if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise UsageError(f"no architecture of {library} matches '{pattern}'.")
    found = []
    with Progressed().stage("architectures", len(chosen)) as update:
        for name in chosen:
            network = open_model(f"{library}:{name}")
            preprocessing = network.header.preprocessing
            sites = find_sites(network.module, example_input(preprocessing))
            cost = count_cost(network.module, preprocessing, sites)
            found.append((network.header.arch.ref, preprocessing.input_size, len(sites), cost))
            update(1, note=name)
    out.table(
        f"{len(found)} architectures",
        ["architecture", "input", "gate sites", "params", "MACs", "SE MACs"],
        [
            [
                ref,
                "×".join(map(str, size)),
                str(sites),
                text.scaled(c.params),
                text.scaled(c.macs),
                text.scaled(c.macs_se),
            ]
            for ref, size, sites, c in found
        ],
    )
    out.document(
        [
            {
                "arch": ref,
                "input_size": list(size),
                "sites": sites,
                "cost": {"params": c.params, "macs": c.macs},
            }
            for ref, size, sites, c in found
        ]
    )
