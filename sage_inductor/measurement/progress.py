"""Progress of a long run, told to the caller's function or to a bar on a terminal, and to the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from sage_inductor.measurement.printable import printable

log = logging.getLogger(__name__)

ProgressCallback: TypeAlias = Callable[[int, int, str], None]  # (done, total, what was done)


class Progress:
    """Counts the units that are done. The total grows while sites are found: each has `units_per_site`."""

    def __init__(self, callback: ProgressCallback, units_per_site: int) -> None:
        self.callback = callback
        self.units_per_site = units_per_site
        self.sites = 0
        self.done = 0

    def tick(self, what: str) -> None:
        self.done += 1
        total = max(self.done, self.sites * self.units_per_site)
        what = printable(what)  # it holds the name of a module
        log.debug("%d of %d: %s", self.done, total, what)
        self.callback(self.done, total, what)


@contextmanager
def shown(callback: ProgressCallback | None, what: str = "calibrating") -> Iterator[ProgressCallback]:
    """The function to tell progress to: `callback` if there is one. Else, where stderr is a terminal, one that draws a bar
    with `rich`, or a line without it; elsewhere one that does nothing. `what` is the bar's text before the first call."""
    if callback is not None:
        yield callback
        return
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    bar = _bar()
    if bar is None:
        yield _draw_line
        sys.stderr.write(_CLEAR_LINE)
        return
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=_without_markup(what)
        )


def _without_markup(text: str) -> str:
    from rich.markup import escape

    return escape(text)


_CLEAR_LINE = "\r\x1b[K"


def _draw_line(done: int, total: int, what: str) -> None:
    sys.stderr.write(f"{_CLEAR_LINE}{done}/{total} {what}")
    sys.stderr.flush()


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    return Bar(console=Console(stderr=True), transient=True)
