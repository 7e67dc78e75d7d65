"""What the backend says of each attention that it meets while it compiles. `explain` says the same, but runs the model eagerly."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sage_inductor import Site


@contextmanager
def sites_found() -> Iterator[list[Site]]:
    """The sites of all graphs that are compiled inside, in their order: those of the backend's log at level DEBUG."""
    found: list[Site] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple):
                found.extend(value for value in record.args if isinstance(value, Site))

    log, handler = logging.getLogger("sage_inductor.rewriting.driver"), Handler()
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
