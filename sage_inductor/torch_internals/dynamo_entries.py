"""What Dynamo keeps of a compile, and how it is made to forget some of it."""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sage_inductor.torch_internals.dynamo import without_limit_of_recompiles

_tracing = threading.RLock()  # held by who looks at a model with Dynamo


def _new_lock() -> None:
    global _tracing
    _tracing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may hold the old one


@contextmanager
def without_leaving_dynamo_entries(backend: Callable[..., Any]) -> Iterator[None]:
    """What Dynamo compiles inside for `backend` is of no use to anybody later, and does not count against the limit of
    recompiles; the sizes that it met are forgotten: a later call of another size would be compiled for dynamic shapes
    at once. What others have compiled, before or meanwhile, stays. One thread at a time is inside, others wait.

    Entries are invalidated where they lie, as Dynamo itself does with those of objects that died. To take them away
    (`reset_code`) frees memory that another thread, which is just looking an entry up or compiling, goes on using: that
    is done where there is no other thread, and nobody else has compiled the code.
    """
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.pgo import get_code_state

    with _tracing:
        with compile_lock:
            sizes = copy.deepcopy(get_code_state())
        try:
            with without_limit_of_recompiles():
                yield
        finally:
            with compile_lock:
                get_code_state().clear()
                get_code_state().update(sizes)
            for code, entries in _compiled_code():
                own = [entry for entry in entries if _is_of(entry, backend)]
                for entry in own:
                    _invalidate(entry)
                if own and all(map(_is_spent, entries)) and len(sys._current_frames()) == 1:
                    reset_code(code)


def _compiled_code() -> list[tuple[Any, list[Any]]]:
    """Every code object that Dynamo has compiled, with its cache entries."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo import convert_frame

    codes = (reference() for reference in list(convert_frame.input_codes.seen))
    return [(code, _debug_get_cache_entry_list(code)) for code in codes if code is not None]


_SPENT = "looked at by sage_inductor"


class _Spent:
    """What no call of a model has among its arguments."""


def _is_of(entry: Any, backend: Callable[..., Any]) -> bool:
    wrapper = entry.backend
    return bool(getattr(wrapper, "compiler_fn", wrapper) == backend)


def _invalidate(entry: Any) -> None:
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    manager = entry.guard_manager
    spent = DeletedGuardManagerWrapper(_SPENT)
    # Entries count against the limit of recompiles unless they are for another object than the call at hand; no call has
    # a local variable of this name.
    spent.id_matched_objs = {_SPENT: weakref.ref(_Spent)}
    state = manager.extra_state
    if state is not None:
        manager.cache_entry = manager.extra_state = None
        state.invalidate(entry, spent)


def _is_spent(entry: Any) -> bool:
    return getattr(entry.guard_manager, "invalidation_reason", None) == _SPENT
