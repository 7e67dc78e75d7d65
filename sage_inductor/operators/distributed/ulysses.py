"""Attention of ranks that each hold a part of the sequence: they exchange it for a part of the heads, attend, and exchange back
(DeepSpeed Ulysses, Jacobs et al. 2023).

Where ranks write into each other's memory, heads travel in groups: the next is on its way while one is attended to, and what was
computed of it goes back meanwhile. Nothing is put in order before or behind: rows go from where they lie to where they belong.

Keys and values travel in their own dtype, or in 8 bits (`wires`): each rank quantises its part of the sequence, with a mean and factors
of its own; parts are attended to one by one, and merged by their LSE. A mean in common would save the merging, and cost all ranks a
collective that they wait for. Queries and the output keep their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.smoothing import EQUALISING
from sage_inductor.operators import inference
from sage_inductor.operators.distributed.peers import Peers, Queue, may_reach, peers_of
from sage_inductor.operators.distributed.wires import (
    QuantizationChoice,
    kernel_of_wires,
    register_inference,
)
from sage_inductor.operators.inputs import empty_lse, empty_output
from sage_inductor.operators.prequantized import (
    attention_prequantized_op,
    quantize_key_value_op,
)
from sage_inductor.operators.schemas import LIBRARY, TAGS, WIRES
from sage_inductor.operators.validation import misfit
from sage_inductor.torch_internals.distributed import arrived, exchanged

HEADS, SEQ = 1, 2  # of `[batch, heads, seq, head_dim]`
LIBRARY.define(
    "attention_of_ulysses(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, str group_name, int rank, "
    "int ranks, bool is_causal=False, float? scale=None, bool enable_gqa=False, bool return_lse=False, "
    "str kernel_name='auto', str precision='fast', str smoothing='auto', float skip_threshold=0.0, "
    "str skip_by='scores', str wires='inputs') -> Tensor[]",
    tags=TAGS,
)
_MOST_GROUPS = 4
_LEAST = 1 << 20  # bytes that a rank sends each other, below which collectives take no longer
_ALIGNED = 256  # bytes; where a tensor begins
Pieces: TypeAlias = "list[Tensor]"
"""What one rank sends another of some heads: `[batch, rows, heads, columns]`. Rows of all ranks are put one behind the other."""


class Heads(NamedTuple):
    """Some heads of one rank: those of the queries, and the key heads that belong to them."""

    first: int
    end: int
    first_key: int
    end_key: int


AttendHeads: TypeAlias = Callable[[Pieces, Heads], "tuple[Tensor, Tensor | None]"]
"""Output and LSE, `[batch, heads, seq, ...]`, of what came of some heads of this rank. The LSE may be None if it is not asked for."""


@dataclass(frozen=True)
class SequencePart:
    """This rank's part of the sequence, `[batch, heads, seq / ranks, head_dim]`, and how its keys and values travel."""

    query: Tensor
    key: Tensor
    value: Tensor
    rank: int
    ranks: int
    choice: QuantizationChoice | None
    """How they are quantised; None where they travel as they are."""

    def heads(self, rank: int, groups: int) -> list[Heads]:
        """The heads of `rank`, in groups."""
        mine = self.key.shape[HEADS] // self.ranks
        each = self.query.shape[HEADS] // self.key.shape[HEADS]
        ends = [rank * mine + mine * group // groups for group in range(groups + 1)]
        return [
            Heads(first * each, end * each, first, end) for first, end in zip(ends, ends[1:], strict=False)
        ]

    def pieces(self, heads: Heads) -> Pieces:
        """What is sent to the rank that has these heads."""
        query = self.query[:, heads.first : heads.end]
        key, value = (tensor[:, heads.first_key : heads.end_key] for tensor in (self.key, self.value))
        if self.choice is None:
            return [_rows(tensor) for tensor in (query, key, value)]
        kernel, precision, smoothing = self.choice
        packed = quantize_key_value_op(
            key, value, query if smoothing in EQUALISING else None, kernel_name=kernel, precision=precision,
            smoothing=smoothing,
        )  # fmt: skip
        return [_rows(query), packed.view(1, 1, 1, -1)]


def _rows(tensor: Tensor) -> Tensor:
    """`[batch, heads, seq, head_dim]` as `[batch, seq, heads, head_dim]`, its last two dims dense."""
    rows = tensor.transpose(HEADS, SEQ)
    _, _, heads, columns = rows.shape
    is_dense = rows.stride(3) == 1 and (heads == 1 or rows.stride(2) == columns)
    return rows if is_dense else rows.contiguous()


def _as_inputs(attn_mask: Tensor | None, return_lse: bool, options: dict[str, Any]) -> AttendHeads:
    """Attention to keys and values that came as they are. `attn_mask`: of all queries and keys."""

    def attend(came: Pieces, heads: Heads) -> tuple[Tensor, Tensor | None]:
        query, key, value = (tensor.transpose(HEADS, SEQ) for tensor in came)
        mask = attn_mask
        if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask[..., heads.first : heads.end, :, :]
        if return_lse:
            output, lse = inference.attention_lse(query, key, value, mask, **options)
            return output, lse
        return inference.attention(query, key, value, mask, **options), None

    return attend


def _in_8_bits(part: SequencePart, choice: QuantizationChoice, scale: float | None) -> AttendHeads:
    """Attention to keys and values that each rank quantised."""
    length, head_dim = part.key.shape[SEQ], part.value.shape[-1]

    def attend(came: Pieces, heads: Heads) -> tuple[Tensor, Tensor]:
        query = came[0].transpose(HEADS, SEQ)
        parts = [
            attention_prequantized_op(
                query, packed, kv_heads=heads.end_key - heads.first_key, kv_len=length, stored_len=length,
                value_head_dim=head_dim, scale=scale, kernel_name=choice.kernel, precision=choice.precision,
                smoothing=choice.smoothing,
            )
            for packed in came[1][0, :, 0]
        ]  # fmt: skip
        output, lse = parts[0]
        for other, other_lse in parts[1:]:
            weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
            output = torch.lerp(output, other, weight.to(output.dtype))
            lse = torch.logaddexp(lse, other_lse)
        return output, lse

    return attend


def _by_collectives(
    part: SequencePart, attend: AttendHeads, group_name: str, output: Tensor
) -> Tensor | None:
    """Fills `output`, `[batch, heads, seq / ranks, value_head_dim]`. The LSE of this rank's heads, where `attend` gives one."""
    ranks = range(part.ranks)
    for_each = [part.pieces(part.heads(rank, 1)[0]) for rank in ranks]
    coming = [exchanged(torch.stack(pieces), group_name) for pieces in zip(*for_each, strict=True)]
    came = [arrived(tensor).transpose(0, 1).flatten(1, 2) for tensor in coming]
    of_heads, lse = attend(came, part.heads(part.rank, 1)[0])
    _send_back(of_heads, group_name, output)
    return lse


def _send_back(of_heads: Tensor, group_name: str, result: Tensor) -> None:
    """From `[batch, heads of this rank, seq, ...]` of all ranks to `result`, `[batch, heads, seq of this rank, ...]`, by a collective."""
    ranks = result.shape[HEADS] // of_heads.shape[HEADS]
    split = of_heads.unflatten(SEQ, (ranks, -1)).movedim(SEQ, 0).contiguous()
    back = arrived(exchanged(split, group_name))
    result.unflatten(HEADS, (ranks, -1)).copy_(back.movedim(0, HEADS))


class Room:
    """Where things lie in the memory of each rank, in bytes: for each group of heads what comes of it, and behind them the output of all
    heads. The same on all ranks."""

    def __init__(self, ranks: int, groups: Sequence[Pieces], output: Tensor) -> None:
        self.size = 0
        self.pieces = [[self._add(ranks * piece.nbytes) for piece in pieces] for pieces in groups]
        self.output = self._add(output.nbytes)

    def _add(self, size: int) -> int:
        at = self.size
        self.size += -(-size // _ALIGNED) * _ALIGNED
        return at


def by_writing(
    peers: Peers,
    room: Room,
    part: SequencePart,
    for_each: Sequence[Sequence[Pieces]],
    attend: AttendHeads,
    output: Tensor,
) -> Tensor | None:
    """What `_by_collectives` does. for_each: what each rank is sent of each of its groups of heads.

    Flags of a rank: that it may write to another one, which is done with the call before; that what another sent of a group is there;
    that the output of another is.
    """
    groups, ranks, rank = len(room.pieces), peers.ranks, peers.rank
    own = part.heads(rank, groups)
    sent, returned = ranks, ranks * (1 + groups)
    rows_of_output = output.transpose(HEADS, SEQ)
    peers.outgoing.after(peers.current)
    for to in peers.others:
        peers.outgoing.wait(to)
    computed = []
    for group in range(groups):
        # One group ahead of what is attended to: with many others it takes a rank its time to hand out all of this.
        for ahead in range(group + 1 if group else 0, min(group + 2, groups)):
            for to in peers.others:
                for piece, at in zip(for_each[to][ahead], room.pieces[ahead], strict=True):
                    rows = piece.shape[1]
                    _write(peers.outgoing, to, at, piece, (rank * rows, 0), (ranks * rows, piece.shape[2]))
                peers.outgoing.signal(to, sent + ranks * ahead + rank)
        came = []
        for piece, at in zip(for_each[rank][group], room.pieces[group], strict=True):
            batch, rows, heads, columns = piece.shape
            whole = _tensor(peers.memory, at, (batch, ranks * rows, heads, columns), piece.dtype)
            whole[:, rank * rows : (rank + 1) * rows].copy_(piece)
            came.append(whole)
        for other in peers.others:
            peers.current.wait(sent + ranks * group + other)
        of_heads, lse = attend(came, own[group])
        of_heads = of_heads.transpose(HEADS, SEQ).contiguous()
        computed.append((of_heads, lse))  # stays until it is sent
        peers.returning.after(peers.current)
        for to, rows_of_rank in enumerate(of_heads.chunk(ranks, 1)):
            if to == rank:
                rows_of_output[:, :, own[group].first : own[group].end].copy_(rows_of_rank)
            else:
                of = rows_of_output.shape[1:3]
                _write(peers.returning, to, room.output, rows_of_rank, (0, own[group].first), of)
    for to in peers.others:
        peers.returning.signal(to, returned + rank)
    for other in peers.others:
        peers.current.wait(returned + other)
    whole = _tensor(peers.memory, room.output, rows_of_output.shape, output.dtype)
    for heads_of_others in (slice(0, own[0].first), slice(own[-1].end, None)):
        rows_of_output[:, :, heads_of_others].copy_(whole[:, :, heads_of_others])
    for other in peers.others:
        peers.current.signal(other, rank)
    peers.current.after(peers.outgoing)
    peers.current.after(peers.returning)
    found = [lse for _, lse in computed if lse is not None]
    return torch.cat(found, HEADS) if found else None


def _write(queue: Queue, to: int, at: int, piece: Tensor, first: tuple[int, int], of: Sequence[int]) -> None:
    """Writes `piece`, `[batch, rows, heads, columns]`, to rank `to`, whose tensor at byte `at` has `of` rows and heads: from row and head
    `first` on. Columns are adjacent, and heads are."""
    batch, _, _, columns = piece.shape
    element = piece.element_size()
    pitch = of[1] * columns * element
    for number in range(batch):
        begin = (number * of[0] + first[0]) * pitch + first[1] * columns * element
        queue.copy(to, at + begin, pitch, piece[number].flatten(1))


def _tensor(memory: Tensor, at: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The dense tensor at byte `at` of `memory`."""
    size = math.prod(shape) * dtype.itemsize
    found: Tensor = memory[at : at + size].view(dtype).view(*shape)
    return found


def _attention_of_ulysses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    group_name: str,
    rank: int,
    ranks: int,
    return_lse: bool = False,
    wires: str = "inputs",
    **options: Any,
) -> list[Tensor]:
    """The output, and the LSE if it is asked for, of this rank's queries `[batch, heads, seq / ranks, head_dim]` to the keys of all ranks
    of the group, of which it is number `rank` of `ranks`. attn_mask: of all queries and keys."""
    _check(query, key, ranks, wires)
    choice = kernel_of_wires(query, key, value, options) if wires == "8-bit" else None
    part = SequencePart(query, key, value, rank, ranks, choice)
    if choice is None:
        attend = _as_inputs(attn_mask, return_lse, options)
    else:
        refused = {"attn_mask": attn_mask is not None, "is_causal": options.get("is_causal", False)}
        if reasons := [reason(name, "given", "none") for name, is_there in refused.items() if is_there]:
            raise NotEligibleError(f'kernel={choice.kernel} with wires="8-bit"', reasons)
        attend = _in_8_bits(part, choice, options.get("scale"))
    output = empty_output(query, value, None)
    found = _written(part, attend, group_name, output)
    lse = _by_collectives(part, attend, group_name, output) if found is None else found[0]
    if not return_lse:
        return [output]
    assert lse is not None
    lse_of_rank = empty_lse(query)
    _send_back(lse, group_name, lse_of_rank)
    return [output, lse_of_rank]


def _written(
    part: SequencePart, attend: AttendHeads, group_name: str, output: Tensor
) -> tuple[Tensor | None] | None:
    """(LSE of this rank's heads), with `output` filled, where ranks write into each other's memory; None where they do not."""
    if part.ranks == 1 or not may_reach(part.query.device):
        return None
    if (part.query.nbytes + part.key.nbytes + part.value.nbytes) // part.ranks < _LEAST:
        return None
    groups = min(_MOST_GROUPS, part.key.shape[HEADS] // part.ranks)
    heads = [part.heads(rank, groups) for rank in range(part.ranks)]
    own = [part.pieces(some) for some in heads[part.rank]]
    room = Room(part.ranks, own, output)
    others = [rank for rank in range(part.ranks) if rank != part.rank]
    peers = peers_of(group_name, "ulysses", room.size, part.query.device, others)
    if peers is None:
        return None
    for_each = [
        own if rank == part.rank else [part.pieces(some) for some in heads[rank]]
        for rank in range(part.ranks)
    ]
    return (by_writing(peers, room, part, for_each, attend, output),)


def _check(query: Tensor, key: Tensor, ranks: int, wires: str) -> None:
    """Raises ValueError for unknown wires, and for heads that the ranks do not divide."""
    if wires not in WIRES:
        raise ValueError(f"wires={wires!r} (valid: {', '.join(WIRES)})")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or tensor.shape[HEADS] % ranks:
            raise misfit(
                f"{name} {tuple(tensor.shape)} on {ranks} ranks (valid: [batch, heads, seq, head_dim], whose heads the ranks divide)"
            )


def _fake_attention_of_ulysses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    ranks: int,
    return_lse: bool = False,
    wires: str = "inputs",
    **options: Any,
) -> list[Tensor]:
    _check(query, key, ranks, wires)
    output = empty_output(query, value, None)
    return [output, empty_lse(query)] if return_lse else [output]


register_inference(
    "attention_of_ulysses",
    _attention_of_ulysses,
    _fake_attention_of_ulysses,
    "attention of ranks that exchange heads",
)
attention_of_ulysses = torch.ops.sage_inductor.attention_of_ulysses.default
