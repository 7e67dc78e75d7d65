"""Variants of the Triton kernels: the compile-time constants of a call, worked out once for all calls that share them.

Sizes are no part of a variant. One compiled form serves all lengths.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..device import interpreted
from ..smoothing import EQUALISING, LARGEST_BLOCK
from .configs import LaunchConfig, evened_config, launch_config, quantize_config
from .sampled import SAMPLED_REGISTERS, SAMPLED_WARPS
from .smoothing import rotation_tiles
from .workspace import padded_head_dim

INTERPRETED = interpreted()  # read when this is imported, as the kernels are decorated then, too

# Channels of K or Q, and of V, of one program of the statistics kernel: few enough for three programs on an SM.
SAMPLE_GROUP = 32
VALUE_SAMPLE_GROUP = 16
MASK_BLOCKS = 4  # blocks of a mask that one program looks at
# Softmax is full of a * b + c. Triton 3.9 asks to be told whether to fuse them; from 3.10 on it would not.
_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Variant:
    """What make_variant works out; launch.py hands it to each kernel."""

    d: int  # head_dim and value_head_dim, padded to the sizes of tiles
    dv: int
    v_dtype: torch.dtype
    v_transposed: bool
    tma: bool  # tiles are read by tensor descriptors, from compute capability 9.0 on
    rotation_rows: int  # of the matrices of all tiles of channels
    rotation_width: int
    evened_programs: int  # of the kernel that evens, at once on a multiprocessor
    overlap: bool  # each kernel after the first starts while the one in front of it ends
    config: LaunchConfig
    statistics: dict[str, Any]  # constexprs and options of each kernel
    evened: dict[str, Any]
    quantize: dict[str, Any]
    attention: dict[str, Any]
    sampling: dict[str, Any]
    mask_blocks: dict[str, Any]
    segments: dict[str, Any]
    spans: dict[str, Any]
    # Templates of the blocks that TMA reads. A tensor has two where its head dim is padded to two tiles (96 = 64 + 32).
    q_tiles: tuple[TensorDescriptor, ...]
    k_tiles: tuple[TensorDescriptor, ...]
    v_tiles: tuple[TensorDescriptor, ...]


@cache
def make_variant(
    arch: tuple[int, int],
    precision: str,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int,
    masked: bool,  # whether a mask differs from query to query
    mask_align: int,  # as in `launch_config`
    v_transposed: bool,
    config: LaunchConfig | None,
    segments: bool = False,
    smoothing: str = "mean",
) -> Variant:
    d0, d1 = padded_head_dim(head_dim)
    dv0, dv1 = padded_head_dim(v_head_dim)
    if dv0 == 256 and precision != "accurate":
        dv0 = dv1 = 128  # a block's product is a second accumulator; in two halves it fits the registers
    d, dv = d0 + d1, dv0 + dv1
    config = config or launch_config(arch, precision, d, dv, masked, mask_align, segments)
    n = config.block_n
    if precision == "fast":
        v_dtype = torch.float8_e4m3fn
    elif precision == "balanced":
        v_dtype = torch.int8
    else:
        v_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    dims = {"HEAD_DIM": head_dim, "V_HEAD_DIM": v_head_dim}
    padded = {"D": d, "DV": dv, "D_POW2": triton.next_power_of_2(d), "DV_POW2": triton.next_power_of_2(dv)}
    rotation = rotation_tiles(smoothing, head_dim)
    rotation_width = min(padded["D_POW2"], LARGEST_BLOCK)
    evening = {"EQUALISE": smoothing in EQUALISING, "ROTATION": rotation}
    evened_launch = evened_config(arch, padded["D_POW2"], dtype.itemsize)
    evened_options = evened_launch.options()
    ahead = evened_options.pop("num_stages") > 1
    quantize_options = quantize_config(arch, max(padded["D_POW2"], padded["DV_POW2"])).options()
    quantize_options.pop("num_stages")
    ptx = not INTERPRETED
    v_transposed = v_transposed or precision != "accurate"
    tma = arch[0] >= 9
    overlap = tma and not INTERPRETED  # programmatic dependent launch
    overlapped = {"launch_pdl": True} if overlap else {}
    return Variant(
        d=d,
        dv=dv,
        v_dtype=v_dtype,
        v_transposed=v_transposed,
        tma=tma,
        rotation_rows=rotation_width * len(rotation or ()),
        rotation_width=rotation_width,
        evened_programs=16 // evened_launch.num_warps,
        overlap=overlap,
        config=config,
        statistics={
            **dims,
            "D": d,
            "DV": dv,
            "D_POW2": padded["D_POW2"],
            "DV_POW2": padded["DV_POW2"],
            "Q_ROWS": 64 if padded["D_POW2"] == 256 else 128,
            "V_STATISTICS": precision != "accurate",
            "V_TRANSPOSED": v_transposed,
            "COPIES_V": precision == "accurate" and smoothing != "mean",
            **evening,
            "GROUP": SAMPLE_GROUP,
            "V_GROUP": VALUE_SAMPLE_GROUP,
            "PTX": ptx,
            "OVERLAP": overlap,
            "num_warps": 8,
            "maxnreg": 80,
            **_FUSED,
        },
        evened={
            "HEAD_DIM": head_dim,
            **padded,
            "PRECISION": precision,
            **evening,
            "AHEAD": ahead,
            "PTX": ptx,
            "OVERLAP": overlap,
            **evened_options,
            **overlapped,
            **_FUSED,
        },
        quantize={
            **dims,
            **padded,
            "PRECISION": precision,
            "V_TRANSPOSED": v_transposed,
            "PTX": ptx,
            "OVERLAP": overlap,
            **quantize_options,
            **overlapped,
            **_FUSED,
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
            "OVERLAP": overlap,
            **config.options(),
            **overlapped,
            **_FUSED,
        },
        sampling={
            "D0": d0,
            "D1": d1,
            "DV": dv,
            "num_warps": SAMPLED_WARPS,
            "num_stages": 3,
            "maxnreg": SAMPLED_REGISTERS,
            **_FUSED,
        },
        mask_blocks={
            "BLOCK_M": config.block_m,
            "BLOCK_N": n,
            "BLOCKS": MASK_BLOCKS,
            "num_warps": 4,
            **_FUSED,
        },
        segments={"BLOCK_M": config.block_m, "BLOCK_N": n, "num_warps": 1, **_FUSED},
        spans={"BLOCK_M": config.block_m, "BLOCK_N": n, "num_warps": 1, **_FUSED},
        q_tiles=_templates(torch.int8, [[config.block_m, size] for size in (d0, d1) if size]),
        k_tiles=_templates(torch.int8, [[n, size] for size in (d0, d1) if size]),
        v_tiles=_templates(
            v_dtype, [[n, size] if v_dtype.itemsize == 2 else [size, n] for size in (dv0, dv1) if size]
        ),
    )


def _templates(dtype: torch.dtype, blocks: list[list[int]]) -> tuple[TensorDescriptor, ...]:
    return tuple(TensorDescriptor(torch.empty(256, dtype=dtype), block, [256, 1], block) for block in blocks)
