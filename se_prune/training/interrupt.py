"""Ctrl-C during training: the step is finished and saved before anything ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

LOG = logging.getLogger("se_prune")


@dataclass(slots=True)
class Request:
    """Whether the user asked to stop."""

    made: bool = False


@contextlib.contextmanager
def stop_request(listen: bool) -> Iterator[Request]:
    """While open, the first Ctrl-C only makes a request; the second stops at once, as it does without this.

    Handlers that a caller has set stay, and so does everything where `listen` is False or outside the main thread.
    """
    request = Request()
    ours = listen and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield request
        return

    def ask(_: int, __: FrameType | None) -> None:
        request.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        LOG.warning("stopping after this step; press Ctrl-C again to stop at once, without saving it.")

    signal.signal(signal.SIGINT, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
