"""What `enabled()` covers: every graph that is compiled while it is open, in any thread; and what it says when it missed one.

Inductor's configuration belongs to a thread. The thread that opens the context sets its own; Dynamo tells of every compile
where it begins, in the thread that compiles, and there the pass is set for as long as that takes.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from sage_inductor.torch_internals.dynamo import listen_to_compiles, listens_to_compiles
from sage_inductor.torch_internals.inductor import configured_pre_grad_pass, pre_grad_pass

__all__ = ["covering_all_threads"]

NOTHING = (
    "sage_inductor.enabled(): nothing was compiled inside, so nothing was rewritten. The first call of a compiled model, which "
    "compiles it, must happen inside; what was compiled before keeps its attention (torch.compiler.reset() forgets it)"
)
OUTSIDE = (
    "sage_inductor.enabled(): code that was compiled inside is compiled again outside, for other inputs, and keeps its attention "
    'there. Call the model inside, or compile it by torch.compile(backend="sage_inductor")'
)


class CountingPass(Protocol):
    """What `SageAttentionPass` counts, by which a scope knows that it was run."""

    times_asked: int
    """How often Inductor asked for the uuid or ran the pass."""
    times_run: int
    rewritten: int

    def before(self, configured: Any) -> Any:
        """A pass that runs this one, and `configured` behind it."""


class _Scope:
    """One open `enabled()`."""

    def __init__(self, graph_pass: CountingPass) -> None:
        self.graph_pass = graph_pass
        self.thread = threading.get_ident()


class _Here(threading.local):
    """The compile that is under way in this thread."""

    setting: AbstractContextManager[None] | None = None
    counts: tuple[int, int] | None = None


_scopes: list[_Scope] = []  # the innermost last
_inside: set[str] = (
    set()
)  # Dynamo's numbers of code that was compiled inside and whose attention was rewritten
_here = _Here()
_seen: set[str] = set()  # ... that was compiled inside, whatever it holds
_warned: set[str] = set()


@contextmanager
def covering_all_threads(graph_pass: CountingPass) -> Iterator[None]:
    """Graphs that any thread compiles inside are rewritten by `graph_pass`, in front of a pass that is configured there.

    Warns, once in a process, on leaving when nothing was ever compiled inside such a context, and, later, when code that was
    compiled inside one is compiled again where none is open."""
    if not listens_to_compiles(_starts):  # torch.compiler.reset() forgets who listens, and numbers code anew
        _inside.clear()
        listen_to_compiles(_starts, _ends)
    scope = _Scope(graph_pass)
    _scopes.append(scope)
    try:
        yield
    finally:
        _scopes.remove(scope)
    if not (_seen or graph_pass.times_asked):
        _warn(NOTHING)


def _starts(compile_id: str) -> None:
    code, is_first = _parts(compile_id)
    if not _scopes:
        if code in _inside and not is_first:
            _warn(OUTSIDE)
        return
    _seen.add(code)
    scope = _scopes[-1]
    _here.counts = scope.graph_pass.times_run, scope.graph_pass.rewritten
    configured = configured_pre_grad_pass()
    if scope.thread == threading.get_ident() or _holds(configured, scope.graph_pass):
        return
    chained = scope.graph_pass if configured is None else scope.graph_pass.before(configured)
    _here.setting = pre_grad_pass(chained)
    _here.setting.__enter__()


def _ends(compile_id: str) -> None:
    setting, _here.setting = _here.setting, None
    counts, _here.counts = _here.counts, None
    if setting is not None:
        setting.__exit__(None, None, None)
    if counts is None or not _scopes:
        return
    graph_pass = _scopes[-1].graph_pass
    ran, rewrote = graph_pass.times_run > counts[0], graph_pass.rewritten > counts[1]
    if rewrote or not ran:  # a graph that was found in a cache was rewritten when it came there
        _inside.add(_parts(compile_id)[0])


def _parts(compile_id: str) -> tuple[str, bool]:
    """The number of the code in "3/1", of which this is the second compile; whether it is the first."""
    code, _, times = compile_id.partition("_")[0].rpartition("/")
    return code, times in ("", "0")


def _holds(configured: Any, graph_pass: CountingPass) -> bool:
    while configured is not None:
        if configured is graph_pass:
            return True
        configured = getattr(configured, "then", None)
    return False


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)
