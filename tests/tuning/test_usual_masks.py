"""The masks that kernels are timed with: those of models, and scattered ones beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.tuning import Comparison, SdpaCall, measure
from sage_inductor.tuning.machine import machine
from sage_inductor.tuning.measure import DOCUMENTS, KEPT_KEYS, usual_mask, usual_segments
from sage_inductor.tuning.store import Result, Store, Timing


def comparison(mask: Tensor | None) -> Comparison:
    q = TensorSpec.of(torch.empty(4, 2, 48, 32))
    spec = None if mask is None else TensorSpec.of(mask)
    problem = AttentionProblem(q, q, q, None if spec is None else spec.as_4d(), AttentionParams())
    return Comparison(problem, SdpaCall(q, q, q, spec, False, None, False))


@pytest.mark.parametrize("shape", [(4, 1, 1, 100), (4, 2, 1, 100), (1, 100), (1, 1, 1, 100), (7,), (3, 1, 1)])
def test_masks_over_keys_leave_a_prefix(shape: tuple[int, ...]) -> None:
    mask = usual_mask(shape)
    assert mask.shape == shape and mask.dtype == torch.bool and bool(mask[..., 0].all())
    rows = mask.reshape(-1, shape[-1])
    assert bool((rows.int().diff(dim=-1) <= 0).all())  # no key behind one that is left out
    if shape[-1] == 100:
        assert abs(float(rows.float().mean()) - KEPT_KEYS) < 0.02
    if rows.shape[0] == 4:
        assert len(set(rows.sum(-1).tolist())) == 4 and bool(rows[0].all())  # ragged over the batch


@pytest.mark.parametrize("shape", [(2, 1, 40, 40), (40, 40), (2, 3, 8, 40), (1, 1, 40, 8), (3, 40, 40)])
def test_masks_of_a_row_per_query_are_causal_and_padded_in_front(shape: tuple[int, ...]) -> None:
    mask = usual_mask(shape)
    q_len, kv_len = shape[-2:]
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(max(0, kv_len - q_len))
    entries = mask.reshape(-1, q_len, kv_len)
    assert mask.shape == shape and bool(entries[..., 0].all()) and torch.equal(entries[0], causal)
    assert not bool((entries & ~causal).any())
    for entry in entries[1:]:
        assert not bool(entry[:, 1].any()) or shape[-1] == 8  # padding in front


@pytest.mark.parametrize("length", [1, 7, 100, 4096, 32768])
def test_segments_are_documents_one_behind_the_other(length: int) -> None:
    ids = usual_segments(length)
    assert ids.shape == (length,) and ids.dtype == torch.int32
    assert int(ids[0]) == 0 and set(ids.diff().tolist()) <= {0, 1}
    lengths = ids.bincount()
    if length > 3 * max(DOCUMENTS):
        assert set(lengths[:-1].tolist()) == set(DOCUMENTS)
    elif length >= 100:
        assert len(lengths) >= 3 and int(lengths.max()) <= length / 3 + 1


def with_segments(batch: int, q_len: int, kv_len: int) -> Comparison:
    q, k = (TensorSpec.of(torch.empty(batch, 2, length, 32)) for length in (q_len, kv_len))
    own, other = (
        TensorSpec.of(torch.empty(length, dtype=torch.int32).expand(batch, length))
        for length in (q_len, kv_len)
    )
    mask = TensorSpec.of(torch.empty(batch, 1, q_len, kv_len, dtype=torch.bool))
    problem = AttentionProblem(q, k, k, None, AttentionParams(), False, own, other)
    return Comparison(problem, SdpaCall(q, k, k, mask, False, None, False))


def test_segments_are_timed_packed_and_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    attention = measure.inference.attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.stack([kwargs["query_segments"], kwargs["key_segments"][:, :48]]).clone())
        return attention(*args, **kwargs)

    monkeypatch.setattr(measure.inference, "attention", spy)
    compared = with_segments(2, 48, 80)
    result = measure.measure(compared, ["reference"])
    assert not result.failed and result.kernels["reference"].scattered is not None
    first, last = seen[0], seen[-1]
    assert torch.equal(first[0], usual_segments(48).expand(2, 48))
    assert torch.equal(first[1], usual_segments(80)[:48].expand(2, 48))
    assert bool((last.diff(dim=-1) < 0).any())


def test_segments_have_results_of_their_own_and_follow_the_lengths() -> None:
    compared = with_segments(2, 48, 80)
    without = replace(compared, problem=replace(compared.problem, query_segments=None, key_segments=None))
    assert compared.key() != without.key() and "segments" not in without.key()["kernel"]
    longer = compared.at(96, 160).problem
    assert longer.query_segments is not None and longer.key_segments is not None
    assert (longer.query_segments.shape, longer.key_segments.shape) == ((2, 96), (2, 160))
    assert (longer.query_segments.stride, longer.key_segments.stride) == ((0, 1), (0, 1))


@pytest.mark.parametrize("mask", ["none", "keys", "queries", "bias"])
def test_only_bool_masks_are_timed_scattered_too(mask: str) -> None:
    tensors = {
        "none": None,
        "keys": torch.ones(4, 1, 1, 48, dtype=torch.bool),
        "queries": torch.ones(4, 1, 48, 48, dtype=torch.bool),
        "bias": torch.zeros(48, 48),
    }
    result = measure.measure(comparison(tensors[mask]), ["reference"])
    scattered = result.kernels["reference"].scattered
    assert (scattered is not None and scattered > 0) == (mask in ("keys", "queries"))


def test_the_second_time_is_that_of_scattered_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[3].clone())
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(measure, "builtin_sdpa", spy)
    mask = torch.ones(4, 1, 1, 48, dtype=torch.bool).expand(4, 2, 48, 48)
    measure.measure(comparison(mask), ["reference"])
    first, last = seen[0], seen[-1]
    assert torch.equal(first, usual_mask((4, 1, 1, 48)).expand(4, 2, 48, 48))
    assert bool((last[:, 0, 0].int().diff(dim=-1) > 0).any()) and bool(last[..., 0].all())


def test_the_store_keeps_both_and_ignores_what_earlier_versions_wrote(tmp_path: Path) -> None:
    store = Store(str(tmp_path), machine(torch.device("cpu")))
    key = comparison(torch.ones(4, 1, 1, 48, dtype=torch.bool)).key()
    result = Result(48, 48, 1.0, {"triton": Timing(0.9, 0.9, 0.0, 1.4), "hopper": Timing(0.7, 0.7, 0.0)})
    store.save(key, result)
    assert store.load(key) == [result]
    (file,) = tmp_path.rglob("*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"format": 1}))
    assert store.load(key) == []
    for bad in (-1.0, "nan", "much"):
        damaged = json.loads(json.dumps(data))
        damaged["results"][0]["kernels"]["triton"]["scattered"] = bad
        file.write_text(json.dumps(damaged))
        assert store.load(key) == []
    assert replace(result.kernels["triton"], scattered=None) == Timing(0.9, 0.9, 0.0)
