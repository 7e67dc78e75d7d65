"""Host side of the Triton kernel: workspaces, tensor descriptors and the three launches of an attention
call."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sage_inductor.reference import is_key_mask

from ..base import AttentionParams
from . import capability
from .attention import attention_kernel
from .quantize import KEY_BLOCK, padded_head_dim, quantize_kernel, scales_size, statistics_kernel
from .tuning import LaunchConfig, launch_config, quantize_config

INTERPRETED = not isinstance(attention_kernel, triton.JITFunction)
INTERPRETED_ARCH = (9, 0)  # what the interpreter stands for

_SAMPLE_GROUP = 16  # channels of one program of the statistics kernel: few enough for three programs on an SM

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the sizes of the sequences, worked out once."""

    d: int  # padded head dims
    dv: int
    v_dtype: torch.dtype
    v_transposed: bool
    tma: bool
    config: LaunchConfig
    statistics: dict[str, Any]  # constexprs and options of each kernel
    quantize: dict[str, Any]
    attention: dict[str, Any]
    q_tiles: tuple[TensorDescriptor, ...]  # templates: tensor, shape and strides are set by `tiles`
    k_tiles: tuple[TensorDescriptor, ...]
    v_tiles: tuple[TensorDescriptor, ...]

    def tiles(
        self, workspace: Workspace, heads: int, q_blocks: int, kv_heads: int, kv_blocks: int
    ) -> tuple[TensorDescriptor | Tensor | None, ...]:
        """First and second tile of Q's, K's and V's workspace; None where a head dim is a single tile."""
        if not self.tma:
            return tuple(
                [
                    tensor if templates[n:] else None
                    for tensor, templates in zip(
                        workspace, (self.q_tiles, self.k_tiles, self.v_tiles), strict=False
                    )
                    for n in range(2)
                ]
            )
        keys = kv_blocks * KEY_BLOCK
        q = _on(self.q_tiles, workspace.q8, heads * q_blocks * KEY_BLOCK, self.d)
        k = _on(self.k_tiles, workspace.k8, kv_heads * keys, self.d)
        if self.v_transposed:
            v = _on(self.v_tiles, workspace.v8, kv_heads * self.dv, keys)
        else:
            v = _on(self.v_tiles, workspace.v8, kv_heads * keys, self.dv)
        return *q, *k, *v


def _on(
    templates: tuple[TensorDescriptor, ...], tensor: Tensor, rows: int, columns: int
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """The templates over `tensor` as a matrix. Copies skip the constructor's checks, which cost
    microseconds."""
    made = []
    for template in templates:
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(template.__dict__)
        descriptor.base, descriptor.shape, descriptor.strides = tensor, [rows, columns], [columns, 1]
        made.append(descriptor)
    return made[0], made[1] if len(made) == 2 else None


def _templates(dtype: torch.dtype, blocks: list[list[int]]) -> tuple[TensorDescriptor, ...]:
    return tuple(TensorDescriptor(torch.empty(256, dtype=dtype), block, [256, 1], block) for block in blocks)


@cache
def _plan(
    arch: tuple[int, int],
    precision: str,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int,
    masked: bool,
    v_transposed: bool,
    config: LaunchConfig | None,
) -> _Plan:
    d0, d1 = padded_head_dim(head_dim)
    dv0, dv1 = padded_head_dim(v_head_dim)
    if dv0 == 256 and precision != "accurate":
        dv0 = dv1 = 128  # the product of a block is a second accumulator: in halves it fits the registers
    d, dv = d0 + d1, dv0 + dv1
    config = config or launch_config(arch, precision, d, dv, masked)
    n = config.block_n
    if precision == "fast":
        v_dtype = torch.float8_e4m3fn
    elif precision == "balanced":
        v_dtype = torch.int8
    else:
        v_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    dims = {"HEAD_DIM": head_dim, "V_HEAD_DIM": v_head_dim}
    padded = {"D": d, "DV": dv, "D_POW2": triton.next_power_of_2(d), "DV_POW2": triton.next_power_of_2(dv)}
    quantize_options = quantize_config(max(padded["D_POW2"], padded["DV_POW2"])).options()
    quantize_options.pop("num_stages")
    ptx = not INTERPRETED
    v_transposed = v_transposed or precision != "accurate"
    tma = arch[0] >= 9
    return _Plan(
        d=d,
        dv=dv,
        v_dtype=v_dtype,
        v_transposed=v_transposed,
        tma=tma,
        config=config,
        statistics={**dims, "D": d, "DV": dv, "GROUP": _SAMPLE_GROUP, "num_warps": 8, "maxnreg": 80},
        quantize={
            **dims,
            **padded,
            "PRECISION": precision,
            "V_TRANSPOSED": v_transposed,
            "PTX": ptx,
            **quantize_options,
        },
        attention={
            "V_HEAD_DIM": v_head_dim,
            "D0": d0,
            "D1": d1,
            "DV0": dv0,
            "DV1": dv1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": n,
            "PRECISION": precision,
            "TMA": tma,
            "PTX": ptx,
            **config.options(),
        },
        q_tiles=_templates(torch.int8, [[config.block_m, size] for size in (d0, d1) if size]),
        k_tiles=_templates(torch.int8, [[n, size] for size in (d0, d1) if size]),
        v_tiles=_templates(
            v_dtype, [[n, size] if v_dtype.itemsize == 2 else [size, n] for size in (dv0, dv1) if size]
        ),
    )


class Workspace(NamedTuple):
    """What `Call.quantize` writes and `Call.attend` reads; quantize.py describes it."""

    q8: Tensor
    k8: Tensor
    v8: Tensor
    scales: Tensor


class Call:
    """One attention call, dense or varlen, taken apart; `quantize` and `attend` are its two halves."""

    V_TRANSPOSED: ClassVar[bool] = False  # whether 16-bit V is too

    __slots__ = (
        "attn_mask", "batch", "cu_seqlens_k", "cu_seqlens_q", "heads", "index", "k_align", "k_strides", "key",
        "key_mask", "kv_blocks", "kv_heads", "kv_len", "mask_align", "mask_kind", "mask_strides", "mask_units",
        "narrow", "params", "plan", "q_align", "q_blocks", "q_len", "q_size", "q_strides", "query", "return_lse", "skip_blocks", "v_align",
        "v_strides", "value",
    )  # fmt: skip

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        return_lse: bool,
        *,
        config: LaunchConfig | None = None,
        varlen: tuple[Tensor, Tensor, int, int] | None = None,
    ) -> None:
        self.index = index = query.device.index
        arch = INTERPRETED_ARCH if INTERPRETED else capability(index)
        self.query, self.key, self.value, self.params, self.return_lse = query, key, value, params, return_lse
        self.heads, self.kv_heads = query.shape[1], key.shape[1]
        if varlen is None:
            batch, self.q_len, self.kv_len = query.shape[0], query.shape[2], key.shape[2]
            self.q_blocks = batch * -(-self.q_len // KEY_BLOCK)
            self.kv_blocks = batch * -(-self.kv_len // KEY_BLOCK)
            self.cu_seqlens_q = self.cu_seqlens_k = None
            q_strides, k_strides, v_strides = query.stride(), key.stride(), value.stride()
        else:
            self.cu_seqlens_q, self.cu_seqlens_k, self.q_len, self.kv_len = varlen
            batch = self.cu_seqlens_k.shape[0] - 1
            self.q_blocks = query.shape[0] // KEY_BLOCK + batch
            self.kv_blocks = key.shape[0] // KEY_BLOCK + batch
            q_strides, k_strides, v_strides = (packed_strides(t) for t in (query, key, value))
        self.batch = batch
        self.q_size = self.heads * self.q_blocks * KEY_BLOCK * (2 if return_lse else 1)
        self.q_align, self.q_strides = _in_units(q_strides)
        self.k_align, self.k_strides = _in_units(k_strides)
        self.v_align, self.v_strides = _in_units(v_strides)
        self.narrow = max(*q_strides, *k_strides, *v_strides, self.q_size) < 2**31
        self.attn_mask = None
        self.mask_kind = 0
        self.mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        self.mask_units: Strides = (0, 0, 0, 0)
        self.mask_align = 1
        self.key_mask = self.skip_blocks = False
        if attn_mask is not None:
            attn_mask = self.attn_mask = attn_mask.expand(batch, self.heads, self.q_len, self.kv_len)
            self.mask_kind = 1 if attn_mask.dtype == torch.bool else 2
            strides = self.mask_strides = attn_mask.stride()
            self.mask_align, self.mask_units = _in_units(strides, self.kv_len)
            self.key_mask = strides[2] == 0 or self.q_len == 1
            self.skip_blocks = is_key_mask(attn_mask)
            self.narrow = self.narrow and max(strides) < 2**31
        masked = self.mask_kind != 0 and not self.key_mask
        dims = query.shape[-1], value.shape[-1]
        self.plan = _plan(arch, params.precision, query.dtype, *dims, masked, self.V_TRANSPOSED, config)

    def quantize(self) -> Workspace:
        plan, params, batch, heads, kv_heads = self.plan, self.params, self.batch, self.heads, self.kv_heads
        query, key, value = self.query, self.key, self.value
        kv_len, kv_blocks, q_size = self.kv_len, self.kv_blocks, self.q_size
        device = key.device
        rows = kv_heads * kv_blocks * KEY_BLOCK
        workspace = Workspace(
            torch.empty(heads * self.q_blocks * KEY_BLOCK * plan.d, dtype=torch.int8, device=device),
            torch.empty(rows * plan.d, dtype=torch.int8, device=device),
            torch.empty(rows * plan.dv, dtype=plan.v_dtype, device=device),
            torch.empty(
                scales_size(q_size, batch, kv_heads, kv_blocks, plan.d, plan.dv),
                dtype=torch.float32,
                device=device,
            ),
        )
        varlen = self.cu_seqlens_k is not None
        q_strides, k_strides, v_strides = self.q_strides, self.k_strides, self.v_strides
        v_statistics = params.precision != "accurate"
        mask, mask_kind = None, 0
        mask_strides: tuple[int, ...] = (0, 0)
        programs = batch * kv_heads * ((plan.d + plan.dv if v_statistics else plan.d) // _SAMPLE_GROUP)
        if self.skip_blocks:
            mask, mask_kind, mask_strides = self.attn_mask, self.mask_kind, self.mask_strides[::3]
            programs += batch
        self._launch(
            statistics_kernel,
            programs,
            (key, value, self.cu_seqlens_k, mask),
            (workspace.scales,),
            (
                q_size,
                batch,
                kv_heads,
                kv_len,
                kv_blocks,
                *k_strides,
                *v_strides,
                *mask_strides,
            ),
            (k_strides[3], v_strides[3], mask_strides[1]),
            (self.k_align, self.v_align, varlen, v_statistics, mask_kind),
            plan.statistics,
        )
        scale = query.shape[-1] ** -0.5 if params.scale is None else float(params.scale)
        programs = 2 * batch * kv_heads * -(-kv_len // KEY_BLOCK) + batch * heads * -(
            -self.q_len // KEY_BLOCK
        )
        self._launch(
            quantize_kernel,
            programs,
            (query, key, value, self.cu_seqlens_q, self.cu_seqlens_k, mask),
            workspace,
            (
                scale, q_size, batch, heads, kv_heads, self.q_len, kv_len, self.q_blocks, kv_blocks,
                *q_strides, *k_strides, *v_strides, *mask_strides,
            ),
            (q_strides[3], k_strides[3], v_strides[3], mask_strides[1]),
            (self.q_align, self.k_align, self.v_align, varlen, self.return_lse, mask_kind),
            plan.quantize,
        )  # fmt: skip
        return workspace

    def attend(self, workspace: Workspace, out: Tensor, lse: Tensor | None) -> None:
        plan, params, heads, kv_heads = self.plan, self.params, self.heads, self.kv_heads
        varlen = self.cu_seqlens_k is not None
        out_strides: tuple[int, ...] = packed_strides(out) if varlen else out.stride()
        self.narrow = self.narrow and max(out_strides) < 2**31
        out_align, out_strides = _in_units(out_strides)
        lse_strides = (0, 0) if lse is None else (0 if varlen else lse.stride(0), lse.stride(-2))
        has_high = params.is_causal or params.window_right >= 0
        mask_units = self.mask_units
        self._launch(
            attention_kernel,
            -(-self.q_len // plan.config.block_m) * self.batch * heads,
            (self.attn_mask, out, lse, self.cu_seqlens_q, self.cu_seqlens_k),
            (*plan.tiles(workspace, heads, self.q_blocks, kv_heads, self.kv_blocks), workspace.scales),
            (
                self.q_size, self.batch, heads, heads // kv_heads, self.q_len, self.kv_len, self.q_blocks,
                self.kv_blocks, params.window_left, 0 if params.is_causal else params.window_right,
                *out_strides, *lse_strides, *mask_units,
            ),
            (out_strides[3], mask_units[3]),
            (
                out_align, self.mask_align, params.window_left >= 0, has_high, params.bottom_right,
                self.mask_kind, self.key_mask, self.skip_blocks, varlen, lse is not None,
            ),
            plan.attention,
        )  # fmt: skip

    def run(self, out: Tensor, lse: Tensor | None) -> None:
        """Both halves, on the inputs' device (Triton launches on the current one) and its current stream."""
        if INTERPRETED or self.index == torch.cuda.current_device():
            self.attend(self.quantize(), out, lse)
        else:
            with torch.cuda.device(self.index):
                self.attend(self.quantize(), out, lse)

    def _launch(
        self,
        kernel: Any,
        programs: int,
        callers: tuple[Tensor | None, ...],
        own: tuple[Tensor | TensorDescriptor | None, ...],
        numbers: tuple[float, ...],
        specialized: tuple[int, ...],
        variant: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        """Launch `kernel(*callers, *own, *numbers, *variant, **constants)` on `programs` programs.

        Triton looks at each of its arguments at each launch, which takes longer than a small attention call
        does on the GPU. What the compiled form depends on is known here, so it is kept and launched directly:
        the caller's tensors (presence, dtype, alignment), the few strides that are specialised on, the
        variant, the plan (it stands for `constants`) and the device. Numbers beyond 32 bits change the
        compiled form and take Triton's own way. Tensors go as their addresses: Triton would ask the driver
        about each of them.
        """
        if not self.narrow or INTERPRETED:
            kernel[(programs,)](*callers, *own, *numbers, *variant, **constants)
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in callers]
        key = (
            kernel,
            id(self.plan),
            self.index,
            variant,
            tuple([None if tensor is None else tensor.dtype for tensor in callers]),
            tuple([None if address is None else address & 15 for address in addresses]),
            tuple([_specialization(stride) for stride in specialized]),
        )
        known = _compiled.get(key)
        if known is None:
            compiled = kernel[(programs,)](*callers, *own, *numbers, *variant, **constants)
            names = kernel.arg_names[len(callers) + len(own) + len(numbers) + len(variant) :]
            _compiled[key] = compiled, tuple([constants[name] for name in names])
        else:
            compiled, tail = known
            own_addresses = [part.data_ptr() if type(part) is Tensor else part for part in own]
            stream = triton.runtime.driver.active.get_current_stream(self.index)
            compiled[(programs, 1, 1)](*addresses, *own_addresses, *numbers, *variant, *tail, stream=stream)


def _specialization(number: int) -> int:
    """What Triton compiles an integer argument for: 1 itself, a multiple of 16, or (0) any other."""
    return 1 if number == 1 else 16 if number % 16 == 0 else 0


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    out: Tensor,
    lse: Tensor | None,
    call: type[Call] = Call,
) -> None:
    """`TritonKernel.run`, and that of the family whose `call` is given."""
    if out.numel() == 0:
        return
    if key.shape[2] == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    call(query, key, value, attn_mask, params, lse is not None).run(out, lse)


def packed_strides(tensor: Tensor) -> Strides:
    """Of `[total, heads, head_dim]`, as if it were `[1, heads, total, head_dim]`."""
    return 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)


def _in_units(strides: tuple[int, ...], length: int = 0) -> tuple[int, Strides]:
    """(unit, strides): the batch, head and row strides in a power of two up to 16 elements that divides them
    and `length`.

    The kernels are not specialised on these strides, which change with the sequence length, but must know
    what divides them to make wide loads.
    """
    b, h, n, d = strides
    unit = b | h | n | length | 16
    unit &= -unit
    return unit, (b // unit, h // unit, n // unit, d)
