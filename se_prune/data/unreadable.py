"""Images that cannot be read: counted, left out wherever their split is read, and refused beyond a limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from se_prune.errors import DataError

LOG = logging.getLogger("se_prune")
#: Images that a message names.
NAMED = 3


@dataclass(slots=True, kw_only=True)
class Unreadable:
    """The images of one split that could not be read so far, by number, with their name and the reason.

    Shared by all subsets of the split, so that what one pass leaves out, the next one leaves out as well.
    """

    images: int
    limit: int
    found: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, images: int, most: float) -> Unreadable:
        """Return an empty list for a split: `most` is a share of its images below 1, a number of them from 1 on."""
        return cls(images=images, limit=int(most * images) if most < 1 else int(most))

    def add(self, index: int, name: str, reason: str) -> None:
        """Note an image.

        Raises:
            DataError: There are more of them than the limit; the message names the first.
        """
        if index in self.found:
            return
        self.found[index] = f"{name} cannot be read ({reason})"
        self._require_few()

    def merge(self, lists: Sequence[Sequence[tuple[int, str]]]) -> None:
        """Take over the images, by number with their texts, that each of several processes found.

        Raises:
            DataError: Together they are more than the limit.
        """
        known = len(self.found)
        self.found = {int(index): text for found in lists for index, text in found}
        self._require_few()
        self.warn(known)

    def _require_few(self) -> None:
        if len(self.found) > self.limit:
            number = f"{len(self.found)} of {self.images} images cannot be read: " if self.limit else ""
            raise DataError(
                f"{number}{self.listed()}; copy it again or remove it, or allow more with --max-bad-images."
            )

    def listed(self) -> str:
        """Return the first images with their reasons."""
        first = [self.found[i] for i in list(self.found)[:NAMED]]
        return "; ".join(first) + (" …" if len(self.found) > NAMED else "")

    def warn(self, known: int) -> None:
        """Log what a pass has found beyond the first `known` ones; what is too much ends in an error instead."""
        if known < len(self.found) <= self.limit:
            LOG.warning("%d of %d images are left out: %s", len(self.found), self.images, self.listed())
