"""8-bit attention inside diffusers' context parallelism: the ring, Ulysses, and both together.

diffusers' ring gathers the keys and values of all ranks before anything is attended to, and would apply the mask of a rank's own keys to
the keys of every other rank; its Ulysses waits for all heads before it attends to any. So a ring is that of
operators/distributed/wires.py, where a part is on its way while another is attended to, and Ulysses that of ulysses.py beside it, where
heads are. Masks of all ranks are gathered first, and each part gets its own columns. In a ring around Ulysses the latter is that of
diffusers. Parts of different lengths (`ring_anything`, `ulysses_anything`) go through diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.integrations.diffusers import internals
from sage_inductor.kernels.base import gradient_problem, reason
from sage_inductor.operators.dispatch_rules import cast_as_sdpa
from sage_inductor.operators.distributed.ulysses import attention_of_ulysses
from sage_inductor.operators.distributed.wires import around
from sage_inductor.operators.functional import sage_attention
from sage_inductor.torch_internals.distributed import waited_for

# The log-sum-exp of a row that may attend no key of a part is -inf, of which diffusers' merging makes NaN (inf - inf). This is
# finite, far below what scores come to, and near enough to 0 that float32 keeps 4 digits of what is merged with it.
NOTHING_ATTENDED = -1000.0


def attention_of_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    parallel_config: Any,
    templated: Callable[..., Any],
    ulysses_attention: Any,
    options: dict[str, Any],
) -> Any:
    """Attention of this rank's queries to the keys of all ranks.

    query, key, value: this rank's part, `[batch, seq / ranks, heads, head_dim]`. attn_mask: four dims, over this rank's keys or
    over those of all. templated: diffusers' own ring and Ulysses. ulysses_attention: the latter alone. options: those of `sage_attention`.

    Raises:
        NotEligibleError: gradients or dropout; a mask, or parts of different lengths, where wires="8-bit".
        ValueError: a mask that does not fit; and as diffusers does, for causality and grouped heads.
    """
    reasons = [] if dropout_p == 0.0 else [reason("dropout_p", dropout_p, 0.0)]
    wanting = gradient_problem(query=query, key=key, value=value, attn_mask=attn_mask)
    if wanting is not None:
        reasons.append(wanting)
    if reasons:
        raise NotEligibleError("sage_inductor in diffusers' context parallelism", reasons)
    ring, ulysses, place = internals.parallel_degrees(parallel_config)
    anything = internals.parts_differ(parallel_config)
    # diffusers refuses causality and grouped heads in a ring.
    is_ours = anything is None and not (ring > 1 and (is_causal or enable_gqa))
    if attn_mask is not None and (ring > 1 or is_ours):
        attn_mask = _of_all_keys(attn_mask, key.shape[1], ring * ulysses, parallel_config)
    if options["wires"] == "8-bit" and not (ring > 1 and (is_causal or enable_gqa)):
        _refuse_in_8_bits(attn_mask is not None, is_causal, anything)
    if is_ours and ring == 1:
        group, place = internals.ulysses_group(parallel_config)
        return _in_our_ulysses(attn_mask, options, group, place, ulysses)(
            None, query, key, value, None, 0.0, is_causal, scale, enable_gqa, return_lse
        )
    if is_ours:
        attend = _in_our_ring(attn_mask, options, internals.ring_group(parallel_config), place, ring)
        if ulysses == 1:
            return attend(None, query, key, value, None, 0.0, False, scale, False, return_lse)
        return ulysses_attention.apply(
            query, key, value, None, 0.0, False, scale, False, return_lse, attend, _no_backward, parallel_config,
        )  # fmt: skip
    in_turn: list[Tensor] = []
    if ring > 1 and attn_mask is not None:
        # The ring of diffusers begins with a rank's own part, and goes on to that of the next rank.
        masks = attn_mask.chunk(ring, -1)
        in_turn, attn_mask = [masks[(place + turn) % ring] for turn in range(ring)], None
    return templated(
        query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, return_lse,
        forward_op=_on_one_part(in_turn, options), backward_op=_no_backward, _parallel_config=parallel_config,
    )  # fmt: skip


def _refuse_in_8_bits(has_mask: bool, is_causal: bool, anything: str | None) -> None:
    """Raises NotEligibleError for what ranks whose keys and values travel in 8 bits do not do."""
    reasons = []
    if has_mask:
        reasons.append(reason("attn_mask", "given", 'none with wires="8-bit"'))
    if is_causal:
        reasons.append(reason("is_causal", True, 'False with wires="8-bit"'))
    if anything is not None:
        reasons.append(reason(anything, True, 'False with wires="8-bit"'))
    if reasons:
        raise NotEligibleError("sage_inductor in diffusers' context parallelism", reasons)


def _in_our_ring(
    of_all_keys: Tensor | None, options: dict[str, Any], group: Any, place: int, ring: int
) -> Callable[..., Any]:
    """What is called on this rank's part, or, in a ring around Ulysses, on that of the ranks that exchange heads. `of_all_keys`: the
    mask."""
    how = {name: option for name, option in options.items() if name != "kernel"}

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **asked: Any) -> Any:
        out, lse = around(
            group, place, ring, q, k, v, cast_as_sdpa(of_all_keys), scale=asked["scale"],
            kernel_name=options["kernel"], **how,
        )  # fmt: skip
        return (out, lse) if asked["return_lse"] else out

    return _as_diffusers_calls(attend)


def _in_our_ulysses(
    of_all_keys: Tensor | None, options: dict[str, Any], group: Any, place: int, ranks: int
) -> Callable[..., Any]:
    """What is called on this rank's part of the sequence. `of_all_keys`: the mask."""
    how = {name: option for name, option in options.items() if name != "kernel"}

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **asked: Any) -> Any:
        found = attention_of_ulysses(
            q, k, v, cast_as_sdpa(of_all_keys), group_name=group.group_name, rank=place, ranks=ranks,
            kernel_name=options["kernel"], **asked, **how,
        )  # fmt: skip
        return tuple(found) if asked["return_lse"] else found[0]

    return _as_diffusers_calls(attend)


def _on_one_part(masks: list[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """What diffusers calls on each part. `masks` are those of the parts, in turn; empty where there is one mask, or none."""
    turns = iter(masks)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **asked: Any) -> Any:
        found = sage_attention(q, k, v, next(turns) if masks else attn_mask, **asked, **options)
        return found if isinstance(found, Tensor) else (found[0], found[1].clamp(min=NOTHING_ATTENDED))

    return _as_diffusers_calls(attend)


def _as_diffusers_calls(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`attend(q, k, v, attn_mask, is_causal=, scale=, enable_gqa=, return_lse=)` of tensors `[batch, heads, seq, head_dim]`, to be called as diffusers calls
    attention of a part: of tensors `[batch, seq, heads, head_dim]` that may come out of a collective that is still under way."""

    def forward_op(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool,
        _save_ctx: bool = True,
        _parallel_config: Any = None,
    ) -> Any:
        q, k, v = (waited_for(tensor).transpose(1, 2) for tensor in (query, key, value))
        found = attend(
            q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse
        )
        if isinstance(found, Tensor):
            return found.transpose(1, 2)
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    return forward_op


def _of_all_keys(attn_mask: Tensor, local: int, ranks: int, parallel_config: Any) -> Tensor:
    """The mask over the keys of all ranks."""
    keys = attn_mask.shape[-1]
    if keys == local * ranks:
        return attn_mask
    if keys != local or attn_mask.dim() != 4 or attn_mask.shape[-2] != 1:
        raise ValueError(
            f"attn_mask {tuple(attn_mask.shape)} of several ranks (valid: [batch, 1, 1, {local}] over this rank's keys, or "
            f"{local * ranks} columns over those of all {ranks} ranks)"
        )
    gathered = [torch.empty_like(attn_mask) for _ in range(ranks)]
    torch.distributed.all_gather(
        gathered, attn_mask.contiguous(), group=internals.parallel_group(parallel_config)
    )
    return torch.cat(gathered, -1)


def _no_backward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotEligibleError(
        "sage_inductor in diffusers' context parallelism",
        [reason("requires_grad", True, "none; use torch.no_grad()")],
    )
