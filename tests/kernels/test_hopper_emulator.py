"""The emulator that runs attention.cu (tests/helpers/hopper_emulator): it knows every instruction that it is given or says so, it sees
what does not wait, and what waits for ever."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hopper_emulator import EmulationError, UnknownInstruction, build_source, missing, run_kernel
from hopper_emulator.translation import translate

from sage_inductor.kernels.hopper.wgmma import header

needs_compiler = pytest.mark.skipif(bool(missing()), reason=", ".join(missing()))


def run(
    folder: Path, body: str, *tensors: Tensor, threads: int = 128, seed: int = 0, before: str = ""
) -> None:
    """The kernel `probe`, whose arguments are pointers to 32-bit integers a, b, ..."""
    names = ", ".join(f"unsigned* {name}" for name, _ in zip("abcd", tensors, strict=False))
    source = f'{before}\n#line 1 "probe.cu"\nextern "C" __global__ void probe({names}) {{\n{body}\n}}\n'
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments = (ctypes.c_void_p * len(tensors))(*(ctypes.addressof(address) for address in addresses))
    library = build_source(source, ["probe"], folder)
    run_kernel(library, "probe", (1, 1), threads, 4096, ctypes.addressof(arguments), seed)


# -------------------------------------------------------------------------------------------------------- translation


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ('asm("mul.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(y));', "mul.rn.f32 %0, %1, %2;"),
        ('asm volatile("bar.sync %0, %1;" ::"r"(x), "n"(128) : "memory");', "bar.sync %0, %1; with operands r n"),
        ('asm volatile("bar.sync %0, %1;" ::"r"(x), "r"(y), "r"(y));', "with operands r r r"),
        ('asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory", "cc");', "cc"),
        ('asm volatile("prmt.b32.f4e %0, %1, %2, %3;" : "=r"(x) : "r"(x), "r"(y), "r"(y));', "prmt.b32.f4e"),
        ('asm("lg2.approx.f32 %0, %1;"\n : [y] "=f"(x) : "f"(y));', '[y] "=f"(x)'),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(statement: str, named: str) -> None:
    with pytest.raises(UnknownInstruction) as caught:
        translate(f"void f() {{ {statement} }}", [])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m64n128k32", "m64n128k16"),
        (".s32.s8.s8 ", ".s32.s8.s8.sp "),
        ("%3, %4,", "%4, %3,"),
        ("p; }", "p, 1; }"),
        ('"l"(b)', '"r"(b)'),
        ("d[7]", "d[8]"),
        ("setp.ne", "setp.eq"),
    ],
)
def test_other_products_are_refused(old: str, new: str) -> None:
    text = header(136, 0)
    assert old in text and translate(text, [])
    with pytest.raises(UnknownInstruction, match="wgmma"):
        translate(text.replace(old, new, 1), [])


def test_comments_and_strings_stay() -> None:
    text = '// asm("nop;")\nconst char* s = "asm(1)"; /* asm("x") */ int assembly = 1;\n'
    assert translate(text, []) == text


# ------------------------------------------------------------------------------------------------------------- numbers


@needs_compiler
def test_conversions(tmp_path: Path) -> None:
    """To FP8 and 16 bits as PyTorch rounds, for halves and ties of all sizes."""
    numbers = torch.cat(
        [torch.randn(6000) * 2.0 ** torch.randint(-30, 20, (6000,)), torch.arange(-2000, 2000) / 4096]
    )
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, 464.0, 1e6, 65519.0, 65520.0, torch.inf]), every])
    numbers = numbers[~numbers.isnan()]
    numbers = numbers[: len(numbers) // 128 * 128].contiguous()
    found = [torch.zeros(len(numbers), dtype=torch.int32) for _ in range(3)]
    body = f"""
    for (int i = threadIdx.x; i < {len(numbers)}; i += 128) {{
        const float x = __uint_as_float(a[i]);
        unsigned short pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(x));
        b[i] = pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c[i]) : "f"(0.f), "f"(x));
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d[i]) : "f"(0.f), "f"(x));
    }}"""
    run(tmp_path, body, numbers, *found)
    expected = (
        numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
        numbers.bfloat16().view(torch.int16).int() & 0xFFFF,
        numbers.half().view(torch.int16).int() & 0xFFFF,
    )
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted.int())


# ------------------------------------------------------------------------------------------------------------- waiting


@needs_compiler
def test_a_deadlock_says_who_waits_where(tmp_path: Path) -> None:
    body = """
    if (threadIdx.x < 32) {
        asm volatile("bar.sync %0, %1;" ::"r"(3), "r"(96) : "memory");
    } else if (threadIdx.x < 64) {
        __shfl_sync(~0u, threadIdx.x, 0);
        asm volatile("bar.sync %0, %1;" ::"r"(3), "r"(96) : "memory");
    } else if (threadIdx.x > 64) {
        __any_sync(~0u, 1);
    }"""
    with pytest.raises(EmulationError) as caught:
        run(tmp_path, body)
    found = str(caught.value).splitlines()
    assert found[0] == "deadlock in block 0, 0:"
    assert [line.split(" at ")[0].strip() for line in found[1:]] == [
        "threads 0 to 31: named barrier 3, 0",
        "threads 32 to 63: named barrier 3, 0",
        "threads 65 to 95: warp 2, 0 __any_sync",
    ]
    if shutil.which("addr2line"):
        assert [line.split("probe.cu:")[1] for line in found[1:]] == ["4", "7", "9"]


PRODUCT = """
    __shared__ __align__(1024) unsigned tile[128 * 8];  // of ones, 32 bytes a row
    for (int i = threadIdx.x; i < 128 * 8; i += 128) tile[i] = 0x01010101;
    __syncthreads();
    const unsigned long long matrix = (__cvta_generic_to_shared(tile) & 0x3FFFF) >> 4 | 16ull << 32 | 3ull << 62;
    const unsigned ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
    int d[64] = {};
    FENCE
    wgmma_qk(d, ones, matrix, 0);
    wgmma_qk(d, ones, matrix, 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    EARLY
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(0) : "memory");
    asm volatile("" ::: "memory");
    LATE
"""
FENCE, SUM = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', "a[threadIdx.x] = d[5];"


def products(folder: Path, early: str = "", late: str = SUM, fence: str = FENCE, seeds: int = 8) -> set[int]:
    """The sums of a thread's products, in several orders."""
    body = PRODUCT.replace("FENCE", fence).replace("EARLY", early).replace("LATE", late)
    found = set()
    for seed in range(seeds):
        sums = torch.zeros(128, dtype=torch.int32)
        run(folder, body, sums, seed=seed, before=header(128, 1))
        found |= set(sums.tolist())
    return found


@needs_compiler
def test_products_take_their_time(tmp_path: Path) -> None:
    assert products(tmp_path) == {64}
    assert 64 not in products(tmp_path, early=SUM, late="")  # read before the wait
    assert 64 not in products(tmp_path, early="tile[8 * threadIdx.x] = 0;")  # an operand written before it
    with pytest.raises(EmulationError, match="wgmma without a wgmma.fence"):
        products(tmp_path, fence="")


@needs_compiler
def test_a_warp_that_waits_alone_is_seen(tmp_path: Path) -> None:
    """PTX wants all warps of a warpgroup at one wait, also where the products are complete."""
    alone = 'if (threadIdx.x < 32) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(0) : "memory");'
    with pytest.raises(EmulationError, match="where others of the warpgroup are at another"):
        products(tmp_path, early=alone, seeds=1)
    assert products(tmp_path, early=alone.replace("threadIdx.x < 32", "a"), seeds=1) == {64}
