"""User errors: each message says what is wrong and what to do next.

Anything a user can cause is a `SePruneError`; the command line turns it into one sentence on stderr and the
kind's exit code. Everything else is our defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SePruneError(Exception):
    """Base of every error a user can cause; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(SePruneError):
    """An option or a recipe key is wrong; nothing was read or written."""

    exit_code = 2


class CheckpointError(SePruneError):
    """A model file is missing, broken, unsafe, or does not fit its architecture."""


class DataError(SePruneError):
    """Images are missing, empty, unreadable, or do not fit the model."""


class BudgetError(SePruneError):
    """The budget cannot be met under the floors; the message says what is reachable."""


class SurgeryError(SePruneError):
    """The network cannot be cut, or the cut network does not equal its masked twin."""


class NotKept(SePruneError):  # noqa: N818 - nothing went wrong
    """What the user asked to be kept is not, such as `--max-drop`; the message says by how much."""

    exit_code = 3


class PeerError(SePruneError):
    """Another of several processes has ended, so that this one cannot go on."""


class DropError(SePruneError):
    """The accuracy fell more than the user allows; nothing was kept."""

    exit_code = 3


class Interrupted(SePruneError):  # noqa: N818 - nothing went wrong
    """The user stopped the work; what was done is saved, and the message says how to go on."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without its full stop, to stand inside of one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
