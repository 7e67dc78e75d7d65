"""Triton's interpreter, without what it does again and again.

While a kernel runs in it, `triton.language` computes with NumPy: its builtins are replaced when a launch begins and put back when
it ends. The interpreter replaces them once more for every call of a `@triton.jit` function inside. For every sum, difference and
product of integers it computes whether it overflows, of which its `device_assert` takes no notice. For every result it makes the
table of NumPy's dtypes anew. Without these three the kernels take two fifths of the time.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any


def shorten() -> None:
    """From now on the three are left out. Does nothing before the interpreter is imported, a second time, or where this
    Triton's has another form (known: 3.7, 3.8)."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter, "shortened"):
        return
    interpreter.shortened = True
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        _patch_once_a_launch(interpreter)
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        _keep_dtypes(interpreter)


def _patch_once_a_launch(interpreter: Any) -> None:
    """Calls inside a launch replace nothing that the launch has replaced, and what they replace goes back when it ends."""
    real, tl = interpreter._patch_lang, interpreter.tl
    scopes: list[Any] = []  # of the launch that is going on; empty between launches
    replaced: set[str] = set()

    @cache
    def languages(function: FunctionType) -> frozenset[str]:
        """Which of the two modules of builtins a kernel's file has imported: only those are replaced."""
        seen = function.__globals__.values()
        return frozenset(
            name for name, module in (("tl", tl), ("core", tl.core)) if any(v is module for v in seen)
        )

    def put_back() -> None:
        while scopes:
            interpreter._LangPatchScope.restore(scopes.pop())
        replaced.clear()

    def patch(function: FunctionType) -> Any:
        own = languages(function)
        if scopes and own and own <= replaced:
            return interpreter._LangPatchScope()  # puts nothing back
        scopes.append(real(function))
        replaced.update(own)
        if len(scopes) > 1:
            return interpreter._LangPatchScope()
        scopes[0].restore = put_back
        return scopes[0]

    interpreter._patch_lang = patch


def _keep_dtypes(interpreter: Any) -> None:
    """NumPy's dtype of each of Triton's is looked up once."""
    real, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # of a block the dtype of its elements
        if name not in known:
            known[name] = real(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype
