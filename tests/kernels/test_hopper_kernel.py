"""The Hopper kernel: what is compiled, kept and refused, here; what it computes, on a Hopper GPU."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from pathlib import Path
from typing import Any

import agreement
import pytest
import sass
import torch

from sage_inductor import kernels
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.hopper import HopperKernel, compiler_reasons, kept
from sage_inductor.kernels.hopper import compile as compilation
from sage_inductor.kernels.hopper.compile import SHARED_LIMIT, Compiled, HopperVariant, choose_variant
from sage_inductor.kernels.hopper.share import part_starts, share

KERNEL = HopperKernel()
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(KERNEL.unavailable_reasons()), reason="needs a Hopper GPU"),
]

# Tests of what is compiled once, by one worker.
of_compiled = pytest.mark.xdist_group("hopper, compiled")
PADDED = (32, 64, 96, 128, 160, 192, 256)
OUTPUTS = (("fast", "bf16"), ("balanced", "fp32"), ("accurate", "bf16"), ("accurate", "fp16"))
WIDE_OUTPUTS = (("fast", "bf16"), ("balanced", "bf16"), ("accurate", "fp16"))
# Each precision at the head dims with tiles of their own, plain and causal; with tiles of two and of three warpgroups.
VARIANTS = list(
    dict.fromkeys(
        dataclasses.replace(
            choose_variant(precision, out, *dims, has_high=causal, return_lse=causal, q_len=q_len),
            split=not causal,
        )
        for dims in (*((dim, dim) for dim in PADDED), (64, 256), (256, 64))
        for precision, out in (OUTPUTS if max(dims) <= 128 else WIDE_OUTPUTS)
        for causal in (False, True)
        if dims[0] == dims[1] or not causal
        for q_len in (8192, 128)
    )
)

# Those that leave out blocks: with four, three and two tiles in flight, with V in one piece and in two.
SKIPPING = [
    dataclasses.replace(
        choose_variant(
            precision, "bf16", dim, dim, has_high=causal, return_lse=causal, skip=True, q_len=8192
        ),
        split=not causal,
    )
    for precision, dim, causal in (
        ("fast", 128, False),
        ("accurate", 128, True),
        ("balanced", 64, False),
        ("balanced", 128, True),
        ("fast", 64, True),
        ("fast", 256, False),
        ("balanced", 96, True),
        ("accurate", 256, False),
    )
]
# Those that read lists of blocks, alone and with bits, at each number of warpgroups and of pieces of V.
LISTED = [
    dataclasses.replace(
        choose_variant(
            precision, "bf16", dim, dim, has_high=causal, return_lse=causal, skip=skip, q_len=8192,
            block_list=True, mask_bits=bits,
        ),
        split=not causal and not skip,
    )
    for precision, dim, causal, bits, skip in (
        ("fast", 128, False, True, False),
        ("balanced", 64, False, True, False),
        ("accurate", 64, True, True, False),
        ("balanced", 128, True, False, False),
        ("balanced", 128, False, True, False),
        ("fast", 64, True, True, False),
        ("fast", 64, False, False, False),
        ("accurate", 128, False, True, False),
        ("fast", 128, False, True, True),
        ("balanced", 64, False, True, True),
        ("fast", 256, True, True, False),
        ("accurate", 192, False, True, False),
    )
]  # fmt: skip
VARIANTS += SKIPPING + LISTED


# Whose parts others of the sample have, as (pv, head dims, warpgroups). V of bf16 or of fp16 changes one operand. Where three warpgroups
# are compiled, each of two has more registers; INT8 with two has 96 and 128 channels, and 64 where it skips.
REPEATING = {
    ("bf16", 64, 64, 2),
    ("fp16", 64, 64, 3),
    ("bf16", 96, 96, 2),
    ("fp16", 128, 128, 2),
    ("int8", 64, 64, 2),
    ("int8", 256, 64, 2),
    ("int8", 256, 256, 2),
}


def sampled(variant: HopperVariant) -> bool:
    """A quarter of them: each precision and number of warpgroups at the head dims of most models, plain or causal in turns."""
    if variant.skip or variant.block_list:
        return variant in SKIPPING[:3] + LISTED[:3]
    dims = variant.head_dim, variant.v_head_dim * variant.pieces
    if not set(dims) <= {64, 96, 128, 256} or (variant.pv, *dims, variant.consumers) in REPEATING:
        return False
    if dims[0] != dims[1]:
        return variant.head_dim == 256
    steps = 2 * PADDED.index(variant.head_dim)
    precision = ("fp8", "int8", "fp16", "bf16").index(variant.pv)
    return variant.split == ((steps // 2 + precision) % 2 == 0)


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["sample", "the others"]
)
def compiled(request: pytest.FixtureRequest) -> dict[HopperVariant, Compiled]:
    if reasons := compiler_reasons():
        pytest.skip("; ".join(reasons))
    variants = [variant for variant in VARIANTS if sampled(variant) == request.param]
    results = {variant: compilation.compile_variant(variant) for variant in variants}
    assert not [
        variant for variant, result in results.items() if "registers" not in result.log
    ]  # ptxas has reported
    return results


@of_compiled
def test_wgmma_runs_side_by_side(compiled: dict[HopperVariant, Compiled]) -> None:
    assert not [variant for variant, result in compiled.items() if compilation.is_serialized(result.log)]


def test_the_report_is_understood() -> None:
    assert compilation.spilled_bytes("8 bytes stack frame, 4 bytes spill stores, 24 bytes spill loads") == 28
    assert compilation.is_serialized(
        "(C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    )


@of_compiled
def test_main_loop(compiled: dict[HopperVariant, Compiled], tmp_path: Path) -> None:
    """The iteration over an unmasked block keeps everything in registers, and no operand is written while the tensor
    cores may still be reading it: ptxas was seen to do that where a move ends in an operand. INT8 with 128 channels reads up to
    three words again, which do not change: two scales with three warpgroups; so do bits of a mask with 256."""
    for variant, result in compiled.items():
        code = sass.disassemble(result.cubin, tmp_path)
        loop = code.main_loop()
        assert sum("MUFU.EX2" in line for line in loop) >= 64, variant  # it is the one that was meant
        assert [line for line in loop if re.search(r"\bSTL\b", line)] == [], variant
        loads = [line for line in loop if re.search(r"\bLDL\b", line)]
        most = 2 if variant.mask_bits and variant.head_dim == 256 else 0
        assert len(loads) <= (3 if variant.pv == "int8" and variant.v_head_dim == 128 else most), variant
        assert code.early_writes() == set(), variant
        if variant.mask_bits and not variant.skip:
            # A block with bits: seven of them become predicates at once, each score is asked for once, no weight is.
            by_bits = code.loop_past("R2P")
            assert len(by_bits) < len(loop) + 64 + 100, variant
            assert [line for line in by_bits if re.search(r"\bSTL\b", line)] == [], variant
            assert sum(bool(re.search(r"\bLDL\b", line)) for line in by_bits) <= most, variant
        if variant.skip:
            left_out = code.loop_without_product()
            # It ends where the scores of the next block are complete, and takes no exponential.
            assert sum("GMMA" in line for line in left_out) == variant.head_dim // 32, variant
            assert sum("BAR.SYNC" in line for line in left_out) == 1, variant
            assert [line for line in left_out if re.search(r"\b(MUFU.EX2|STL|LDL)\b", line)] == [], variant


@of_compiled
def test_shared_memory_fits(compiled: dict[HopperVariant, Compiled]) -> None:
    for variant, result in compiled.items():
        static = max(map(int, re.findall(r"(\d+) bytes smem", result.log)))
        assert variant.fits and variant.shared_bytes + static <= SHARED_LIMIT, variant


def test_choices() -> None:
    for precision, out in (*OUTPUTS, *WIDE_OUTPUTS, ("fast", "fp32"), ("accurate", "fp32")):
        for d, dv in itertools.product(PADDED, PADDED):
            variant = choose_variant(precision, out, d, dv, q_len=8192)
            assert variant.fits and variant.stages >= 2
            assert variant.head_dim == d and variant.v_head_dim * variant.pieces == dv
            # Registers: two levels of sums, or one. Shared memory: rows of the output, in banks of their own.
            assert variant.v_head_dim <= (192 if precision == "accurate" else 128)
            assert variant.v_head_dim // variant.out_passes % 16 == 0
            if max(d, dv) <= 128:  # measured
                passes = 2 if d == dv == 96 and precision != "balanced" else 1
                assert (variant.pieces, variant.out_passes) == (1, passes)
                assert variant.stages == 4 or not dataclasses.replace(variant, stages=variant.stages + 1).fits


def test_number_of_warpgroups() -> None:
    def consumers(precision: str, d: int, dv: int, q_len: int = 8192) -> int:
        return choose_variant(precision, "bf16", d, dv, q_len=q_len).consumers

    assert {consumers("fast", d, d) for d in PADDED} == {2}
    assert [consumers("balanced", d, d) for d in PADDED] == [3, 3, 2, 3, 2, 2, 3]  # pieces of 80, 96, 128
    assert [consumers("accurate", d, d) for d in PADDED] == [3, 3, 2, 2, 2, 2, 2]
    # Not where the last tile would be wasted: 128 of 192 rows, 320 of 576, 1,152 for 1,024.
    assert [consumers("balanced", 128, 128, q_len) for q_len in (64, 128, 192, 1024, 1152)] == [2, 2, 3, 2, 3]
    assert [consumers("balanced", 64, 64, q_len) for q_len in (64, 128, 192, 1024, 1152)] == [2, 2, 3, 3, 3]
    tile = choose_variant("balanced", "bf16", 64, 64, q_len=192)
    assert tile.block_m == 192 and tile.fits
    assert {variant.consumers for variant in SKIPPING} == {2}
    with_bits = [
        choose_variant("balanced", "bf16", dim, dim, q_len=8192, block_list=True, mask_bits=True).consumers
        for dim in PADDED
    ]
    assert with_bits == [3, 3, 2, 2, 2, 2, 2]


def test_early_writes_are_seen() -> None:
    product = "QGMMA.64x136x32.F32.E4M3.E4M3 R24, R8, gdesc[UR16], R24, gsb0"
    wait, write = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R10, R3"
    back = "BRA 0x0"
    early = sass.Code(list(enumerate([write, wait, product, back])))
    assert early.early_writes() == {write}
    assert sass.Code(list(enumerate([wait, write, product, back]))).early_writes() == set()
    assert sass.Code(list(enumerate([wait, "@P0 BRA 0x3", product, write, back]))).early_writes() == {write}


# --------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[HopperVariant]:
    """Compilations, which cost nothing here."""
    calls: list[HopperVariant] = []

    def compile_variant(variant: HopperVariant) -> Compiled:
        calls.append(variant)
        return Compiled(b"\x7fELF" + repr(variant).encode(), "")

    monkeypatch.setattr(compilation, "compile_variant", compile_variant)
    monkeypatch.setattr(compilation, "_compiler_version", lambda: (13, 0))
    monkeypatch.setattr(kept, "_warned", set())
    return calls


def test_compiled_once(counted: list[HopperVariant], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first = [compilation.cubin(variant, folder) for variant in VARIANTS[:2]]
    assert [compilation.cubin(variant, folder) for variant in VARIANTS[:2]] == first
    assert counted == VARIANTS[:2] and first[0] != first[1]
    assert len(list(folder.iterdir())) == 2


def test_another_compiler_compiles_again(
    counted: list[HopperVariant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilation.cubin(VARIANTS[0], tmp_path)
    monkeypatch.setattr(compilation, "_compiler_version", lambda: (13, 1))
    compilation.cubin(VARIANTS[0], tmp_path)
    assert len(counted) == 2


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 200])
def test_damaged_file(
    counted: list[HopperVariant], tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = compilation.cubin(VARIANTS[0], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert compilation.cubin(VARIANTS[0], tmp_path) == good
    assert "damaged" in caplog.text
    assert compilation.cubin(VARIANTS[0], tmp_path) == good and len(counted) == 2


def test_folder_that_cannot_be_written(
    counted: list[HopperVariant], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert compilation.cubin(VARIANTS[0], blocked / "folder").startswith(b"\x7fELF")
        assert compilation.cubin(VARIANTS[0], None).startswith(b"\x7fELF")
    assert caplog.text.count("not kept") == 2


# ----------------------------------------------------------------------------------------------------- refusals


def problem(
    head_dim: int = 128, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> AttentionProblem:
    spec = TensorSpec(
        (2, 4, 256, head_dim), (4 * 256 * head_dim, 256 * head_dim, head_dim, 1), dtype, torch.device("cuda")
    )
    return AttentionProblem(
        spec, spec, spec, None if mask is None else TensorSpec.of(mask).as_4d(), AttentionParams()
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (problem(264), "head_dim=264 (supported: 16 to 256 in steps of 8)"),
        (problem(mask=torch.zeros(2, 1, 1, 256)), "attn_mask dtype=float32 (supported: bool)"),
    ],
)
def test_what_goes_to_the_triton_kernel(asked: AttentionProblem, expected: str) -> None:
    assert expected in KERNEL.not_supported_reasons(asked)


@pytest.mark.parametrize(
    ("mask", "only_where_timed"),
    [
        (torch.ones(2, 1, 1, 256, dtype=torch.bool), False),
        (torch.ones(1, 256, dtype=torch.bool).expand(256, 256), False),
        (torch.ones(2, 1, 256, 256, dtype=torch.bool), True),
        (torch.ones(256, 256, dtype=torch.bool), True),
        (torch.ones(2, 4, 1, 256, dtype=torch.bool), True),
    ],
)
def test_bool_masks_are_served(mask: torch.Tensor, only_where_timed: bool) -> None:
    """ "auto" takes the kernel untimed where its figures hold: not under masks of more than keys, which Triton has figures of."""
    asked = problem(mask=mask)
    assert not [text for text in KERNEL.not_supported_reasons(asked) if "attn_mask" in text]
    found = [text for text in KERNEL.unmeasured_reasons(asked) if "attn_mask" in text]
    assert bool(found) == only_where_timed and not kernels.get("triton").unmeasured_reasons(asked)
    assert found == [text for text in KERNEL.not_chosen_reasons(asked) if "attn_mask" in text]


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage_inductor.kernels.hopper.has_gpu", lambda: True)
    monkeypatch.setattr("sage_inductor.kernels.triton.has_gpu", lambda: True)
    monkeypatch.setattr("sage_inductor.kernels.triton.capability", lambda index: (8, 9))
    monkeypatch.setattr("sage_inductor.kernels.hopper.capability", lambda index: (8, 9))
    assert "compute capability=8.9 (supported: 9.0)" in KERNEL.not_supported_reasons(problem())


def test_auto_asks_it_first() -> None:
    assert kernels.AUTO_ORDER[0] == "hopper"


# ------------------------------------------------------------------------------------------------ dealing out


@pytest.mark.parametrize("processors", [1, 78, 132])
@pytest.mark.parametrize("blocks", [0, 1, 8, 33, 128, 5000])
def test_tiles_are_dealt_out(blocks: int, processors: int) -> None:
    for tiles in (1, 2, 16, 77, 131, 132, 133, 200, 264, 500, 4096):
        grid, whole, units = share(tiles, blocks, processors)
        assert 0 < grid <= processors and 0 <= whole <= tiles
        assert units == (tiles - whole) * blocks
        if units:
            # Everybody has something to do and no more than two parts, which is what `parts` has room for.
            assert grid <= units < 2 * blocks * grid and whole % grid == 0
            assert units // grid < blocks or whole or tiles > processors


def test_what_does_not_divide_is_split() -> None:
    assert share(4096, 128, 132) == (132, 3960, 136 * 128)  # 31 rounds and 4 tiles
    assert share(16, 64, 132) == (132, 0, 16 * 64)
    assert share(16, 8, 132) == (16, 16, 0)  # too short
    assert share(264, 128, 132) == (132, 264, 0)
    assert share(263, 128, 132) == (132, 263, 0)  # one program idles


@pytest.mark.parametrize(("tiles", "blocks", "processors"), [(3, 64, 132), (263, 16, 132), (140, 100, 132)])
def test_parts_begin_where_programs_do(tiles: int, blocks: int, processors: int) -> None:
    """As `Schedule` in attention.cu deals out the blocks of the tiles that are split."""
    work = share(tiles, blocks, processors)
    expected = []
    for program in range(work.grid):
        unit, last = (work.units * number // work.grid for number in (program, program + 1))
        while unit < last:
            tile, first = divmod(unit, blocks)
            expected += [(work.whole + tile, first)] if first else []
            unit += min(blocks - first, last - unit)
    assert part_starts(work, blocks) == expected and bool(expected) == (work.units > 0)


# -------------------------------------------------------------------------------------------------- on the GPU


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("dim", [16, 40, 64, 72, 96, 120, 128, 136, 160, 192, 256])
    @pytest.mark.parametrize(
        ("q_len", "kv_len", "params"),
        [
            (1, 1, AttentionParams()),
            (300, 333, AttentionParams()),
            (257, 1000, AttentionParams(is_causal=True)),
            (1000, 640, AttentionParams(is_causal=True, bottom_right=True)),
            (500, 900, AttentionParams(window_left=130, window_right=20)),
            (129, 2048, AttentionParams(scale=-0.05)),
        ],
    )
    def test_agrees_with_the_oracle(
        self, precision: str, dim: int, q_len: int, kv_len: int, params: AttentionParams
    ) -> None:
        torch.manual_seed(dim + q_len)
        q = torch.randn(2, 4, q_len, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(2, 2, kv_len, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        params = dataclasses.replace(params, precision=precision)
        agreement.check(KERNEL, q, k, v, None, params, steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize(
        ("dim", "v_dim"), [(64, 256), (256, 64), (40, 200), (192, 128), (128, 136), (256, 160), (168, 248)]
    )
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_head_dims_that_differ(self, precision: str, dim: int, v_dim: int, is_causal: bool) -> None:
        q = torch.randn(2, 6, 200, dim, device="cuda", dtype=torch.float16)
        k = torch.randn(2, 2, 700, dim, device="cuda", dtype=torch.float16)
        v = torch.randn(2, 2, 700, v_dim, device="cuda", dtype=torch.float16)
        params = AttentionParams(is_causal=is_causal, precision=precision)
        agreement.check(KERNEL, q, k, v, None, params, steps_of_64=True)

    @pytest.mark.parametrize("precision", ["fast", "balanced"])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("kv_len", [100, 700])
    @pytest.mark.parametrize(
        "kwargs", [{}, {"is_causal": True}, {"window_left": 40}, {"skip_threshold": 0.01}], ids=str
    )
    def test_attention_sink(self, precision: str, dim: int, kv_len: int, kwargs: dict[str, Any]) -> None:
        """The first key has most of the weight, which is not what the others are rounded against."""
        q = torch.randn(2, 4, 200, dim, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(2, 2, kv_len, dim, device="cuda", dtype=torch.float16) for _ in range(2))
        for data, name in ((q, "query"), (k, "key"), (v, "value")):
            agreement.plant_sink(data, name, seed=1)
        params = AttentionParams(precision=precision, smoothing="mean", **kwargs)
        agreement.check(KERNEL, q, k, v, None, params, steps_of_64=True)
        keys = torch.rand(2, 1, 1, kv_len, device="cuda") > 0.3
        agreement.check(KERNEL, q, k, v, keys.expand(2, 4, 200, kv_len), params, steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("dim", [136, 200])
    def test_float32(self, precision: str, dim: int) -> None:
        q, k, v = (torch.randn(1, 2, 300, dim, device="cuda") for _ in range(3))
        agreement.check(KERNEL, q, k, v, None, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "q_len", "kv_len", "dim"),
        [
            (2, 1, 64, 8192, 128),  # two tiles for all programs
            (1, 1, 1, 5000, 40),
            (6, 3, 200, 3001, 64),
            (70, 70, 256, 2048, 128),  # the last full round with what is left over
            (4, 2, 100, 6000, 136),
            (1, 1, 200, 8192, 192),
            (34, 34, 256, 2048, 256),  # pieces of V count as tiles
        ],
    )
    def test_tiles_in_parts(
        self, precision: str, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int
    ) -> None:
        padded = {40: 64, 136: 160}.get(dim, dim)
        variant = choose_variant(precision, "fp16", padded, padded, q_len=q_len)
        tiles = heads * -(-q_len // variant.block_m) * variant.pieces
        assert share(
            tiles, -(-kv_len // 128), torch.cuda.get_device_properties(0).multi_processor_count
        ).units
        q = torch.randn(1, heads, q_len, dim, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(1, kv_heads, kv_len, dim, device="cuda", dtype=torch.float16) for _ in range(2))
        agreement.check(KERNEL, q, k, v, None, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("gaps", [False, True])
    @pytest.mark.parametrize("dim", [64, 160, 256])
    def test_mask_over_keys(self, precision: str, gaps: bool, dim: int) -> None:
        q, k, v = (torch.randn(3, 2, 700, dim, device="cuda", dtype=torch.float16) for _ in range(3))
        keys = torch.arange(700, device="cuda")
        mask = torch.stack([keys < 700, (keys >= 130) & (keys < 400), keys < 0])
        if gaps:
            mask &= keys % 7 != 3
        params = AttentionParams(precision=precision)
        agreement.check(KERNEL, q, k, v, mask[:, None, None], params, steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize(
        "band", [{}, {"is_causal": True}, {"window_left": 300, "window_right": 200}], ids=str
    )
    def test_one_gap_in_a_mask_over_keys(self, precision: str, band: dict[str, Any]) -> None:
        """Text that is padded in front of an image: blocks on both sides of the gap are read as they are."""
        q, k, v = (torch.randn(5, 2, 1400, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        keys = torch.arange(1400, device="cuda")
        gaps = [(300, 512), (700, 1300), (256, 384), (1, 2), (100, 130)]
        mask = torch.stack([(keys < first) | (keys >= end) for first, end in gaps])
        mask[3] &= (keys >= 130) & (keys < 1100)
        mask[4] &= keys != 900
        params = AttentionParams(precision=precision, **band)
        agreement.check(KERNEL, q, k, v, mask[:, None, None], params, steps_of_64=True)

    @pytest.mark.parametrize("dim", [128, 256])
    def test_values_beyond_the_range_of_e4m3(self, dim: int) -> None:
        """Their block has a unit of its own, and the sums before and after it another."""
        q, k, v = (torch.randn(1, 2, 1024, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        v[:, :, 300] *= 3000.0
        agreement.check(KERNEL, q, k, v, None, AttentionParams(precision="fast"), steps_of_64=True)

    @pytest.mark.parametrize("dim", [64, 192])
    def test_maxima_that_keep_growing(self, dim: int) -> None:
        q, k, v = (torch.randn(1, 2, 2048, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        k = k * torch.linspace(0.1, 3, 2048, device="cuda")[None, None, :, None].bfloat16()
        for precision in agreement.PRECISIONS:
            agreement.check(KERNEL, q, k, v, None, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("dim", [128, 256])
    def test_non_finite_inputs_show(self, dim: int) -> None:
        q, k, v = (torch.randn(1, 1, 512, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for tensor in (k, v):
            bad = tensor.clone()
            bad[0, 0, 400, 3] = math.nan
            inputs = (q, bad, v) if tensor is k else (q, k, bad)
            for precision in agreement.PRECISIONS:
                out = torch.empty_like(q)
                KERNEL.run(*inputs, None, AttentionParams(precision=precision), out, None)
                assert out.isnan().any(-1).all(), precision

    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)])
    @pytest.mark.parametrize("dim", [72, 136, 200])
    def test_output_in_any_memory_order(self, order: tuple[int, ...], dim: int) -> None:
        q, k, v = (torch.randn(2, 3, 130, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        inverse = [order.index(dim) for dim in range(4)]
        out = torch.empty([q.shape[dim] for dim in order], device="cuda", dtype=q.dtype).permute(inverse)
        agreement.check(KERNEL, q, k, v, None, AttentionParams(), out, steps_of_64=True)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 2)])
    def test_tiles_of_several_heads_are_dealt_out_together(
        self, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int
    ) -> None:
        kv_len = 290
        monkeypatch.setattr("sage_inductor.kernels.triton.launch.TOGETHER_BYTES", 2 * kv_len * 2 * 128)
        q = torch.randn(2, heads, 700, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(2, kv_heads, kv_len, 128, device="cuda", dtype=q.dtype) for _ in range(2))
        for dim in (128, 64):
            params = AttentionParams(is_causal=True)
            agreement.check(KERNEL, q[..., :dim], k[..., :dim], v, None, params, steps_of_64=True)

    @pytest.mark.parametrize("extra", [2, 1])
    @pytest.mark.parametrize("dim", [40, 72, 128, 136, 200])
    @pytest.mark.parametrize("precision", ["fast", "balanced"])
    def test_output_whose_rows_lie_anywhere(self, precision: str, extra: int, dim: int) -> None:
        """At multiples of four bytes they are written in smaller pieces, elsewhere copied."""
        q, k, v = (torch.randn(1, 3, 330, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = torch.empty(1, 3, 330, dim + extra, device="cuda", dtype=q.dtype)[..., :dim]
        agreement.check(KERNEL, q, k, v, None, AttentionParams(precision=precision), out, steps_of_64=True)

    @pytest.mark.parametrize("dim", [128, 192, 256])
    def test_the_same_bits_every_time(self, dim: int) -> None:
        """An operand overwritten too early shows as outputs that change from run to run."""
        q, k, v = (torch.randn(1, 32, 8192, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for precision in agreement.PRECISIONS:
            outs = [torch.empty_like(q) for _ in range(5)]
            for out in outs:
                KERNEL.run(q, k, v, None, AttentionParams(precision=precision), out, None)
            assert all(torch.equal(out, outs[0]) for out in outs), precision

    def test_graph_replays_beside_another_stream(self) -> None:
        q, k, v = (torch.randn(1, 4, 1024, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = torch.empty_like(q)
        params = AttentionParams(is_causal=True)
        KERNEL.run(q, k, v, None, params, out, None)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            KERNEL.run(q, k, v, None, params, out, None)
        other, stream = torch.empty_like(q), torch.cuda.Stream()
        for _ in range(20):
            for tensor in (q, k, v):
                tensor.normal_()
            expected = torch.empty_like(q)
            KERNEL.run(q, k, v, None, params, expected, None)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                KERNEL.run(q, k, v, None, params, other, None)
            out.fill_(math.nan)
            graph.replay()
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.equal(out, expected) and torch.equal(other, expected)
