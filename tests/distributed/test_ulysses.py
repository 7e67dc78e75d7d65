"""Ulysses as one operator: parts of the sequence for parts of the heads and back, by collectives (gloo on a CPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks
from torch import Tensor

from sage_inductor import NotEligibleError, sage_attention
from sage_inductor.operators.distributed.ulysses import attention_of_ulysses
from sage_inductor.testing import relative_l2

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")

B, H, D, TOKENS = 2, 4, 32, 150  # tokens of a rank: no whole blocks of 128
MARGIN = 1.1  # times the error of a single process


def problem(
    mesh: Any, kv_heads: int = H, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value of all ranks, `[batch, heads, seq, head_dim]`, and this rank's part. Keys of each rank have their own mean."""
    generator = torch.Generator().manual_seed(0)
    seq = TOKENS * mesh.size()
    whole = [torch.randn(B, seq, heads, D, generator=generator) for heads in (H, kv_heads, kv_heads)]
    whole[1] += 3 * torch.randn(mesh.size(), kv_heads, D, generator=generator).repeat_interleave(TOKENS, 0)
    given = [tensor.to(dtype).transpose(1, 2) for tensor in whole]
    return given, [of_rank(mesh, tensor) for tensor in given]


def of_rank(mesh: Any, tensor: Tensor) -> Tensor:
    return tensor.chunk(mesh.size(), 2)[mesh.get_local_rank()]


def exchange(mesh: Any, part: list[Tensor], mask: Tensor | None = None, **options: Any) -> list[Tensor]:
    found: list[Tensor] = attention_of_ulysses(
        *part, mask, group_name=mesh.get_group().group_name, rank=mesh.get_local_rank(), ranks=mesh.size(),
        kernel_name="reference", **options,
    )  # fmt: skip
    return found


def masks(seq: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(B, 1, 1, seq, generator=generator) < 0.7
    by_head = torch.randn(1, H, seq, seq, generator=generator)
    return {"padding": keep, "a bias of each head": by_head, "rows": keep[0, 0].expand(seq, seq)}


@on_every_rank
def is_attention_to_all(mesh: Any) -> None:
    for kv_heads in (H, 2 if mesh.size() == 2 else H):
        whole, part = problem(mesh, kv_heads)
        for is_causal in (False, True):
            how: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": kv_heads != H}
            out, lse = exchange(mesh, part, return_lse=True, **how)
            alone, alone_lse = sage_attention(*whole, kernel="reference", return_lse=True, **how)
            # Heads are computed as by one process, but for the order of float32 sums, by which a few numbers are rounded the other way.
            assert relative_l2(out, of_rank(mesh, alone)) < 1e-3
            torch.testing.assert_close(lse, of_rank(mesh, alone_lse), atol=2e-3, rtol=0)
            (without,) = exchange(mesh, part, **how)
            assert torch.equal(without, out)
            assert without.stride() == torch.empty_like(part[0]).stride()


@on_every_rank
def with_masks(mesh: Any) -> None:
    whole, part = problem(mesh)
    for name, mask in masks(TOKENS * mesh.size()).items():
        (out,) = exchange(mesh, part, mask)
        alone = of_rank(mesh, sage_attention(*whole, mask, kernel="reference"))
        assert relative_l2(out, alone) < 1e-3, name


@on_every_rank
def in_8_bits(mesh: Any) -> None:
    for kv_heads in (H, 2 if mesh.size() == 2 else H):
        whole, part = problem(mesh, kv_heads, torch.bfloat16)
        exact = of_rank(mesh, F.scaled_dot_product_attention(*(x.double() for x in whole), enable_gqa=True))
        for precision in ("fast", "accurate"):
            for smoothing in ("mean", "auto"):
                how: dict[str, Any] = {"precision": precision, "smoothing": smoothing, "enable_gqa": True}
                alone = of_rank(mesh, sage_attention(*whole, kernel="reference", **how))
                out, lse = exchange(mesh, part, wires="8-bit", return_lse=True, **how)
                error, of_one = relative_l2(out.double(), exact), relative_l2(alone.double(), exact)
                assert 0 < error < MARGIN * of_one, (precision, smoothing, error, of_one)
                _, alone_lse = sage_attention(*whole, kernel="reference", return_lse=True, **how)
                torch.testing.assert_close(lse, of_rank(mesh, alone_lse), atol=0.05, rtol=0.01)


@on_every_rank
def what_it_does_not_do_is_said(mesh: Any) -> None:
    _, part = problem(mesh)
    mask = masks(TOKENS * mesh.size())["padding"]
    for error, text, call in (
        (NotEligibleError, "attn_mask=given (supported: none", lambda: exchange(mesh, part, mask, wires="8-bit")),
        (NotEligibleError, "is_causal=given", lambda: exchange(mesh, part, is_causal=True, wires="8-bit")),
        (ValueError, "wires='4-bit' (valid: inputs, 8-bit)", lambda: exchange(mesh, part, wires="4-bit")),
        (RuntimeError, "whose heads the ranks divide", lambda: exchange(mesh, [x[:, :3] for x in part])),
        (NotEligibleError, "requires_grad", lambda: exchange(mesh, [x.clone().requires_grad_() for x in part])),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value), caught.value


@on_every_rank
def compiled(mesh: Any) -> None:
    """One graph for all lengths, with the numbers of eager mode."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    call = torch.compile(lambda *part: exchange(mesh, list(part))[0] * 2, backend=count, fullgraph=True)
    for tokens in (40, 50, 60):
        part = [tensor[:, :, :tokens] for tensor in problem(mesh)[1]]
        torch.testing.assert_close(call(*part), exchange(mesh, part)[0] * 2)
    assert graphs == 2  # of numbers, and of symbols


test_on_two_ranks = on_ranks(__file__, 2)
test_on_four_ranks = pytest.mark.slow(on_ranks(__file__, 4))

if __name__ == "__main__":
    main(globals())
