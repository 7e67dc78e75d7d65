"""A ring in which the next shard travels while this one is attended to, and what travels.

Each rank sends its shard of keys and values to the next, attends to it, and goes on with what has come from the one before; parts are
merged by their LSE (Ring Attention, Liu et al. 2023). `around` is that loop, also in a compiled graph: what is sent is waited for where
it is attended to.

As inputs: keys and values travel in their own dtype, K and V each in a message of its own, without a copy where they are dense.

In 8 bits: each rank quantises its shard once, sends it on as bytes, and attends to what comes around as it came. That is about half of
what bf16 takes, and a shard is not quantised again by each rank that receives it. K's mean, which is subtracted before, and the
factors that even channels are the shard's own. So each rank quantises its queries for each shard: what the mean took from their
scores is put back into the LSE of that part, which makes merging the parts exact, and queries are multiplied by the very factors
that the keys were divided by. Factors in common would save that pass over the queries (a hundredth of a step) and cost all ranks
a collective that they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.sizes import size_hint
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.smoothing import EQUALISING
from sage_inductor.operators.choice import Choice, chosen
from sage_inductor.operators.prequantized import attention_prequantized_op, quantize_key_value_op
from sage_inductor.operators.schemas import EXACT
from sage_inductor.torch_internals.distributed import arrived, sent_to_next

SEQ = 2  # of `[batch, heads, seq, head_dim]`
Shard: TypeAlias = tuple[Tensor, ...]
"""What travels of a rank's keys and values: dense tensors of one dim."""


class Part(Protocol):
    """(output, LSE) of queries to a shard."""

    def __call__(
        self, query: Tensor, shard: Shard, owner: int, kv_len: int | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`owner`: the rank that the shard is of. `kv_len`: keys that are attended to, the first ones; None for all."""


def kernel_of_wires(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Choice | None:
    """How this rank's shards are quantised to go around in 8 bits; None where attention is exact: for kernel "auto" where there is
    no faster one, for lengths below `min_q_len` or `min_kv_len`. Ranks whose shards and GPUs are alike find the same. Lengths
    count as they are traced. Raises NotEligibleError for a kernel asked for by name that cannot do it, and for a skip_threshold."""
    name = options.get("kernel_name", "auto")
    if threshold := options.get("skip_threshold"):
        raise NotEligibleError(
            f'kernel={name} with wires="8-bit"', [reason("skip_threshold", threshold, "0")]
        )
    if name == EXACT:
        return None
    for tensor, least in ((query, options.get("min_q_len", 0)), (key, options.get("min_kv_len", 0))):
        if least and (size_hint(tensor.shape[SEQ]) or 0) < least:
            return None
    return chosen(
        query, key, value, kernel=name, precision=options.get("precision", "fast"),
        smoothing=options.get("smoothing", "auto"), or_exact=bool(options.get("or_exact")),
    )  # fmt: skip


def in_8_bits(
    query: Tensor, key: Tensor, value: Tensor, choice: Choice, scale: float | None = None
) -> tuple[Shard, Part]:
    """The shard of this rank's keys and values, quantised, and attention to such shards."""
    how = {"kernel_name": choice.kernel, "precision": choice.precision, "smoothing": choice.smoothing}
    packed = quantize_key_value_op(key, value, query if choice.smoothing in EQUALISING else None, **how)
    keys = key.shape[SEQ]

    def part(
        query: Tensor, shard: Shard, owner: int, kv_len: int | None = None, is_causal: bool = False
    ) -> Any:
        return attention_prequantized_op(
            query, shard[0], kv_heads=key.shape[1], kv_len=keys if kv_len is None else kv_len, stored_len=keys,
            value_head_dim=value.shape[-1], is_causal=is_causal, scale=scale, **how,
        )  # fmt: skip

    return (packed,), part


def as_inputs(key: Tensor, value: Tensor, attention: Callable[..., Any]) -> tuple[Shard, Part]:
    """The shard of this rank's keys and values as they are, and attention to such shards: `attention(query, key, value, owner,
    is_causal)` gives (output, LSE). They travel as `[batch, seq, heads, head_dim]` lie in memory."""
    dense = [tensor.transpose(1, SEQ).contiguous() for tensor in (key, value)]
    shapes = [tensor.shape for tensor in dense]

    def part(
        query: Tensor, shard: Shard, owner: int, kv_len: int | None = None, is_causal: bool = False
    ) -> Any:
        tensors = [flat.view(shape).transpose(1, SEQ) for flat, shape in zip(shard, shapes, strict=True)]
        if kv_len is not None:
            tensors = [tensor[:, :, :kv_len] for tensor in tensors]
        return attention(query, *tensors, owner, is_causal)

    return tuple([tensor.view(-1) for tensor in dense]), part


def around(
    group: Any,
    rank: int,
    ranks: int,
    query: Tensor,
    shard: Shard,
    part: Part,
    *,
    keys: int,
    is_causal: bool = False,
    is_balanced: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, LSE) of this rank's queries `[batch, heads, seq / ranks, head_dim]` to the keys of all ranks of `group`, of which
    it is number `rank` of `ranks` and has the `keys` of `shard`. With `is_balanced` each rank's shard is a chunk from the head of
    the sequence and one from its tail, as torch's `context_parallel` balances causal attention. Parts are merged in float32, and
    the output is rounded at the end.
    """
    half, late = keys // 2, slice(query.shape[SEQ] // 2, None)
    output = lse = None
    coming: Shard = ()
    for turn in range(ranks):
        if turn > 0:
            shard = tuple(
                [arrived(tensor) for tensor in coming]
            )  # of the rank that is `turn` before this one
        if turn < ranks - 1:  # on its way while this one is attended to
            coming = tuple([sent_to_next(tensor, group, rank, ranks) for tensor in shard])
        owner = (rank - turn) % ranks
        if output is None or lse is None:
            output, lse = part(query, shard, owner, is_causal=is_causal)
        elif not is_causal:
            output, lse = _merged(output, lse, *part(query, shard, owner))
        elif turn <= rank:  # of a rank before this one: all of it, or its chunk from the head
            output, lse = _merged(output, lse, *part(query, shard, owner, half if is_balanced else None))
        elif is_balanced:  # of a rank behind: the queries from the tail see all of it
            output = output.float()
            seen = part(query[:, :, late], shard, owner)
            output[:, :, late], lse[:, :, late] = _merged(output[:, :, late], lse[:, :, late], *seen)
    assert output is not None and lse is not None
    return output.to(query.dtype), lse


def _merged(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both together, in float32. The first two parts are read in their own dtype: of two ranks the float32 numbers are never stored
    by a compiled graph, and once by others."""
    # A row that has seen no key in either, whose LSE are -inf, would become NaN.
    gap = torch.where(part_lse == lse, 0.0, part_lse - lse)
    weights = [torch.sigmoid(sign).unsqueeze(-1) for sign in (-gap, gap)]
    return torch.addcmul(output * weights[0], part, weights[1]), torch.logaddexp(lse, part_lse)
