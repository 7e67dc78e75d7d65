"""Launch configurations from a table: nothing is measured when a model runs.

The table for sm_90 was measured on an H200 (triton 3.6.0, torch 2.11.0) at 16k and 4k tokens, causal and not.
Other GPUs take the nearest configuration that fits their shared memory; `search.rank_launch_configs` finds a better one.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class LaunchConfig:
    """The parameters of a launch. The kernels that quantise use `num_warps` and `max_registers`, and the one that evens `num_stages`.

    block_m: queries per program, a power of two up to 128.
    block_n: keys per step, 64 or 128. "balanced" rounds P per step; the reference does so per 128 keys.
    max_registers: per thread; None leaves them to the compiler.
    """

    block_m: int = 64
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a triton launch."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


# precisions -> (largest padded head dim, configuration) on sm_90; the first that fits the head dim is taken. The number of
# programs that share an SM decides: with 168 registers it is three of 128 threads, with 128 registers four.
_SM90: dict[str, list[tuple[int, LaunchConfig]]] = {
    "8-bit PV": [
        (64, LaunchConfig(num_stages=3, max_registers=128)),
        (96, LaunchConfig(max_registers=128)),
        (128, LaunchConfig(max_registers=168)),
        (192, LaunchConfig()),
        (256, LaunchConfig(block_m=128, num_warps=8)),
    ],
    "16-bit PV": [
        (64, LaunchConfig(max_registers=168)),
        (128, LaunchConfig()),
        (256, LaunchConfig(block_n=64)),
    ],
}


# 8-bit PV with segments on sm_90, by padded head dim: ids take registers, of which the configurations above leave too few, by the
# disassembly. Not measured.
_SM90_SEGMENTS: dict[int, LaunchConfig] = {
    96: LaunchConfig(max_registers=168),
    128: LaunchConfig(),
    256: LaunchConfig(block_n=64, num_warps=8),
}

_overrides: dict[tuple[tuple[int, int], str, int, bool], LaunchConfig] = {}


def override(
    capability: tuple[int, int], precision: str, head_dim: int, config: LaunchConfig, masked: bool = False
) -> None:
    """Use `config` from now on for `precision` and a padded head dim on GPUs of `capability`.

    `search.rank_launch_configs` finds configurations. `head_dim` is the larger of K's and V's, `masked` as in
    `launch_config`. Call it before the first attention call of that kind.
    """
    _overrides[capability, precision, head_dim, masked] = config


def launch_config(
    capability: tuple[int, int],
    precision: str,
    d: int,
    dv: int,
    masked: bool = False,
    mask_align: int = 16,
    segments: bool = False,
) -> LaunchConfig:
    """The attention kernel's configuration.

    d, dv: the padded head dims of K and V.
    masked: whether attn_mask differs from query to query.
    mask_align: how many elements of attn_mask can be read at once. 0 where it comes packed in bits, which take two
        registers only.
    segments: whether ids of queries and keys are compared.
    """
    if (capability, precision, max(d, dv), masked) in _overrides:
        return _overrides[capability, precision, max(d, dv), masked]
    if segments and masked:
        return LaunchConfig(block_n=64, num_warps=8 if max(d, dv) > 96 else 4)
    if (masked and (mask_align or capability[0] != 9)) or (segments and capability[0] != 9):
        return _masked_config(capability, precision, max(d, dv), mask_align)
    table = _SM90["16-bit PV" if precision == "accurate" else "8-bit PV"]
    config = next(config for limit, config in table if max(d, dv) <= limit)
    if capability[0] == 9:
        by_ids = _SM90_SEGMENTS if segments and precision != "accurate" else {}
        return by_ids.get(max(d, dv), config)
    # Elsewhere registers are left to the compiler, and K and V tiles must fit: 99 KiB on sm_86 and sm_89.
    config = replace(config, max_registers=None, num_stages=2)
    if max(d, dv) > 64:
        config = replace(config, block_m=128, block_n=64, num_warps=8)
    tile = config.block_n * (d + dv * (2 if precision == "accurate" else 1))
    if tile * config.num_stages > 72 * 1024:
        config = replace(config, num_stages=1)
    return config


def _masked_config(
    capability: tuple[int, int], precision: str, head_dim: int, mask_align: int
) -> LaunchConfig:
    """The configuration for a mask of a row per query. A tile of the mask, with its addresses, takes the more registers the
    fewer elements are read at once."""
    if capability[0] == 9 and head_dim in (*range(32, 129, 32), 192):
        # Measured on an H100 at head dims 64, 96, 128 and 192, bool and bfloat16, lengths of 8,192 and 8,191: with 8 warps
        # everything takes twice as long, and 128 keys of a mask that is read byte by byte up to 14 times.
        if head_dim == 128:
            return LaunchConfig()
        if head_dim == 192 or mask_align < 8:
            return LaunchConfig(block_n=64)
        return LaunchConfig(max_registers=168 if head_dim <= 64 else None)
    # 4 warps would spill up to 2.5 kB a thread. "accurate" with a mask of float32 would take 104 KiB with 128 keys, of the
    # 99 of sm_86 and sm_89.
    wide = head_dim == 128 and precision != "accurate"
    return LaunchConfig(block_n=128 if wide else 64, num_warps=8)


def quantize_config(capability: tuple[int, int], head_dim: int) -> LaunchConfig:
    """The quantise kernel's configuration for a head dim rounded up to a power of two."""
    if capability[0] == 9:
        registers = {64: 80, 128: 168}.get(head_dim)  # six and three programs on an SM
        return LaunchConfig(num_warps=16 if head_dim == 256 else 4, max_registers=registers)
    if head_dim == 128:
        return LaunchConfig(num_warps=8, max_registers=80)  # three programs on an SM
    return LaunchConfig(num_warps=16 if head_dim == 256 else 4)


def evened_config(capability: tuple[int, int], head_dim: int, itemsize: int) -> LaunchConfig:
    """The same of the kernel that evens Q and K, of `itemsize` bytes an element. `num_stages` is 2 where the rows of a block are on
    their way while the one in front is rounded. On sm_90, with 128 registers, 16 warps share an SM, whose registers and shared
    memory are full then; elsewhere shared memory has no room for it."""
    ahead = capability[0] == 9 and head_dim <= 128 and itemsize == 2
    return LaunchConfig(
        num_warps={128: 8, 256: 16}.get(head_dim, 4),
        num_stages=2 if ahead else 1,
        max_registers=128 if ahead else None,
    )
