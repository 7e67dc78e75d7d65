"""The memory that copies in 8 bits take: what is worked out is what the kernels ask for."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest
import torch

from sage_inductor.cli import main
from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.copies import copies_bytes, padded
from sage_inductor.measurement.memory import mebibytes, peak_bytes
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import Fingerprint, PlannedSite

pytest.importorskip("triton")


def test_head_dims_are_padded_as_the_kernels_pad_them() -> None:
    from sage_inductor.kernels.triton.workspace import padded_head_dim

    assert [padded(size) for size in range(8, 257)] == [sum(padded_head_dim(size)) for size in range(8, 257)]


@pytest.mark.parametrize("precision", ["fast", "balanced", "accurate"])
@pytest.mark.parametrize(
    ("query", "key", "value_dim"),
    [
        ((2, 4, 100, 64), (2, 2, 300, 64), 64),
        ((1, 1, 1, 16), (1, 1, 1, 16), 40),
        ((3, 8, 129, 128), (3, 8, 128, 128), 96),
        ((1, 2, 257, 256), (1, 2, 513, 256), 256),
    ],
)
@pytest.mark.parametrize(
    ("return_lse", "smoothing"), [(False, "mean"), (True, "both"), (False, "rotate"), (True, "equalise")]
)
def test_it_is_what_the_kernels_ask_for(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value_dim: int,
    precision: str,
    return_lse: bool,
    smoothing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sage_inductor.kernels.triton import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda index: 132)
    q, k = torch.empty(query, dtype=torch.float16), torch.empty(key, dtype=torch.float16)
    v = torch.empty(*key[:-1], value_dim, dtype=torch.float16)
    out = torch.empty(*query[:-1], value_dim, dtype=torch.float16)
    lse = torch.empty(query[:-1]) if return_lse else None
    params = AttentionParams(precision=precision, smoothing=smoothing)
    asked = launch.TritonAttention(q, k, v, None, params, out, lse).workspace_bytes
    worked_out = copies_bytes(query, key, value_dim, precision, return_lse, smoothing)
    assert worked_out <= asked < worked_out + 6 * 512  # each part begins at a multiple of 512


def test_fewer_dims() -> None:
    assert copies_bytes((100, 64), (300, 64), 64, "fast") == copies_bytes(
        (1, 1, 100, 64), (1, 1, 300, 64), 64, "fast"
    )
    assert copies_bytes((4, 100, 64), (4, 300, 64), 64, "fast") == copies_bytes(
        (1, 4, 100, 64), (1, 4, 300, 64), 64, "fast"
    )
    # 16-bit inputs of 4 heads, in tokens of whole blocks: half of what they take, and the scales.
    size = copies_bytes((1, 4, 4096, 128), (1, 4, 4096, 128), 128, "fast")
    assert 1.0 < size / (3 * 4 * 4096 * 128) < 1.02


def test_how_it_is_shown() -> None:
    assert mebibytes(None) == "" and mebibytes(3 * 2**19) == "1.5"
    assert mebibytes(300 * 2**20, measured=False) == "~300"
    assert peak_bytes(lambda: torch.empty(100), torch.device("cpu")) is None


@pytest.mark.parametrize("interpreted", [False, True])
def test_bench_shows_it_for_kernels_that_cannot_run_here(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Triton runs none of its kernels, as for a user without a GPU; not where the kernel takes no such problem."""
    from sage_inductor.kernels import hopper, triton

    if not interpreted:
        monkeypatch.setattr(triton, "interpreted", lambda: False)
        monkeypatch.setattr(hopper, "interpreted", lambda: False)
    out = io.StringIO()
    with redirect_stdout(out):
        for head_dim in ("64", "320"):
            shape = f"1,4,256,{head_dim}"
            main(["bench", "--shape", shape, "--kernel", "hopper", "--precision", "fast", "--device", "cpu"])
    expected = mebibytes(copies_bytes((1, 4, 256, 64), (1, 4, 256, 64), 64, "fast"), measured=False)
    rows = [line for line in out.getvalue().splitlines() if line.startswith("hopper")]
    assert "MiB" in out.getvalue() and expected in rows[0] and "~" not in rows[1]
    assert interpreted or torch.cuda.is_available() or "device=cpu" in rows[0]


def test_a_plan_shows_it_for_its_decisions() -> None:
    fingerprint = Fingerprint("sdpa", "model.py: x", 1, 4, 4, 64, 64, "none")
    shape = "1x4x256x64 bfloat16 NHD"
    decided = [
        PlannedSite("a", fingerprint, "fast", query=shape, key=shape, value=shape),
        PlannedSite("b", fingerprint, "sdpa", query=shape, key=shape, value=shape),
        PlannedSite("c", fingerprint, "accurate", query="1x4xs0x64 bfloat16 NHD", key=shape, value=shape),
        PlannedSite("d", fingerprint, "accurate", query=f"{shape} of dp=2: S(0)", key=shape, value=shape),
    ]
    header, rows = Plan("rel_l2", 0.05, tuple(decided), ()).table()
    sizes = [copies_bytes((1, 4, 256, 64), (1, 4, 256, 64), 64, name) for name in ("fast", "accurate")]
    assert header[-1] == "MiB"
    assert [row[-1] for row in rows] == [mebibytes(sizes[0], False), "", "", mebibytes(sizes[1], False)]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "hopper"])
def test_a_gpu_takes_as_much(kernel: str) -> None:
    from sage_inductor import kernels, sage_attention

    device = torch.device("cuda")
    if kernels.get(kernel).unavailable_reasons(device):
        pytest.skip(f"{kernel} cannot run here")
    q, k, v = (torch.randn(1, 8, 2048, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)

    def call() -> torch.Tensor:
        return sage_attention(q, k, v, kernel=kernel, precision="balanced", out=out)

    call()
    peak, worked_out = peak_bytes(call, device), copies_bytes(q.shape, k.shape, 128, "balanced")
    assert peak is not None and 0.95 * worked_out < peak < 1.3 * worked_out + 2**25  # hopper splits tiles
