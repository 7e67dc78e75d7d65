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
from .compile import COMBINE_ROWS, COMBINE_THREADS, CONSUMERS, Variant, cubin
from .share import share

_PV = {"fast": "fp8", "balanced": "int8"}
_OUT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TILE = 64  # queries of one warpgroup


class _Params(ctypes.Structure):
    """`Params` of attention.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "q_scale", "q_shift", "k_scale", "v_scale", "v_channel", "used_keys", "ticket", "parts", "part_lse",
                "key_mask", "out", "lse",
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
                "tiles_per_head", "whole", "grid", "units", "wide", "zero",
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
        tiles_per_head = -(-self.q_len // (_TILE * CONSUMERS))
        tiles = tiles_per_head * batch * heads
        # Tiles of one length can be split so that all programs have as much to do. Those of different lengths come
        # longest first, and nobody waits long.
        one_length = low is None and high is None and not self.skip_blocks
        work = share(tiles, -(-self.kv_len // KEY_BLOCK) if one_length else 0, multiprocessors(self.index))
        variant = choose_variant(
            params.precision,
            out.dtype,
            d,
            dv,
            low is not None,
            high is not None,
            self.skip_blocks,
            lse is not None,
            work.units > 0,
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
        used_keys = v_channel + 12 * batch * kv_heads * dv
        # Two parts of each program: the end of one tile and the beginning of another.
        parts = torch.empty(
            2 * work.grid * _TILE * CONSUMERS * (dv + 1) if work.units else 0,
            dtype=torch.float32,
            device=out.device,
        )
        part_lse = parts.data_ptr() + 4 * 2 * work.grid * _TILE * CONSUMERS * dv
        stride_b, stride_h, stride_m = out.stride()[:3]
        numbers = _Params(
            q_scale=scales,
            q_shift=scales + 2 * self.q_size,  # its second half; read with the LSE only
            k_scale=k_scale,
            v_scale=v_scale,
            v_channel=v_channel,
            used_keys=used_keys,
            ticket=used_keys + 12 * batch,
            parts=parts.data_ptr(),
            part_lse=part_lse,
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
            tiles_per_head=tiles_per_head,
            whole=work.whole,
            grid=work.grid,
            units=work.units,
            wide=in_whole_rows(out),
        )
        pointers = (ctypes.c_void_p * 4)(*(each.getPtr() for each in maps), ctypes.addressof(numbers))
        functions = loaded(self.index, variant)
        stream = torch.cuda.current_stream(self.index).cuda_stream
        driver.launch(
            functions[0],
            (work.grid, 1),
            128 * (CONSUMERS + 1),
            variant.shared_bytes,
            stream,
            ctypes.addressof(pointers),
        )
        if work.units:
            # Its only argument is the last of `pointers`.
            driver.launch(
                functions[1],
                (tiles - work.whole, _TILE * CONSUMERS // COMBINE_ROWS),
                COMBINE_THREADS,
                0,
                stream,
                ctypes.addressof(pointers) + 3 * ctypes.sizeof(ctypes.c_void_p),
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
    split: bool,
) -> Variant:
    """The compiled form for padded head dims d and dv. How many warpgroups and tiles fit is a matter of registers
    and shared memory; the choices were measured (benchmarks/notes.md)."""
    pv = _PV.get(precision) or ("fp16" if dtype == torch.float16 else "bf16")
    stages = 4 if max(d, dv) <= 64 else 3
    return Variant(d, dv, pv, _OUT[dtype], stages, has_low, has_high, key_mask, return_lse, split)


@cache
def loaded(index: int, variant: Variant) -> tuple[Any, ...]:
    """The kernels `attention` and, where it is needed, `combine` on device `index`, which is current."""
    torch.cuda.current_stream(index)  # torch makes the context that the driver loads into
    names = {"attention": variant.shared_bytes, **({"combine": 0} if variant.split else {})}
    return driver.load(cubin(variant, _folder()), names)


@cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _folder() -> Path | None:
    try:
        return default_folder() / "kernels"
    except RuntimeError:  # no home
        return None


def in_whole_rows(out: Tensor) -> bool:
    """Whether each row of `out` lies at a multiple of 16 bytes: it can be written that much at a time."""
    return (
        all(stride * out.element_size() % 16 == 0 for stride in out.stride()[:3]) and out.data_ptr() % 16 == 0
    )


def writable_in_place(out: Tensor) -> bool:
    """Whether the kernel can write `out`: two neighbouring elements of a row at once."""
    return (
        out.stride(3) == 1
        and all(stride % 2 == 0 for stride in out.stride()[:3])
        and out.data_ptr() % (2 * out.element_size()) == 0
    )
