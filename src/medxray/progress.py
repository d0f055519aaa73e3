"""How far a long step is: a bar on a terminal or in a notebook, a line now and then in a log, or nothing."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

LINE_S = 30.0
"""Seconds between two lines of a step where standard error is no terminal; one that is over before then has none."""

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Within it no step shows how far it is, however deep it lies."""
    token = _QUIET.set(_QUIET.get() or wanted)
    try:
        yield
    finally:
        _QUIET.reset(token)


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> Any:
    """tqdm's bar, with rate and remaining time; options are tqdm's. Of several processes that fit, the first shows it.

    Args:
        iterable: what is worked through; None for a bar that is updated by hand.
        disable: show nothing.
    """
    # tqdm's own class for notebooks is another.
    if tqdm is tqdm_asyncio and not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": LINE_S, "maxinterval": LINE_S, "delay": LINE_S}
    return tqdm(iterable, disable=disable or _QUIET.get() or os.environ.get("RANK", "0") != "0", **options)


class _Lines:
    """What tqdm draws over and over, as a line each time."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
