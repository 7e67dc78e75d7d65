"""Device-side rounding and exponentials shared by the kernels.

With PTX they are lean instructions of an NVIDIA GPU. Without it the same values come from plain arithmetic, for triton's
interpreter on the CPU: that rounds bfloat16 and FP8 toward zero, mishandles FP8 subnormals and cannot run inline assembly.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# Adding 1.5 * 2**23 leaves rint(x), half to even, in the low bits of the sum.
_ROUND = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)  # its bits; larger bits of |x| are NaN
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2**x. With PTX it is the bare instruction: tl.exp2 adds two more to keep denormal results, which P does not need."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def round_to_int8(x):
    """rint(x), half to even, for |x| <= 127."""
    return (x + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


# The addition leaves rint(x) in the low byte, three byte permutes gather four.
_PACK_INT8 = tl.constexpr("""{
    .reg .f32 a, b, c, d; .reg .b32 e, f, g, h, x, y;
    add.rn.f32 a, $1, 0f4B400000; add.rn.f32 b, $2, 0f4B400000;
    add.rn.f32 c, $3, 0f4B400000; add.rn.f32 d, $4, 0f4B400000;
    mov.b32 e, a; mov.b32 f, b; mov.b32 g, c; mov.b32 h, d;
    prmt.b32 x, e, f, 0x0040; prmt.b32 y, g, h, 0x0040; prmt.b32 $0, x, y, 0x5410;
}""")
_PACK_FLOAT8 = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@triton.jit
def pack_to_int8(x, PTX: tl.constexpr):
    """`round_to_int8` for a large tile."""
    if PTX:
        return tl.inline_asm_elementwise(_PACK_INT8, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return round_to_int8(x)


@triton.jit
def pack_four(a, b, c, d, FLOAT8: tl.constexpr, PTX: tl.constexpr):
    """Elements of a, b, c and d, as e4m3 or rounded to INT8, in the four bytes of an int32; `a` in the lowest."""
    if PTX:
        asm: tl.constexpr = _PACK_FLOAT8 if FLOAT8 else _PACK_INT8
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (
            _byte(a, FLOAT8) | (_byte(b, FLOAT8) << 8) | (_byte(c, FLOAT8) << 16) | (_byte(d, FLOAT8) << 24)
        )


@triton.jit
def _byte(x, FLOAT8: tl.constexpr):
    y = to_float8(x, False) if FLOAT8 else round_to_int8(x)
    return y.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def to_float8(x, PTX: tl.constexpr):
    """x in e4m3, rounded to nearest even, saturating at 448."""
    if not PTX:
        # Below 2**-6 the spacing is that of the subnormals.
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        spacing = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        x = ((x / spacing + _ROUND) - _ROUND) * spacing
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(tl.float8e4nv)


@triton.jit
def to_float(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """A float32 x in `dtype`, a 16-bit float or float32, rounded to nearest even."""
    if not PTX and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        x = tl.where((bits & _MAGNITUDE) < _INFINITY, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot_float(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b for 16-bit floats."""
    if PTX:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def load_uniform(pointer, PTX: tl.constexpr):
    """One read-only float32. In a loop with tensor core operations triton would load it through shared memory, with a barrier
    per iteration, which cost 3 to 8% of the attention kernel's time (H200)."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [pointer.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(pointer)


@triton.jit
def widen(x, PTX: tl.constexpr):
    """x in float32. Two bfloat16 of a register take an instruction each; of tl's own conversion the second takes two."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; shl.b32 a, $2, 16; and.b32 b, $2, 0xFFFF0000; mov.b32 $0, a; mov.b32 $1, b;}",
            "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x within one unit in the last place, for x that are no denormals. With PTX it is the bare instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def larger_magnitude(x, y):
    """max(|x|, |y|), NaN where one is. It is one instruction."""
    return tl.maximum(tl.abs(x), tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(x):
    """The bits of |x|. As integers they order like |x|, with inf and then NaN on top, so that a maximum keeps those."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def largest_of_all(x):
    """The maximum of a tile. In one step a thread's own elements come first; axis after axis takes a shuffle for each row."""
    return tl.max(tl.reshape(x, [x.numel], can_reorder=True), 0)


@triton.jit
def finite_or_zero(x):
    return tl.where(magnitude(x) < _INFINITY, x, 0.0)


@triton.jit
def scale_or_nan(bits, floor):
    """|x| from its bits, at least `floor`. NaN for inf and NaN, so that everything scaled by it becomes NaN."""
    value = tl.maximum(bits.to(tl.float32, bitcast=True), floor)
    return tl.where(bits >= _INFINITY, float("nan"), value)
