"""A ring in which the next shard travels while this one is attended to, and what travels.

Each rank sends its shard of keys and values to the next, attends to it, and goes on with what has come from the one before; parts are
merged by their LSE (Ring Attention, Liu et al. 2023). All turns are one operator, `sage_inductor::attention_of_ring`: as nodes of a
graph Inductor would put them in another order, to save memory, and wait for a shard before the attention that should hide it. It
returns the parts, so that merging them is left to the graph, where it is one kernel. The kernel is chosen when it runs, by the
lengths of that call.

As inputs: keys and values travel in their own dtype, K and V each in a message of its own, without a copy where they are dense.

In 8 bits: each rank quantises its shard once, sends it on as bytes, and attends to what comes around as it came. That is about half of
what bf16 takes, and a shard is not quantised again by each rank that receives it. K's mean, which is subtracted before, and the
factors that even channels are the shard's own. So each rank quantises its queries for each shard: what the mean took from their
scores is put back into the LSE of that part, which makes merging the parts exact, and queries are multiplied by the very factors
that the keys were divided by. Factors in common would save that pass over the queries (a hundredth of a step) and cost all ranks
a collective that they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.sizes import size_hint
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.smoothing import EQUALISING, resolved_smoothing
from sage_inductor.operators import inference
from sage_inductor.operators.dispatch_rules import autocast_rule
from sage_inductor.operators.distributed.shards import Shard, shards_of
from sage_inductor.operators.inputs import empty_lse, empty_output
from sage_inductor.operators.prequantized import (
    attention_prequantized_op,
    can_prequantize,
    inference_only,
    quantize_key_value_op,
)
from sage_inductor.operators.schemas import EXACT, LIBRARY, NAMESPACE, TAGS, WIRES

SEQ = 2  # of `[batch, heads, seq, head_dim]`
LIBRARY.define(
    "attention_of_ring(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, str group_name, int rank, int ranks, "
    "bool is_causal=False, bool is_balanced=False, float? scale=None, bool enable_gqa=False, str kernel_name='auto', "
    "str precision='fast', str smoothing='auto', float skip_threshold=0.0, str skip_by='scores', str wires='inputs') -> Tensor[]",
    tags=TAGS,
)
PartOfRing: TypeAlias = Callable[[Tensor, Shard, int, "int | None", bool], Any]
"""(output, LSE) of a query to a shard: of which rank it is, how many of its keys are attended to (the first ones; None for all),
whether that is causal."""


class QuantizationChoice(NamedTuple):
    """How keys and values are quantised."""

    kernel: str
    precision: str
    smoothing: str


class Turn(NamedTuple):
    """What a rank attends to in one turn."""

    late: bool  # the second half of its queries alone
    half: bool  # the first half of the keys alone
    is_causal: bool


def turns(rank: int, ranks: int, is_causal: bool, is_balanced: bool) -> list[Turn | None]:
    """Of rank `rank` of `ranks`, in turn: its own shard, that of the rank before it, and so on; None for a shard of which it sees
    nothing. With `is_balanced` each rank's shard is a chunk from the head of the sequence and one from its tail, as torch's
    `context_parallel` balances causal attention."""
    found: list[Turn | None] = [Turn(False, False, is_causal)]
    for turn in range(1, ranks):
        if not is_causal:
            found.append(Turn(False, False, False))
        elif turn <= rank:  # of a rank before this one: all of it, or its chunk from the head
            found.append(Turn(False, is_balanced, False))
        else:  # of a rank behind: the queries from the tail see all of it
            found.append(Turn(True, False, False) if is_balanced else None)
    return found


def kernel_of_wires(
    query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
) -> QuantizationChoice | None:
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
    precision = kernels.precision_on(query.device, options.get("precision", "fast"), name)
    smoothing = options.get("smoothing", "auto")
    params = AttentionParams(precision=precision, smoothing=smoothing)
    of_query, of_key, of_value = (TensorSpec.of(tensor) for tensor in (query, key, value))
    kernel, reasons = kernels.select(AttentionProblem(of_query, of_key, of_value, None, params, True), name)
    if kernel is not None or name != "auto":
        reasons = can_prequantize(kernels.get(name) if kernel is None else kernel) or reasons
    if not reasons:
        assert kernel is not None
        return QuantizationChoice(kernel.name, precision, resolved_smoothing(smoothing, kernel.smoothings))
    if name == "auto" or (kernel is None and options.get("or_exact")):
        return None
    raise NotEligibleError(f'kernel={name} with wires="8-bit"', reasons)


def _in_8_bits(
    query: Tensor, key: Tensor, value: Tensor, choice: QuantizationChoice, scale: float | None
) -> tuple[Shard, PartOfRing]:
    """The shard of this rank's keys and values, quantised, and attention to such shards."""
    how = {"kernel_name": choice.kernel, "precision": choice.precision, "smoothing": choice.smoothing}
    packed = quantize_key_value_op(key, value, query if choice.smoothing in EQUALISING else None, **how)
    keys = key.shape[SEQ]

    def part(query: Tensor, shard: Shard, owner: int, kv_len: int | None, is_causal: bool) -> Any:
        return attention_prequantized_op(
            query, shard[0], kv_heads=key.shape[1], kv_len=keys if kv_len is None else kv_len, stored_len=keys,
            value_head_dim=value.shape[-1], is_causal=is_causal, scale=scale, **how,
        )  # fmt: skip

    return (packed,), part


def _as_inputs(
    key: Tensor, value: Tensor, masks: Sequence[Tensor], options: dict[str, Any]
) -> tuple[Shard, PartOfRing]:
    """The shard of this rank's keys and values as they are, and attention to such shards, with the mask of those of its owner. They
    travel as `[batch, seq, heads, head_dim]` lie in memory."""
    dense = [tensor.transpose(1, SEQ).contiguous() for tensor in (key, value)]

    def part(query: Tensor, shard: Shard, owner: int, kv_len: int | None, is_causal: bool) -> Any:
        k, v = (flat.view(tensor.shape).transpose(1, SEQ) for flat, tensor in zip(shard, dense, strict=True))
        mask = masks[owner] if masks else None
        return inference.attention_lse(query, k[:, :, :kv_len], v[:, :, :kv_len], mask, is_causal, **options)

    return tuple([tensor.view(-1) for tensor in dense]), part


def _attention_of_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    group_name: str,
    rank: int,
    ranks: int,
    is_causal: bool = False,
    is_balanced: bool = False,
    wires: str = "inputs",
    **options: Any,
) -> list[Tensor]:
    """Output and LSE of each part that `turns` has, one behind the other: of this rank's queries `[batch, heads, seq / ranks,
    head_dim]` to the keys of all ranks of the group, of which it is number `rank` of `ranks`. attn_mask has a column for each key
    of all ranks."""
    if wires not in WIRES:
        raise ValueError(f"wires={wires!r} (valid: {', '.join(WIRES)})")
    choice = kernel_of_wires(query, key, value, options) if wires == "8-bit" else None
    if choice is None:
        masks = () if attn_mask is None else attn_mask.chunk(ranks, -1)
        shard, part = _as_inputs(key, value, masks, options)
    else:
        if attn_mask is not None:
            raise NotEligibleError(
                f'kernel={choice.kernel} with wires="8-bit"', [reason("attn_mask", "given", "none")]
            )
        shard, part = _in_8_bits(query, key, value, choice, options.get("scale"))
    half = key.shape[SEQ] // 2
    found: list[Tensor] = []
    own = turns(rank, ranks, is_causal, is_balanced)
    shards = shards_of(
        group_name, rank, ranks, shard,
        lambda of, number: turns(of, ranks, is_causal, is_balanced)[number] is not None,
    )  # fmt: skip
    for number, turn in enumerate(own):
        shard = shards.of_turn(number)
        if turn is not None:
            rows = _late(query) if turn.late else query
            kv_len = half if turn.half else None
            found += part(rows, shard, (rank - number) % ranks, kv_len, turn.is_causal)
        shards.attended(number)
    shards.end()
    return found


def _fake_attention_of_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    rank: int,
    ranks: int,
    is_causal: bool = False,
    is_balanced: bool = False,
    **options: Any,
) -> list[Tensor]:
    found: list[Tensor] = []
    for turn in turns(rank, ranks, is_causal, is_balanced):
        if turn is not None:
            rows = _late(query) if turn.late else query
            found += [empty_output(rows, value, None), empty_lse(rows)]
    return found


def _late(tensor: Tensor) -> Tensor:
    """The rows of the chunk from the tail."""
    return tensor[:, :, tensor.shape[SEQ] // 2 :]


def around(
    group: Any,
    rank: int,
    ranks: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    is_balanced: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(output, LSE) of this rank's queries to the keys of all ranks. Arguments as those of the operator; `group` has its name. Parts
    are merged in float32, and the output is rounded at the end."""
    parts = attention_of_ring(
        query, key, value, attn_mask, group_name=group.group_name, rank=rank, ranks=ranks, is_causal=is_causal,
        is_balanced=is_balanced, **options,
    )  # fmt: skip
    output, lse = parts[:2]
    dtype, at = output.dtype, 2
    for turn in turns(rank, ranks, is_causal, is_balanced)[1:]:
        if turn is None:
            continue
        part, part_lse = parts[at : at + 2]
        at += 2
        if turn.late:
            output = output.float()
            late, late_lse = _merged(_late(output), _late(lse), part, part_lse)
            _late(output).copy_(late)
            _late(lse).copy_(late_lse)
        else:
            output, lse = _merged(output, lse, part, part_lse)
    return output.to(dtype), lse


def _merged(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both together, in float32. The first two parts are read in their own dtype: of two ranks the float32 numbers are never stored
    by a compiled graph, and once by others."""
    # A row that has seen no key in either, whose LSE are -inf, would become NaN.
    gap = torch.where(part_lse == lse, 0.0, part_lse - lse)
    weights = [torch.sigmoid(sign).unsqueeze(-1) for sign in (-gap, gap)]
    return torch.addcmul(output * weights[0], part, weights[1]), torch.logaddexp(lse, part_lse)


def register_inference(name: str, implementation: Any, fake: Any, what: str) -> None:
    """Registers an operator of several ranks, which gives no gradients of `what`."""
    op = getattr(torch.ops.sage_inductor, name).default
    for backend, device_type in (("CPU", "cpu"), ("CUDA", "cuda")):
        LIBRARY.impl(name, implementation, backend)
        LIBRARY.impl(name, inference_only(op, implementation, what), f"Autograd{backend}")
        LIBRARY.impl(name, autocast_rule(op, device_type), f"Autocast{backend}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


register_inference("attention_of_ring", _attention_of_ring, _fake_attention_of_ring, "attention in a ring")
attention_of_ring = torch.ops.sage_inductor.attention_of_ring.default
