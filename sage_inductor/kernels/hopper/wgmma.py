"""The wgmma instructions that attention.cu uses, as inline PTX."""

from __future__ import annotations


def header(v_rows: int, pv: int) -> str:
    """The source of `wgmma_qk` and `wgmma_pv`. `pv` is the `PV` of attention.cu, `v_rows` the n of the product with V."""
    accumulator, types, k = (
        ("f32", "e4m3.e4m3", 32),
        ("s32", "u8.s8", 32),
        ("f32", "bf16.bf16", 16),
        ("f32", "f16.f16", 16),
    )[pv]
    scores = (_wrapper("wgmma_qk", 128, 32, "s32", "s8.s8", a_in_registers=where) for where in (False, True))
    return "".join(scores) + _wrapper("wgmma_pv", v_rows, k, accumulator, types, a_in_registers=True)


def _wrapper(name: str, n: int, k: int, accumulator: str, types: str, *, a_in_registers: bool) -> str:
    """The source of a device function `name(d, a, b, accumulate)`: d = A B^T, or d += A B^T.

    A [64, k] is in registers or in shared memory, B [n, k] in shared memory, both K-major. `types` are those of A and B in
    PTX ("s8.s8", "e4m3.e4m3"). A second form takes d as unsigned bits, in N registers that another product uses, too.
    """
    count = n // 2
    constraint, ctype = ("+r", "int") if accumulator == "s32" else ("+f", "float")
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    if a_in_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b = count + 4
        argument, inputs = "const unsigned* a", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'
    else:
        a = f"%{count}"
        b = count + 1
        argument, inputs = "unsigned long long a", '"l"(a)'
    # Floating-point forms end in the signs of A and B; 16-bit ones also say which matrix in shared memory is
    # transposed.
    tail = "" if accumulator == "s32" else ", 1, 1"
    if k == 16:
        tail += ", 0" if a_in_registers else ", 0, 0"

    def define(head: str, outputs: str) -> str:
        return (
            f"{head}, {argument}, unsigned long long b, int accumulate) {{\n"
            f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{b + 1}, 0;\\n"\n'
            f'                 "wgmma.mma_async.sync.aligned.m64n{n}k{k}.{accumulator}.{types} "\n'
            f'                 "{{{d}}}, {a}, %{b}, p{tail}; }}\\n"\n'
            f'                 : {outputs} : {inputs}, "l"(b), "r"(accumulate));\n}}\n'
        )

    function = f"__device__ __forceinline__ void {name}"
    return define(f"{function}({ctype} (&d)[{count}]", outputs) + define(
        f"template <int N> {function}(unsigned (&d)[N]", outputs.replace(constraint, "+r")
    )
