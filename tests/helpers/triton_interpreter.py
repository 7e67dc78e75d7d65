"""Triton's interpreter, without what it does again and again.

While a kernel runs in it, `triton.language` computes with NumPy: its builtins are replaced when a launch begins and put back when
it ends. The interpreter replaces them once more for every call of a `@triton.jit` function inside, which finds all of them in
place and takes a third of the time.
"""

from __future__ import annotations

import sys
from functools import cache
from types import FunctionType
from typing import Any


def patch_once_a_launch() -> None:
    """From now on calls inside a launch replace nothing that the launch has replaced. Does nothing before the interpreter is
    imported, a second time, or where this Triton's has another form (known: 3.7)."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    real = getattr(interpreter, "_patch_lang", None)
    if real is None or hasattr(real, "real") or not hasattr(interpreter, "_LangPatchScope"):
        return
    tl = interpreter.tl
    replaced: list[frozenset[str]] = []  # of the launch that is going on; empty between launches

    @cache
    def languages(function: FunctionType) -> frozenset[str]:
        """Which of the two modules of builtins a kernel's file has imported: only those are replaced."""
        seen = function.__globals__.values()
        return frozenset(
            name for name, module in (("tl", tl), ("core", tl.core)) if any(v is module for v in seen)
        )

    def patch(function: FunctionType) -> Any:
        own = languages(function)
        if replaced and own and own <= replaced[0]:
            return interpreter._LangPatchScope()  # puts nothing back
        scope = real(function)
        if not replaced:
            replaced.append(own)
            restore = scope.restore

            def put_back() -> None:
                replaced.clear()
                restore()

            scope.restore = put_back
        return scope

    patch.real = real  # type: ignore[attr-defined]
    interpreter._patch_lang = patch
