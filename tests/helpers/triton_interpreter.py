"""Triton's interpreter, without what it does again and again.

While a kernel runs in it, `triton.language` computes with NumPy: its builtins are replaced when a launch begins and put back when
it ends. The interpreter replaces them once more for every call of a `@triton.jit` function inside. For every sum, difference and
product of integers it computes whether it overflows, of which its `device_assert` takes no notice. For every result it makes the
table of NumPy's dtypes anew. Without these three the kernels take two fifths of the time.

For every result, too, it makes the tuple of its sizes, their types and the type of the tuple, once for the `tensor` and once for
its `block_type`. Made once for each shape, and types of tuples where one is asked for, they cost nothing: a third of the rest.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any


def shorten() -> None:
    """From now on these are left out. Does nothing before the interpreter is imported, a second time, or where this
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
    _keep_shapes(interpreter.tl.core)
    _type_tuples_late(interpreter.tl.core)


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


def _keep_shapes(core: Any) -> None:
    """What `tensor` and `block_type` say of a shape is made once. Nothing writes to it."""
    real_tensor, real_block = core.tensor.__init__, core.block_type.__init__
    of_tensors: dict[str, tuple[Any, Any]] = {}
    of_blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = of_tensors.get(type.name)  # of a block its sizes are a part of it
        if known is not None:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
            return
        real_tensor(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            of_tensors[type.name] = self.shape, self.numel

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        whole = all(type(size) is int for size in sizes)  # True is found where 1 is
        known = of_blocks.get(sizes) if whole else None
        if known is not None:
            self.element_ty = element_ty
            self.shape, self.numel, text = known
            self.name = f"<{text}, {element_ty}>"
            return
        real_block(self, element_ty, shape)
        text = str(self.shape)
        as_known = self.name == f"<{text}, {element_ty}>"
        if whole and as_known and vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
            of_blocks[sizes] = self.shape, self.numel, text

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type


def _type_tuples_late(core: Any) -> None:
    """The type of a tuple is made when it is asked for."""
    if vars(core.tuple([])).keys() != {"values", "type"} or not hasattr(core, "_type_for_tuple_values"):
        return
    real_init, real_attribute = core.tuple.__init__, core.tuple.__getattr__

    def init(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            real_init(self, args, type)

    def attribute(self: Any, name: str) -> Any:
        if name == "type":
            self.type = core._type_for_tuple_values(self.values)
            return self.type
        return real_attribute(self, name)

    core.tuple.__init__, core.tuple.__getattr__ = init, attribute
