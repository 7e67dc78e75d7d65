"""The lists of blocks that the Hopper kernel's tiles read, as a kernel makes them of a mask's states, beside lists made by PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sage_inductor.kernels.triton.block_list import HEADER, block_list_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE, SOME, ALL = 0, 1, 2


def made(
    states: Tensor,
    stripes: int,
    q_len: int,
    kv_len: int,
    low: int | None = None,
    high: int | None = None,
    ascending: bool = False,
) -> Tensor:
    """int32 [batch, heads, tiles, HEADER + blocks], -1 where nothing was written. states: int8 [batch, heads, stripes of 64, blocks]."""
    batch, heads, rows, blocks = states.shape
    tiles = -(-rows // stripes)
    entries = torch.full((batch, heads, tiles, HEADER + blocks), -1, dtype=torch.int32, device=DEVICE)
    bounds = low or 0, high or 0, low is not None, high is not None
    block_list_kernel[(batch * heads * tiles,)](
        states.to(DEVICE), entries, q_len, kv_len, *bounds, STRIPES=stripes, BLOCK_M=64, BLOCK_N=128, ASCENDING=ascending
    )  # fmt: skip
    return entries.cpu()


def expected(
    states: Tensor, stripes: int, q_len: int, kv_len: int, low: int | None = None, high: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """For each tile of each batch and head in order, the entries of whole blocks and the others, both in ascending order."""
    lists = []
    for of_head in states.flatten(0, 1):
        for first in range(0, of_head.shape[0], stripes):
            tile = of_head[first : first + stripes]
            queries = range(first * 64, min((first + stripes) * 64, q_len))
            whole, others = [], []
            for block, found in enumerate(tile.T):
                seen = low is None or block * 128 + 127 >= queries[0] + low
                seen = seen and (high is None or block * 128 <= queries[-1] + high)
                if seen and bool((found != NONE).any()):
                    partly = not bool((found == ALL).all())
                    cut = block == 0 or partly or block * 128 + 128 > kv_len
                    cut = cut or (low is not None and block * 128 < queries[-1] + low)
                    cut = cut or (high is not None and block * 128 + 127 > queries[0] + high)
                    (others if cut else whole).append(2 * block + partly)
            lists.append((whole, others))
    return lists


def random_states(batch: int, heads: int, q_len: int, kv_len: int, shares: tuple[float, ...]) -> Tensor:
    shape = batch, heads, -(-q_len // 64), -(-kv_len // 128)
    drawn = torch.multinomial(torch.tensor(shares), shape[0] * shape[1] * shape[2] * shape[3], True)
    return drawn.view(shape).to(torch.int8)


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.3), (0.97, 0.02, 0.01), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("stripes", [2, 3])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "low", "high"),
    [
        (640, 1280, None, None),
        (1, 130, None, None),
        (449, 128 * 300 + 5, None, None),  # more states than are read at a time
        (450, 900, None, 0),
        (450, 900, -70, 33),
        (700, 300, -100, None),
        (300, 1000, None, 700),
        (900, 300, 500, None),  # the last queries see no key
    ],
)
def test_lists_are_those_of_the_states(
    shares: tuple[float, ...], stripes: int, q_len: int, kv_len: int, low: int | None, high: int | None
) -> None:
    states = random_states(2, 2, q_len, kv_len, shares)
    lists = made(states, stripes, q_len, kv_len, low, high).flatten(0, 2)
    wanted = expected(states, stripes, q_len, kv_len, low, high)
    assert len(lists) == len(wanted)
    for got, (whole, others) in zip(lists.tolist(), wanted, strict=True):
        assert got[:HEADER] == [len(whole) + len(others), len(whole)]
        assert got[HEADER : HEADER + got[0]] == whole + others[::-1]
        assert got[HEADER] >= 0  # is read even where the list is empty
    in_order = made(states, stripes, q_len, kv_len, low, high, ascending=True).flatten(0, 2)
    for got, (whole, others) in zip(in_order.tolist(), wanted, strict=True):
        assert got[:HEADER] == [len(whole) + len(others), 0]
        assert got[HEADER : HEADER + got[0]] == sorted(whole + others)


def test_compiles_where_there_is_no_gpu() -> None:
    """What Triton compiles, which its interpreter takes more than; of lists of a mask, of segments and of both with a threshold by scores."""
    helper = Path(__file__).parents[1] / "helpers" / "compile_offline.py"
    calls = [
        f"90 {precision} 128 {mask} mean bfloat16 hopper".split()
        for precision, mask in (("fast", "segments"), ("balanced", "segments+keys"), ("fast", "queries"), ("fast+skip=0.01", "queries"))
    ]  # fmt: skip
    command = [sys.executable, str(helper), *calls[0]]
    for call in calls[1:]:
        command += ["--", *call]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line]
    lists = [kernel for kernel in found if kernel["kernel"] in ("segment_list_kernel", "block_list_kernel")]
    assert len(lists) == len(calls)
    assert not [kernel for kernel in lists if kernel["stack"] > 0]  # nothing is spilled
