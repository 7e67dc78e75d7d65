"""8-bit attention behind the backend interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.backends import metadata_masks
from sage_inductor.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata, take_dropout
from sage_inductor.backends.sdpa import exact_attention, is_grouped
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels.arguments import as_number, check_choice
from sage_inductor.kernels.base import gradient_problem, reason
from sage_inductor.kernels.skipping import decider_problem, threshold_problem
from sage_inductor.operators import inference
from sage_inductor.operators.functional import refuse_context_parallel
from sage_inductor.operators.sharded import are_taught, is_dtensor

# The memory order of a `[batch, heads, seq, dim]` tensor that is contiguous as `[batch, seq, heads, dim]`.
NHD_MEMORY = [0, 2, 1, 3]


class SageAttentionBackend(AttentionBackend):
    """The quantised kernels of this package."""

    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        return "SAGE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SageAttentionImpl]:
        return SageAttentionImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """The head sizes that at least one GPU kernel family runs, whether or not this machine can run it.
        `get_attn_backend` checks the machine."""
        return sorted({size for name in kernels.AUTO_ORDER for size in kernels.get(name).head_dims})


class SageAttentionImpl(AttentionImpl):
    """Extra arguments:

    kernel: "auto", the default, takes the fastest kernel that can run the call, and exact SDPA where none can (on a CPU,
        or while gradients are needed). The name of a kernel runs that one or raises.
    precision: "fast", "balanced" or "accurate". "auto", the default, is the fastest of them that the GPU has.
    smoothing: "auto", the default, "mean", "equalise", "rotate" or "both", as `Config.smoothing`.
    skip_threshold: 0, the default, to below 1, as `Config.skip_threshold`.
    skip_by: "scores", the default, or "sample", as `Config.skip_by`.
    dropout_p, dropout_rate: only 0 can be served.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool,
        softmax_scale: float | None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        """Warns of extra arguments that it does not use.

        Raises:
            NotEligibleError: dropout above 0, or a kernel asked for by name that lacks head_size, precision or smoothing,
                or leaves out no tiles.
            ValueError: an unknown kernel, precision, smoothing or skip_by, a skip_threshold that is none, or as `AttentionImpl`.
        """
        super().__init__(num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix)
        dropout_p = take_dropout(
            extra_impl_args, valid=("kernel", "precision", "smoothing", "skip_threshold", "skip_by")
        )
        self.kernel: str = extra_impl_args.get("kernel", "auto")
        self.precision: str = extra_impl_args.get("precision", "auto")
        self.smoothing: str = extra_impl_args.get("smoothing", "auto")
        self.skip_threshold: float = as_number(extra_impl_args.get("skip_threshold", 0.0))
        self.skip_by: str = extra_impl_args.get("skip_by", "scores")
        check_choice("kernel", self.kernel, ("auto", *kernels.KERNELS))
        check_choice("precision", self.precision, kernels.PRECISION_CHOICES)
        check_choice("smoothing", self.smoothing, kernels.SMOOTHINGS)
        if problem := threshold_problem(self.skip_threshold) or decider_problem(self.skip_by):
            raise ValueError(problem)
        reasons = []
        if dropout_p > 0.0:
            reasons.append(reason("dropout_p", dropout_p, 0.0))
        if self.kernel != "auto":
            family = kernels.get(self.kernel)
            if head_size not in family.head_dims:
                reasons.append(reason("head_size", head_size, family.head_dims))
            if self.precision != "auto" and self.precision not in family.precisions:
                reasons.append(reason("precision", self.precision, family.precisions))
            if self.smoothing not in family.smoothings:
                reasons.append(reason("smoothing", self.smoothing, family.smoothings))
            if self.skip_threshold and not family.skips:
                reasons.append(reason("skip_threshold", self.skip_threshold, 0))
        if reasons:
            raise NotEligibleError(prefix or "SageAttentionImpl", reasons)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """As `AttentionImpl.forward`, for float16, bfloat16 and float32. Inputs that need gradients get exact attention with
        kernel="auto". Raises NotEligibleError, with every reason, where a kernel asked for by name cannot run the call."""
        refuse_context_parallel()
        self.check_inputs(query, key, value, output)
        attn_mask, is_causal = metadata_masks.of_metadata(attn_metadata)
        attn_mask = metadata_masks.normalized(attn_mask, query, key)
        is_causal = is_causal or self.causal
        if wanting := gradient_problem(query=query, key=key, value=value, attn_mask=attn_mask):
            if self.kernel != "auto":
                raise NotEligibleError(self.prefix or "SageAttentionImpl", [wanting])
            exact = exact_attention(query, key, value, attn_mask, is_causal, self.softmax_scale)
            return exact.contiguous() if output is None else output.copy_(exact)

        inputs = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, is_causal)
        options: dict[str, Any] = {
            "scale": self.softmax_scale,
            "enable_gqa": is_grouped(query, key),
            "kernel_name": self.kernel,
            "precision": self.precision,
            "smoothing": self.smoothing,
            "skip_threshold": self.skip_threshold,
            "skip_by": self.skip_by,
        }
        has_dtensors = is_dtensor(query) and are_taught()
        if output is not None and (has_dtensors or torch.is_autocast_enabled(query.device.type)):
            # Redistributed, or in autocast's dtype, the result is not what `output` can take as it is.
            return output.copy_(inference.attention(*inputs, **options).transpose(1, 2))
        if output is not None:
            inference.attention_out(*inputs, **options, output=output.transpose(1, 2))
            return output
        result: Tensor = inference.attention(*inputs, **options, memory_order=NHD_MEMORY)
        return result.transpose(1, 2)
