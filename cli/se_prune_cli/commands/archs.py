"""`se-prune archs`: architectures with gate sites, their parameters and MACs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_prune import text
from se_prune_cli.output import Json, Output, Progressed

if TYPE_CHECKING:
    from se_prune.pipeline import Outline

#: Each of the paper's figures stands right of ours.
COLUMNS = ["architecture", "input", "sites", "params", "paper", "MACs", "paper"]


def command(
    pattern: Annotated[
        str, typer.Argument(help="Names to list, with * and ?; all of the zoo without.")
    ] = "*",
    library: Annotated[str, typer.Option(help="zoo, timm, torchvision or pytorchcv.")] = "zoo",
    as_json: Json = False,
) -> None:
    """List architectures with their gate sites, parameters and MACs, beside the SENet paper's printed figures.

    Builds each that is listed: narrow the list for timm.
    """
    import fnmatch

    from se_prune.errors import UsageError
    from se_prune.pipeline import outline
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
            found.append(outline(f"{library}:{name}"))
            update(1, note=name)
    out.table(f"{len(found)} architectures", COLUMNS, [_row(each) for each in found])
    out.document([_entry(each) for each in found])


def _row(found: Outline) -> list[str]:
    printed = found.printed
    return [
        found.arch,
        "×".join(map(str, found.input_size)),
        str(found.sites),
        text.scaled(found.params),
        text.as_printed(None if printed is None else printed.params),
        text.scaled(found.macs),
        text.as_printed(None if printed is None else printed.macs),
    ]


def _entry(found: Outline) -> dict[str, Any]:
    printed = found.printed
    return {
        "arch": found.arch,
        "input_size": list(found.input_size),
        "sites": found.sites,
        "cost": {"params": found.params, "macs": found.macs},
        "macs_se": found.macs_se,
        "paper": None if printed is None else {"params": printed.params, "macs": printed.macs},
    }
