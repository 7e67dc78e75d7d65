"""Host side of the Hopper kernel: the Triton kernels' quantisation, then attention.cu on the same workspace."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..folder import default_folder
from ..triton.launch import Call, Workspace
from ..triton.quantize import KEY_BLOCK
from . import driver
from .compile import Variant, cubin

_PV = {"fast": "fp8", "balanced": "int8"}
_OUT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TILE = 64  # queries of one warpgroup


class _Params(ctypes.Structure):
    """`Params` of attention.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "q_scale", "q_shift", "k_scale", "v_scale", "v_channel", "used_keys", "key_mask", "out", "lse",
            )
        ]
        + [
            (name, ctypes.c_longlong)
            for name in ("out_b", "out_h", "out_m", "lse_b", "lse_h", "mask_b", "mask_n")
        ]
        + [
            (name, ctypes.c_int)
            for name in (
                "batch", "heads", "group", "q_len", "kv_len", "q_blocks", "kv_blocks", "low", "high", "v_dim",
                "tiles", "tiles_per_head", "zero",
            )
        ]
    )  # fmt: skip


class HopperCall(Call):
    """One dense attention call; `quantize` is the Triton kernels'."""

    V_TRANSPOSED: ClassVar[bool] = True

    __slots__ = ()

    def attend(self, workspace: Workspace, out: Tensor, lse: Tensor | None) -> None:
        if writable_in_place(out):
            self._attend(workspace, out, lse)
        else:
            dense = torch.empty_like(out, memory_format=torch.contiguous_format)
            self._attend(workspace, dense, lse)
            out.copy_(dense)

    def _attend(self, workspace: Workspace, out: Tensor, lse: Tensor | None) -> None:
        plan, params, heads, kv_heads, batch = self.plan, self.params, self.heads, self.kv_heads, self.batch
        d, dv = plan.d, plan.dv
        low, high = params.bounds(self.q_len, self.kv_len)
        variant = choose_variant(
            params.precision,
            out.dtype,
            d,
            dv,
            low is not None,
            high is not None,
            self.skip_blocks,
            lse is not None,
        )
        q_rows = heads * self.q_blocks * KEY_BLOCK
        keys = self.kv_blocks * KEY_BLOCK
        row, element = variant.row_bytes, variant.v_element
        maps = (
            driver.tensor_map(workspace.q8.data_ptr(), 1, q_rows, d, _TILE, row, row),
            driver.tensor_map(workspace.k8.data_ptr(), 1, kv_heads * keys, d, KEY_BLOCK, row, row),
            driver.tensor_map(workspace.v8.data_ptr(), element, kv_heads * dv, keys, dv, 128 // element, 128),
        )

        scales = workspace.scales.data_ptr()
        k_scale = scales + 4 * self.q_size
        v_scale = k_scale + 4 * kv_heads * self.kv_blocks
        v_channel = v_scale + 4 * (kv_heads * self.kv_blocks + batch * kv_heads * d)
        tiles_per_head = -(-self.q_len // (_TILE * variant.consumers))
        tiles = tiles_per_head * batch * heads
        stride_b, stride_h, stride_m = out.stride()[:3]
        numbers = _Params(
            q_scale=scales,
            q_shift=scales + 2 * self.q_size,  # its second half; read with the LSE only
            k_scale=k_scale,
            v_scale=v_scale,
            v_channel=v_channel,
            used_keys=v_channel + 12 * batch * kv_heads * dv,
            key_mask=None if self.attn_mask is None else self.attn_mask.data_ptr(),
            out=out.data_ptr(),
            lse=None if lse is None else lse.data_ptr(),
            out_b=stride_b,
            out_h=stride_h,
            out_m=stride_m,
            lse_b=0 if lse is None else lse.stride(0),
            lse_h=0 if lse is None else lse.stride(1),
            mask_b=self.mask_strides[0],
            mask_n=self.mask_strides[3],
            batch=batch,
            heads=heads,
            group=heads // kv_heads,
            q_len=self.q_len,
            kv_len=self.kv_len,
            q_blocks=self.q_blocks,
            kv_blocks=self.kv_blocks,
            low=low or 0,
            high=high or 0,
            v_dim=out.shape[3],
            tiles=tiles,
            tiles_per_head=tiles_per_head,
        )
        pointers = (ctypes.c_void_p * 4)(*(each.getPtr() for each in maps), ctypes.addressof(numbers))
        # Tiles of one length are dealt out once. Of different lengths, the hardware gives each multiprocessor the
        # next when it is free.
        one_length = low is None and high is None and not self.skip_blocks
        grid = min(tiles, multiprocessors(self.index)) if one_length else tiles
        driver.launch(
            loaded(self.index, variant),
            grid,
            128 * (variant.consumers + 1),
            variant.shared_bytes,
            torch.cuda.current_stream(self.index).cuda_stream,
            ctypes.addressof(pointers),
        )


@cache
def choose_variant(
    precision: str,
    dtype: torch.dtype,
    d: int,
    dv: int,
    has_low: bool,
    has_high: bool,
    key_mask: bool,
    return_lse: bool,
) -> Variant:
    """The compiled form for padded head dims d and dv. How many warpgroups and tiles fit is a matter of registers
    and shared memory; the choices were measured (benchmarks/notes.md)."""
    pv = _PV.get(precision) or ("fp16" if dtype == torch.float16 else "bf16")
    small = max(d, dv) <= 64
    # Three warpgroups have 160 registers a thread: enough for FP8 at head dim 64, if nothing else is kept. Under a
    # causal mask their tiles of 192 queries would end in two masked blocks.
    consumers = 3 if small and pv == "fp8" and not (has_low or has_high or key_mask) else 2
    return Variant(
        d, dv, pv, _OUT[dtype], consumers, 4 if small else 3, has_low, has_high, key_mask, return_lse
    )


@cache
def loaded(index: int, variant: Variant) -> Any:
    """The kernel on device `index`, which is current."""
    torch.cuda.current_stream(index)  # torch makes the context that the driver loads into
    return driver.load(cubin(variant, _folder()), "attention", variant.shared_bytes)


@cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _folder() -> Path | None:
    try:
        return default_folder() / "kernels"
    except RuntimeError:  # no home
        return None


def writable_in_place(out: Tensor) -> bool:
    """Whether the kernel can write `out`: two neighbouring elements of a row at once."""
    return (
        out.stride(3) == 1
        and all(stride % 2 == 0 for stride in out.stride()[:3])
        and out.data_ptr() % (2 * out.element_size()) == 0
    )
