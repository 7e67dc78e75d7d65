"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`: single nodes whose attention has to be brought to light."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_inductor.graph.call import SDPA, Expansion, OpaquePattern, example_tensor, example_value, trace
from sage_inductor.patterns.nodes import reads_nothing
from sage_inductor.torch_internals.operators import FUSED_ENCODER_LAYER
from sage_inductor.torch_internals.sizes import number_of

FORWARD = F.multi_head_attention_forward


class MultiHeadAttention(OpaquePattern):
    """`F.multi_head_attention_forward`, which `nn.MultiheadAttention` calls: projections, SDPA, projection.

    With `need_weights=True` the weights are computed and returned; where nothing reads them they need not be. The function
    goes by `is_causal` without weights only: with them `attn_mask` counts, be it causal or not.
    """

    name = "multi_head_attention"

    def expand(self, node: fx.Node) -> Expansion | None:
        if not self._holds(node) or self.closed_reasons(node):
            return None
        arguments = _arguments(node)
        if arguments["need_weights"]:
            arguments |= {"need_weights": False, "is_causal": False}
        return _traced(FORWARD, arguments, _autocast_of(node))

    def closed_reasons(self, node: fx.Node) -> list[str]:
        if not self._holds(node):
            return []
        reasons, arguments = [], _arguments(node)
        if arguments["need_weights"] and not all(_reads_output_only(user) for user in node.users):
            reasons.append("need_weights=True (supported: weights that nothing reads)")
        if isinstance(arguments["dropout_p"], fx.Node):
            reasons.append(f"dropout_p={arguments['dropout_p']} (supported: 0.0)")
        return reasons

    def _holds(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target is FORWARD

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        layer = nn.MultiheadAttention(64, 2, batch_first=True).eval()
        yield lambda x: layer(x, x, x, need_weights=False)[0], (torch.randn(2, 16, 64),)
        yield lambda x: layer(x, x, x)[0], (torch.randn(2, 16, 64),)


class TransformerEncoderLayer(OpaquePattern):
    """The fused operator of `nn.TransformerEncoderLayer` in eval mode without gradients, which never calls SDPA."""

    name = "transformer_encoder_layer"

    def expand(self, node: fx.Node) -> Expansion | None:
        if node.op != "call_function" or node.target not in FUSED_ENCODER_LAYER:
            return None
        arguments = _bound(_encoder_layer, node)
        source = example_tensor(arguments["source"])
        if source is None or source.is_nested:
            return None
        return _traced(_encoder_layer, arguments)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True).eval()
        yield layer, (torch.randn(2, 16, 64),)
        yield (
            nn.TransformerEncoderLayer(64, 2, 96, 0.1, "gelu", batch_first=True, norm_first=True).eval(),
            (torch.randn(2, 16, 64),),
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    arguments = _bound(FORWARD, node)
    return arguments if arguments["training"] else arguments | {"dropout_p": 0.0}


def _bound(function: Any, node: fx.Node) -> dict[str, Any]:
    """The arguments of `node`, a call of `function`. A float of a module that is compiled for dynamic shapes is a node; where it
    was specialised it is a number here."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    known = {
        name: number_of(example_value(value)) if isinstance(value, fx.Node) else None
        for name, value in bound.arguments.items()
    }
    return {
        name: known[name] if isinstance(known[name], float) else value
        for name, value in bound.arguments.items()
    }


def _reads_output_only(user: fx.Node) -> bool:
    if user.op != "call_function" or user.target is not operator.getitem:
        return False
    return bool(user.args[1] == 0) or reads_nothing(user)


def _autocast_of(node: fx.Node) -> torch.dtype | None:
    """The dtype that autocast casts to around `node`; None where nothing is cast."""
    value = example_value(node)
    output = value[0] if isinstance(value, (tuple, list)) else value
    inputs = {
        t.dtype for t in map(example_tensor, node.all_input_nodes) if t is not None and t.is_floating_point()
    }
    return output.dtype if isinstance(output, Tensor) and inputs != {output.dtype} else None


def _traced(
    function: Any, arguments: dict[str, Any], autocast: torch.dtype | None = None
) -> Expansion | None:
    """`function` traced as a function of the nodes among its arguments; the others are constants."""
    names = [name for name, value in arguments.items() if isinstance(value, fx.Node)]
    constants = {name: value for name, value in arguments.items() if name not in names}

    def of_nodes(*values: Tensor) -> Any:
        return function(**constants, **dict(zip(names, values, strict=True)))

    return trace(of_nodes, tuple(arguments[name] for name in names), autocast)


def _encoder_layer(
    source: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What `torch._transformer_encoder_layer_fwd` computes (its argument order), of source `[batch, seq, embed_dim]`.

    In mask True means "do not attend", and so does any number but 0 (the operator casts masks to bool). mask_type 0:
    `[seq, seq]`, 1: `[batch, seq]` of keys, 2: `[batch, heads, seq, seq]`.
    """
    batch, seq, _ = source.shape
    allowed = None
    if mask is not None:
        allowed = ~(mask[:, None, None, :] if mask_type == 1 else mask).to(torch.bool)

    def attention(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv_weight, qkv_bias).view(batch, seq, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        out = SDPA(q, k, v, allowed)
        return F.linear(out.transpose(1, 2).reshape(batch, seq, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        source = source + attention(norm_1(source))
        return source + feed_forward(norm_2(source))
    source = norm_1(source + attention(source))
    return norm_2(source + feed_forward(source))
