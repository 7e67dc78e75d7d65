"""Segments in the Triton kernel, through Triton's interpreter where there is no GPU, and in the oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import agreement
import pytest
import torch
from agreement import DEVICE, DOCUMENTED, PRECISIONS
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams, AttentionProblem, Segments, TensorSpec
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.triton import TritonKernel
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.testing import relative_l2

pytest.importorskip("triton")

from sage_inductor.kernels.triton.segments import SPAN  # noqa: E402

KERNEL = TritonKernel()
run = partial(agreement.run, KERNEL)
check = partial(agreement.check, KERNEL)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def documents(*lengths: int, first: int = 0) -> Tensor:
    return ids([first + number for number, length in enumerate(lengths) for _ in range(length)])


def drawn(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, dtype=torch.int32, device=DEVICE)


# 600 tokens: one document inside a block, one that fills blocks, one of a single token.
PACKED = documents(30, 170, 256, 1, 143, first=-2)
LAYOUTS: dict[str, Segments] = {
    "packed": Segments(PACKED, PACKED),
    "one document": Segments(documents(300), documents(300)),
    "an id comes back": Segments(ids([0] * 150 + [7] * 150 + [0] * 100), ids([0] * 150 + [7] * 150 + [0] * 100)),
    "two documents share an id": Segments(ids([3] * 90 + [1] * 200 + [3]), ids([3] * 90 + [1] * 200 + [3])),
    "descending": Segments(PACKED.flip(1), PACKED.flip(1)),
    "the extremes": Segments(
        ids([2**31 - 1] * 70 + [-(2**31)] * 70), ids([-(2**31)] * 130 + [0] * 130 + [2**31 - 1] * 130)
    ),
    "disjoint": Segments(documents(70), documents(300, first=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_agrees_with_the_oracle_and_float64(name: str) -> None:
    segments = LAYOUTS[name]
    q, k, v = (randn(1, 1, ids.shape[1], 64) for ids in (segments.query, segments.key, segments.key))
    out, lse = run(q, k, v, segments=segments)
    assert agreement.disagreements(out, lse, q, k, v, segments=segments) == []
    expected, expected_lse = float64_attention(q, k, v, segments=segments)
    blind = expected_lse.isinf()
    assert torch.equal(lse.isinf(), blind) and not out[blind].any()
    if not blind.all():
        assert relative_l2(out, expected) <= DOCUMENTED["fast"]
    assert bool(blind.all()) == (name == "disjoint")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "kwargs",
    [{"is_causal": True}, {"window_left": 60, "window_right": 20}, {"is_causal": True, "bottom_right": True}],
    ids=["causal", "window", "bottom-right"],
)
def test_beside_a_band(precision: str, kwargs: dict[str, Any]) -> None:
    q, k, v = randn(1, 2, 150, 64), randn(1, 1, 600, 64), randn(1, 1, 600, 64)
    segments = Segments(PACKED[:, -150:] if "bottom_right" in kwargs else PACKED[:, 20:170], PACKED)
    check(q, k, v, params=AttentionParams(precision=precision, **kwargs), segments=segments)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 300), (2, 1, 140, 300), (2, 2, 140, 300)], ids=["keys", "queries", "heads"]
)
@pytest.mark.parametrize("additive", [False, True])
def test_beside_a_mask(shape: tuple[int, ...], additive: bool) -> None:
    mask = torch.rand(shape, device=DEVICE) > 0.3
    given = torch.where(mask, torch.randn(shape, device=DEVICE), -torch.inf) if additive else mask
    q, k, v = randn(2, 2, 140, 64), randn(2, 2, 300, 64), randn(2, 2, 300, 64)
    segments = Segments(drawn(2, 140), drawn(2, 300))
    check(q, k, v, given, AttentionParams(is_causal=additive), steps_of_64=True, segments=segments)


def test_ids_are_read_through_their_strides() -> None:
    q, k, v = randn(2, 1, 140, 64), randn(2, 1, 200, 64), randn(2, 1, 200, 64)
    segments = Segments(drawn(1, 140).expand(2, 140), drawn(200, 4)[:, 1:3].mT)
    dense, _ = run(q, k, v, segments=Segments(*(ids.contiguous() for ids in segments)))
    assert torch.equal(run(q, k, v, segments=segments)[0], dense)


@pytest.mark.parametrize("arch", [(9, 0), (8, 9)])
@pytest.mark.parametrize(("precision", "dim"), [("fast", 96), ("balanced", 128), ("fast", 256), ("accurate", 256)])  # fmt: skip
def test_launch_configurations_of_their_own(
    arch: tuple[int, int], precision: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_inductor.kernels.triton import launch

    monkeypatch.setattr(launch, "INTERPRETED_ARCH", arch)
    monkeypatch.setattr(launch, "capability", lambda index: arch)
    q, k, v = (randn(1, 1, 300, dim) for _ in range(3))
    segments = Segments(PACKED[:, :300], PACKED[:, :300])
    check(q, k, v, params=AttentionParams(precision=precision), steps_of_64=True, segments=segments)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranges_of_blocks_are_those_of_their_ids(name: str) -> None:
    from sage_inductor.kernels.triton.launch import TritonAttention

    given = LAYOUTS[name]
    segments = Segments(*(torch.cat([ids, ids.flip(1)]) for ids in given))
    q, k = (randn(2, 1, ids.shape[1], 64) for ids in segments)
    call = TritonAttention(q, k, k, None, AttentionParams(), torch.empty_like(q), None, segments=segments)
    assert call.segments is not None
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=DEVICE)
    call._look_at_segments(call.stream(), segments, workspace)
    found = call.segments.of(workspace)
    for ids, size in zip(segments, (call.plan.config.block_m, call.plan.config.block_n), strict=True):
        blocks = [[row[start : start + size] for start in range(0, len(row), size)] for row in ids.tolist()]
        padded = [[block + [block[-1]] * (size - len(block)) for block in row] for row in blocks]
        count = 2 * len(blocks[0]) * size
        assert found[:count].view(2, -1, size).tolist() == padded
        found = found[count:]
    for ids, size in zip(segments, (call.plan.config.block_m, call.plan.config.block_n), strict=True):
        parts = [row.split(size) for row in ids]
        ranges = [[[int(end(part)) for part in row] for row in parts] for end in (torch.min, torch.max)]
        count = 4 * len(parts[0])
        assert found[:count].view(2, 2, -1).tolist() == ranges
        found = found[count:]
    blocks = segments[1].split(call.plan.config.block_n, 1)
    falls = torch.stack(
        [(following[:, 1:] < following[:, :-1]).any(1) for following in _with_the_next(segments[1], blocks)],
        1,
    )
    assert found[: falls.numel()].view(2, -1).bool().tolist() == falls.tolist()
    assert found[falls.numel() :].numel() == 2 * -(-q.shape[2] // call.plan.config.block_m) * SPAN


def _with_the_next(ids: Tensor, blocks: tuple[Tensor, ...]) -> list[Tensor]:
    """Each block with the id behind it, where there is one."""
    ends = torch.tensor([block.shape[1] for block in blocks]).cumsum(0).tolist()
    return [torch.cat([block, ids[:, end : end + 1]], 1) for block, end in zip(blocks, ends, strict=True)]


@pytest.mark.parametrize(
    "band", [{}, {"is_causal": True}, {"is_causal": True, "bottom_right": True}, {"window_left": 90, "window_right": 200}]
)  # fmt: skip
@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_are_those_of_their_ids(name: str, band: dict[str, Any]) -> None:
    """First and last block that a tile has to read, and the first run of blocks of one id, by ids and bounds alone."""
    from sage_inductor.kernels.triton.launch import TritonAttention

    segments = Segments(*(torch.cat([ids, ids.flip(1)]) for ids in LAYOUTS[name]))
    q, k = (randn(2, 1, ids.shape[1], 64) for ids in segments)
    q_len, kv_len = q.shape[2], k.shape[2]
    params = AttentionParams(**band)
    call = TritonAttention(q, k, k, None, params, torch.empty_like(q), None, segments=segments)
    assert call.segments is not None
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=DEVICE)
    call._look_at_segments(call.stream(), segments, workspace)
    m, n = call.plan.config.block_m, call.plan.config.block_n
    spans = call.segments.of(workspace)[-2 * -(-q_len // m) * SPAN :].view(2, -1, SPAN).tolist()
    low, high = params.bounds(q_len, kv_len)
    for b in range(2):
        for tile, span in enumerate(spans[b]):
            rows = range(tile * m, min(tile * m + m, q_len))
            own = segments[0][b, rows[0] : rows[-1] + 1].tolist()
            reads, whole = [], []
            for block in range(-(-kv_len // n)):
                keys = segments[1][b, block * n : block * n + n].tolist()
                if low is not None and block * n + n - 1 < rows[0] + low:
                    continue
                if high is not None and block * n > rows[-1] + high:
                    continue
                if min(keys) <= max(own) and max(keys) >= min(own):
                    reads.append(block)
                cut = len(keys) < n or (low is not None and block * n < rows[-1] + low)
                cut = cut or (high is not None and block * n + n - 1 > rows[0] + high)
                if not cut and len({*keys, *own}) == 1:
                    whole.append(block)
            assert span[1] - span[0] == (reads[-1] + 1 - reads[0] if reads else 0)
            assert not reads or span[0] == reads[0]
            run = [block for i, block in enumerate(whole) if block == whole[0] + i]
            assert span[3] - span[2] == len(run) and (not run or span[2] == run[0])


def test_blocks_of_other_segments_are_not_read_and_ids_of_whole_ones_neither() -> None:
    """What is wrong there does not show: NaN in blocks whose range of ids does not meet, ids that change too late in others."""
    from sage_inductor.kernels.triton.launch import TritonAttention

    q, k, v = randn(1, 1, 128, 64), randn(1, 1, 512, 64), randn(1, 1, 512, 64)
    segments = Segments(documents(128), documents(256, 128, 128))
    out = torch.empty_like(q)
    call = TritonAttention(q, k, v, None, AttentionParams(), out, None, segments=segments)
    assert call.segments is not None
    workspace = call.quantize(q, k, v, None, segments=segments)
    k8 = call.k8.of(workspace).view(512, 64)
    k8[256:] = 99
    k_scale = call.scales.of(workspace)[call.sizes.q_size :][:4]
    k_scale[2:] = torch.nan
    call.segments.of(workspace)[128 : 128 + 256] = 5  # the copies of the first keys' ids
    call.attend(workspace, None, out, None)
    expected, _ = reference.attention(q, k, v, segments=segments)
    assert relative_l2(out, expected) <= DOCUMENTED["fast"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mean_of_each_document_is_within_the_documented_error(precision: str) -> None:
    """K is smoothed over all documents together. One whose K lies elsewhere, by its own deviation, costs no more than that."""
    q, k, v = (torch.randn(1, 2, 384, 64) for _ in range(3))
    k += torch.where(documents(100, 284)[0, :, None].cpu() == 0, 1.0, -1.0) * torch.randn(64)
    segments = Segments(documents(100, 284).cpu(), documents(100, 284).cpu())
    out, _ = reference.attention(q, k, v, precision=precision, segments=segments)
    expected, _ = float64_attention(q, k, v, segments=segments)
    assert relative_l2(out, expected) <= 1.2 * DOCUMENTED[precision]


def problem_with_segments(device: str = "cuda") -> AttentionProblem:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    spec = TensorSpec((1, 32, 16384, 128), (32 * 16384 * 128, 16384 * 128, 128, 1), torch.bfloat16, where)
    ids = TensorSpec((1, 16384), (16384, 1), torch.int32, where)
    return AttentionProblem(spec, spec, spec, None, AttentionParams(), False, ids, ids)


@pytest.mark.parametrize("name", ["sageattention"])
def test_kernels_without_segments_say_so(name: str) -> None:
    assert "segments (supported: none)" in kernels.get(name).not_supported_reasons(problem_with_segments())


def test_auto_takes_triton_only_where_it_was_measured() -> None:
    reasons = ['segments (not measured yet: by tune="measure", or kernel="triton")']
    assert KERNEL.not_chosen_reasons(problem_with_segments()) == reasons
    assert KERNEL.unmeasured_reasons(problem_with_segments()) == reasons
    assert KERNEL.not_supported_reasons(problem_with_segments(DEVICE)) == []
