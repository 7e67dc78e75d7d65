"""A ring whose keys and values travel in 8 bits is as near to exact attention as a single process, and sends half as much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks
from torch import Tensor

from sage_inductor import Config, NotEligibleError, sage_attention
from sage_inductor.operators.distributed import shards as in_turn
from sage_inductor.operators.distributed.wires import around
from sage_inductor.operators.schemas import WIRES
from sage_inductor.testing import RewritingBackend, relative_l2

B, H, N, D = 2, 4, 384, 32  # with two ranks, chunks of 96 keys share a block of 128
MARGIN = 1.1  # times the error of a single process
WAYS = [(False, False), (True, False), (True, True)]  # (is_causal, balanced)


def inputs(kv_heads: int = H, tokens: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Keys whose mean differs from shard to shard, and values with a mean."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(B, H, tokens, D, generator=generator)
    k, v = (torch.randn(B, kv_heads, tokens, D, generator=generator) for _ in range(2))
    means = 2 * torch.randn(4, 1, kv_heads, 1, D, generator=generator)
    k = torch.cat([chunk + mean for chunk, mean in zip(k.chunk(4, 2), means, strict=True)], 2)
    return [tensor.to(dtype) for tensor in (q, k, v + 1)]


@contextmanager
def context(mesh: Any, balanced: bool, *buffers: Tensor) -> Iterator[None]:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

    _cp_options.enable_load_balance = balanced
    with context_parallel(mesh, buffers=list(buffers), buffer_seq_dims=[2] * len(buffers)):
        yield


@contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """What this rank sends in 8 bits."""
    sent: list[int] = []
    send = in_turn.sent_to_next

    def counted(packed: Tensor, *args: Any) -> Tensor:
        sent.append(packed.numel() * packed.itemsize)
        return send(packed, *args)

    in_turn.sent_to_next = counted
    try:
        yield sent
    finally:
        in_turn.sent_to_next = send


def errors(mesh: Any, buffers: list[Tensor], balanced: bool, **options: Any) -> dict[str, float]:
    """Of this rank's part of the output, and of the LSE, against exact attention: of a single process, and of rings with either
    kind of wires."""
    with torch.no_grad():
        one, one_lse = sage_attention(*buffers, **options, return_lse=True)
    is_causal = options.get("is_causal", False)
    q, k, v = (tensor.double() for tensor in buffers)
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    scores = q @ k.mT * D**-0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    exact, exact_lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    found, strides = {}, {}
    for kind in ("inputs", "8-bit"):
        parts = [exact, one, *(tensor[..., None] for tensor in (exact_lse, one_lse)), *buffers]
        mine, alone, lse, alone_lse, *shards = parts = [tensor.clone() for tensor in parts]
        with torch.no_grad(), context(mesh, balanced, *parts):
            out, out_lse = sage_attention(*shards, **options, wires=kind, return_lse=True)
            found["one"], found["one lse"] = relative_l2(alone, mine), relative_l2(alone_lse, lse)
            found[kind], found[f"{kind} lse"] = relative_l2(out, mine), relative_l2(out_lse, lse[..., 0])
        strides[kind] = out.stride()
        assert out.dtype == buffers[0].dtype
    assert strides["8-bit"] == strides["inputs"]
    return found


@on_every_rank
def no_farther_from_exact_attention(mesh: Any) -> None:
    for kv_heads, smoothing in ((H, "auto"), (2, "mean")):
        for is_causal, balanced in WAYS:
            buffers = inputs(kv_heads)
            options = {"is_causal": is_causal, "enable_gqa": kv_heads != H, "kernel": "reference"}
            found = errors(mesh, buffers, balanced, precision="fast", smoothing=smoothing, **options)
            assert found["8-bit"] <= MARGIN * found["one"], (options, balanced, found)
            assert found["8-bit"] <= MARGIN * found["inputs"], (options, balanced, found)
            # Where it is balanced a shard's two chunks have one mean, and were quantised apart before; what else evens channels
            # goes by the owner's queries.
            if smoothing == "mean" and not balanced:
                assert abs(found["8-bit"] / found["inputs"] - 1) < 1e-4, found
            assert found["8-bit lse"] <= MARGIN * max(found["one lse"], found["inputs lse"]), found


@on_every_rank
def every_precision_and_smoothing(mesh: Any) -> None:
    plain = inputs(2)
    outliers = torch.ones(D)
    outliers[[3, 17]] = 30.0
    uneven = [plain[0], plain[1] * outliers, plain[2]]
    cases = [
        ("balanced", "mean"),
        ("accurate", "mean"),
        ("accurate", "equalise"),
        ("fast", "rotate"),
        ("fast", "both"),
    ]
    for precision, smoothing in cases:
        buffers = plain if smoothing == "mean" else uneven
        options = {"precision": precision, "smoothing": smoothing, "enable_gqa": True, "kernel": "reference"}
        found = errors(mesh, buffers, True, is_causal=True, **options)
        assert found["8-bit"] <= MARGIN * max(found["one"], found["inputs"]), (options, found)


@on_every_rank
def half_of_the_bytes(mesh: Any) -> None:
    buffers = inputs(tokens=512, dtype=torch.bfloat16)  # whole blocks
    whole = sum(tensor.nbytes for tensor in buffers[1:]) // mesh.size()  # of a rank's keys and values
    with torch.no_grad(), context(mesh, True, *buffers), counting_bytes() as sent:
        sage_attention(*buffers, is_causal=True, kernel="reference", wires="inputs")
        assert sent == []
        sage_attention(*buffers, is_causal=True, kernel="reference", wires="8-bit")
    assert len(sent) == mesh.size() - 1 and len(set(sent)) == 1
    # Beside K and V: of each head 4 numbers a channel and 2 for 128 keys, and some of 3 * 512 bytes between the parts.
    beside = B * H * 4 * (4 * D + 2 * 512 // mesh.size() // 128) + 3 * 512
    assert whole // 2 < sent[0] < whole // 2 + beside, (sent, whole)


@on_every_rank
def compiled(mesh: Any) -> None:
    from test_rings import Attention, teach_rings_of_cpus
    from torch._dynamo import lookup_backend

    from sage_inductor.rewriting.driver import rewrite_graph

    config = Config(kernel="reference", precision="fast", wires="8-bit")
    targets = []

    def traced(graph_module: Any, example_inputs: Any) -> Any:
        """As Inductor gets it."""
        (site,) = rewrite_graph(graph_module.graph, config)
        assert site.rewritten, site
        targets.extend(str(node) for node in graph_module.graph.nodes if "8-bit" in node.kwargs.values())
        graph_module.recompile()
        return lookup_backend("aot_eager")(graph_module, example_inputs)

    for backend, ways in ((RewritingBackend(config), WAYS[1:]), (traced, WAYS[2:])):
        for is_causal, balanced in ways:
            options = {"is_causal": is_causal, "enable_gqa": True}
            buffers = inputs(2)
            one = sage_attention(*buffers, **options, kernel="reference")
            exact = F.scaled_dot_product_attention(*buffers, **options)
            mine, alone = exact.clone(), one.clone()
            torch.compiler.reset()
            teach_rings_of_cpus()
            with torch.no_grad(), context(mesh, balanced, *buffers, mine, alone), counting_bytes() as sent:
                out = torch.compile(Attention(**options), backend=backend)(*buffers)
                assert relative_l2(out, mine) <= MARGIN * relative_l2(alone, mine)
            assert len(set(sent)) == 1  # traced once more where it is traced
    assert len(targets) == 1


@on_every_rank
def what_is_not_in_8_bits(mesh: Any) -> None:
    buffers = inputs()
    exact = F.scaled_dot_product_attention(*buffers)
    whole = sage_attention(*buffers, kernel="reference", wires="8-bit")  # one rank alone
    assert torch.equal(whole, sage_attention(*buffers, kernel="reference"))
    mine = exact.clone()
    with torch.no_grad(), context(mesh, False, *buffers, mine), counting_bytes() as sent:
        # "auto" finds no kernel on a CPU: attention is exact, and so are the wires.
        assert relative_l2(sage_attention(*buffers, wires="8-bit"), mine) < 1e-5
        assert sent == []
        for kernel, word in (
            ("sageattention", "kernel=sageattention (supported: "),
            ("hopper", "kernel=hopper with wires"),
        ):
            try:
                sage_attention(*buffers, kernel=kernel, wires="8-bit")
            except NotEligibleError as error:
                assert word in str(error), error
            else:
                raise AssertionError(kernel)
        try:
            sage_attention(*buffers, wires="4-bit")
        except ValueError as error:
            assert "wires='4-bit' (valid: inputs, 8-bit)" in str(error)
        else:
            raise AssertionError("4-bit")


@on_every_rank
def the_operator_keeps_its_contract(mesh: Any) -> None:
    operator = torch.ops.sage_inductor.attention_of_ring.default
    q, k, v = inputs(2, 64)
    where = {
        "group_name": mesh.get_group().group_name,
        "rank": mesh.get_local_rank(),
        "ranks": mesh.size(),
        "kernel_name": "reference",
        "enable_gqa": True,
    }
    mask = torch.rand(B, 1, 1, 64 * mesh.size()) > 0.3
    for kind in WIRES:
        for is_causal, balanced in WAYS:
            how = {**where, "wires": kind, "is_causal": is_causal, "is_balanced": balanced}
            torch.library.opcheck(operator, (q, k, v), how)
    torch.library.opcheck(operator, (q, k, v, mask), where)
    refused = [
        ((q, k, v, mask), {"wires": "8-bit"}, NotEligibleError, "attn_mask=given (supported: none)"),
        ((q, k, v), {"wires": "4-bit"}, ValueError, "wires='4-bit' (valid: inputs, 8-bit)"),
        ((q.clone().requires_grad_(), k, v), {}, NotEligibleError, "requires_grad=query"),
    ]
    for given, options, error, words in refused:
        try:
            operator(*given, **where, **options)
        except error as raised:
            assert words in str(raised), raised
        else:
            raise AssertionError(words)


@on_every_rank
def as_inputs_it_is_attention_to_all(mesh: Any) -> None:
    """Causal, balanced and masked, in the ring of this package; outputs of each rank against exact attention."""
    buffers = inputs()
    rank, ranks = mesh.get_local_rank(), mesh.size()
    tail = torch.rand(B, 1, 1, N) > 0.3
    tail[0, ..., N // ranks :] = False  # nothing to attend to on the ranks behind the first
    for is_causal, balanced, mask in (*((*way, None) for way in WAYS), (False, False, tail)):
        chunks = [2 * rank, 2 * rank + 1] if not balanced else [rank, 2 * ranks - 1 - rank]
        exact = F.scaled_dot_product_attention(*buffers, mask, is_causal=is_causal)
        one = sage_attention(*buffers, mask, is_causal=is_causal, kernel="reference")
        mine, alone, *shards = (
            torch.cat([tensor.chunk(2 * ranks, 2)[chunk] for chunk in chunks], 2)
            for tensor in (exact, one, *buffers)
        )
        out, _ = around(
            mesh.get_group(), rank, ranks, *shards, mask, is_causal=is_causal, is_balanced=balanced,
            kernel_name="reference",
        )  # fmt: skip
        assert 0 < relative_l2(out, mine) <= MARGIN * relative_l2(alone, mine), (is_causal, balanced, mask)


test_on_two_ranks = on_ranks(__file__, 2)
test_on_four_ranks = pytest.mark.slow(on_ranks(__file__, 4))

if __name__ == "__main__":
    main(globals())
