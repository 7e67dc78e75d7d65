"""Masks by spelling and by length: what each is understood as, its values, and the number of graphs.

The spellings are those of transformers, diffusers, timm, torchtune, x-transformers and others, written anew. A small length
stands for 512; at 32,768 a mask is classified on fake tensors and nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_inductor import Config
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
LENGTH, LONG = 24, 32_768
PAST, NEW = 40, 12  # a cache, and queries behind it
pytestmark = pytest.mark.usefixtures("inference")


@dataclass(frozen=True)
class Lengths:
    """Of the queries, of the keys, and how many keys lie before the first query."""

    q: Any
    k: Any
    past: Any

    def rows(self, **options: Any) -> Tensor:
        return torch.arange(self.q, **options)[:, None] + self.past

    def columns(self, **options: Any) -> Tensor:
        return torch.arange(self.k, **options)


Spelling = Callable[[Lengths, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Spelling, str]] = {}


def spelling(expected: str) -> Callable[[Spelling], Spelling]:
    def keep(function: Spelling) -> Spelling:
        SPELLINGS[function.__name__] = function, expected
        return function

    return keep


# Causal


@spelling("causal")
def columns_up_to_rows(n: Lengths, pad: Tensor) -> Tensor:
    return n.columns() <= n.rows()


@spelling("causal")
def rows_from_columns(n: Lengths, pad: Tensor) -> Tensor:
    return n.rows().ge(n.columns()[None])


@spelling("causal")
def not_later(n: Lengths, pad: Tensor) -> Tensor:
    return ~(n.columns().view(1, -1) > n.rows())


@spelling("causal")
def less_than_one_more(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 4.30's `_make_causal_mask`, in place."""
    mask = torch.full((n.q, n.q), torch.finfo(torch.float32).min)
    at = torch.arange(n.q)
    mask.masked_fill_(at < (at + 1).view(n.q, 1), 0)
    return torch.cat([torch.zeros(n.q, n.past), mask], dim=-1)[None, None].expand(2, 1, n.q, n.k)


@spelling("causal")
def distance(n: Lengths, pad: Tensor) -> Tensor:
    return (n.rows() - n.columns()) >= 0


@spelling("causal")
def distance_logical_not(n: Lengths, pad: Tensor) -> Tensor:
    return torch.logical_not((n.columns() - n.rows()).gt(0))


@spelling("causal")
def lower_triangle(n: Lengths, pad: Tensor) -> Tensor:
    return torch.ones(n.q, n.k, dtype=torch.bool).tril(n.past)


@spelling("causal")
def lower_triangle_of_floats(n: Lengths, pad: Tensor) -> Tensor:
    return torch.tril(torch.ones((n.q, n.k)), diagonal=n.past).to(torch.bool)[None, None]


@spelling("causal")
def no_upper_triangle(n: Lengths, pad: Tensor) -> Tensor:
    return torch.ones(n.q, n.k).triu(n.past + 1) == 0


@spelling("causal")
def upper_triangle_of_infinities(n: Lengths, pad: Tensor) -> Tensor:
    """`nn.Transformer.generate_square_subsequent_mask`."""
    return torch.triu(torch.full((n.q, n.k), -math.inf), diagonal=n.past + 1)


@spelling("causal")
def stacked_beside_zeros(n: Lengths, pad: Tensor) -> Tensor:
    """Llama's own code."""
    mask = torch.full((n.q, n.q), float("-inf"))
    mask = torch.triu(mask, diagonal=1)
    return torch.hstack([torch.zeros((n.q, n.past)), mask]) if n.past != 0 else mask


@spelling("causal")
def where_lowest(n: Lengths, pad: Tensor) -> Tensor:
    return torch.where(n.rows() >= n.columns(), 0.0, torch.finfo(torch.float32).min)[None, None]


@spelling("causal")
def filled_zeros(n: Lengths, pad: Tensor) -> Tensor:
    return torch.zeros(n.q, n.k).masked_fill(n.columns() > n.rows(), -math.inf)


@spelling("causal")
def one_minus_times_lowest(n: Lengths, pad: Tensor) -> Tensor:
    """transformers' `invert_attention_mask`."""
    return (1.0 - (n.columns() <= n.rows()).float()) * torch.finfo(torch.float32).min


@spelling("causal")
def counted_positions(n: Lengths, pad: Tensor) -> Tensor:
    """x-transformers: positions by `cumsum`."""
    positions = torch.ones(n.k, dtype=torch.int64).cumsum(-1) - 1
    return positions[None, :] <= n.rows()


@spelling("causal")
def packed_but_for_positions_of_one_document(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 5 looks for documents in the positions, also where it counted them itself."""
    positions = torch.arange(n.k)[None]
    ids = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, q, k = (
        torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        n.rows()[None, None],
        n.columns()[None, None, None],
    )
    return (k <= q) & (ids[batch, q] == ids[batch, k])


@spelling("causal")
def repeated_positions(n: Lengths, pad: Tensor) -> Tensor:
    """Whisper's decoder: positions of its own for each sequence, which are the same."""
    positions = torch.arange(n.k)[None].repeat(2, 1)
    ids = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, q, k = torch.arange(2)[:, None, None, None], n.rows()[None, None], n.columns()[None, None, None]
    return (k <= q) & (ids[batch, q] == ids[batch, k])


@spelling("causal")
def of_int32(n: Lengths, pad: Tensor) -> Tensor:
    return n.rows(dtype=torch.int32) >= n.columns(dtype=torch.int32)


@spelling("causal")
def cache_position(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 4.48's `_prepare_4d_causal_attention_mask_with_cache_position`, without padding."""
    position = torch.arange(n.past, n.past + n.q)
    mask = torch.full((n.q, n.k), fill_value=torch.finfo(torch.float32).min)
    mask = torch.triu(mask, diagonal=1)
    mask *= torch.arange(n.k) > position.reshape(-1, 1)
    return mask[None, None, :, :].expand(2, 1, -1, -1)


@spelling("causal")
def sliced_from_a_square(n: Lengths, pad: Tensor) -> Tensor:
    """GPT-2's and GPT-NeoX's buffer, made in the graph."""
    square = torch.ones((n.k, n.k), dtype=torch.bool).tril().view(1, 1, n.k, n.k)
    return square[:, :, n.k - n.q : n.k, : n.k]


@spelling("causal")
def by_index_functions(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 5's functions of indices, broadcast."""
    q, k = n.rows()[None, None], n.columns()[None, None, None, :]
    result = q.new_ones((), dtype=torch.bool)
    result = result & (k <= q).to(result.device)
    return result.expand(2, -1, n.q, n.k)


@spelling("causal")
def by_vmap(n: Lengths, pad: Tensor) -> Tensor:
    """The same by vmap."""
    function = lambda q, k: k <= q  # noqa: E731
    over_keys = torch.vmap(function, in_dims=(None, 0))
    return torch.vmap(over_keys, in_dims=(0, None))(n.rows()[:, 0], n.columns())


# Windows


@spelling("sliding_window left=4 right=0")
def window_of_two_comparisons(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) & (n.columns() > n.rows() - 5)


@spelling("sliding_window left=4 right=0")
def window_of_triangles(n: Lengths, pad: Tensor) -> Tensor:
    """Mistral's own code."""
    ones = torch.ones(n.q, n.k)
    return torch.tril(ones, diagonal=n.past).bool() & torch.triu(ones, diagonal=n.past - 4).bool()


@spelling("sliding_window left=4 right=0")
def window_taken_from_causality(n: Lengths, pad: Tensor) -> Tensor:
    causal = torch.ones(n.q, n.k, dtype=torch.bool).tril(n.past)
    return causal ^ torch.ones(n.q, n.k, dtype=torch.bool).tril(n.past - 5)


@spelling("band left=3 right=3")
def window_both_ways(n: Lengths, pad: Tensor) -> Tensor:
    """ModernBERT's local layers."""
    return torch.abs(n.rows() - n.columns()) <= 3


@spelling("band left=3 right=3")
def window_both_ways_additive(n: Lengths, pad: Tensor) -> Tensor:
    outside = (n.rows() - n.columns()).abs() > 3
    return torch.zeros(n.q, n.k).masked_fill_(outside, -math.inf)


# Joined with padding


@spelling("causal + key_padding")
def causal_and_padding(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) & pad[:, None, None, :]


@spelling("causal + key_padding")
def causal_and_padding_of_integers(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows())[None, None] & (pad.long()[:, None, None, :] == 1)


@spelling("causal + key_padding")
def causal_and_padding_multiplied(n: Lengths, pad: Tensor) -> Tensor:
    """BERT as a decoder."""
    causal = (n.columns() <= n.rows()).long()
    return (causal[None, None] * pad.long()[:, None, None, :]).bool()


@spelling("causal + key_padding")
def causal_and_padding_of_floats(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) & pad.float().bool()[:, None, None]


@spelling("causal + key_padding")
def causal_and_padding_looked_up(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 5: the padding is indexed by batch and key."""
    batch, k = torch.arange(2)[:, None, None, None], n.columns()[None, None, None]
    return ((k <= n.rows()[None, None]) & pad[batch, k]).expand(2, -1, n.q, n.k)


@spelling("causal + key_padding")
def causal_and_padding_by_vmap(n: Lengths, pad: Tensor) -> Tensor:
    function = lambda b, q, k: (k <= q) & torch.ops.aten.index(pad, [b, k])  # noqa: E731
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        function = torch.vmap(function, in_dims=dims)
    return function(torch.arange(2), n.rows()[:, 0], n.columns())[:, None]


@spelling("causal + key_padding")
def causal_and_padding_where_lowest(n: Lengths, pad: Tensor) -> Tensor:
    allowed = (n.columns() <= n.rows()) & pad[:, None, None, :]
    return torch.where(allowed, torch.tensor(0.0), torch.finfo(torch.float32).min)


@spelling("causal + key_padding")
def hidden_by_either(n: Lengths, pad: Tensor) -> Tensor:
    """torchtune and fairseq: what is True is hidden."""
    hidden = torch.ones(n.q, n.k, dtype=torch.bool).triu(n.past + 1)
    return ~(hidden[None, None] | ~pad[:, None, None, :])


@spelling("causal + key_padding")
def written_where_padded(n: Lengths, pad: Tensor) -> Tensor:
    """transformers 4.48, with padding: a copy that a part of is overwritten."""
    mask = torch.triu(torch.full((n.q, n.k), fill_value=torch.finfo(torch.float32).min), diagonal=n.past + 1)
    mask = mask[None, None, :, :].expand(2, 1, -1, -1).clone()
    length = pad.shape[-1]
    hidden = (mask[:, :, :, :length] + pad.long()[:, None, None, :]) == 0
    mask[:, :, :, :length] = mask[:, :, :, :length].masked_fill(hidden, torch.finfo(torch.float32).min)
    return mask


@spelling("sliding_window left=4 right=0 + key_padding")
def window_and_padding(n: Lengths, pad: Tensor) -> Tensor:
    window = (n.columns() <= n.rows()) & (n.columns() > n.rows() - 5)
    return torch.where(window & pad[:, None, None, :], 0.0, -math.inf)


@spelling("key_padding")
def padding_alone(n: Lengths, pad: Tensor) -> Tensor:
    """diffusers and timm: padding in both directions is padding of the keys, where the queries' rows are not looked at."""
    return (torch.ones(n.q, 1, dtype=torch.bool) & pad[:, None, None, :]).expand(2, 1, n.q, n.k)


@spelling("key_padding")
def lengths_of_sequences(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() < pad.sum(-1)[:, None])[:, None, None, :].expand(-1, -1, n.q, -1)


# What no kernel takes but as data; it has a name


@spelling("chunked_causal size=8")
def chunks(n: Lengths, pad: Tensor) -> Tensor:
    """Llama 4's local layers."""
    return (n.rows() // 8 == n.columns() // 8) & (n.columns() <= n.rows())


@spelling("prefix")
def prefix(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) | (n.columns() < 7)


@spelling("prefix")
def prefix_of_each_batch(n: Lengths, pad: Tensor) -> Tensor:
    lengths = pad.sum(-1)[:, None, None, None]
    return (n.columns() <= n.rows()) | (n.columns() < lengths)


@spelling("causal + segments")
def documents(n: Lengths, pad: Tensor) -> Tensor:
    ids = pad.long().cumsum(-1) // 5
    return (ids[:, None, -n.q :, None] == ids[:, None, None, :]) & (n.columns() <= n.rows())


# Near misses


@spelling("band left=all right=1")
def one_key_too_far(n: Lengths, pad: Tensor) -> Tensor:
    return n.columns() <= n.rows() + 1


@spelling("bool")
def strictly_before(n: Lengths, pad: Tensor) -> Tensor:
    return n.columns() < n.rows()


@spelling("bool")
def causal_and_one_more_key(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) | (n.columns() == 20)


@spelling("bool")
def causal_but_one_row(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) | (n.rows() == 3 + n.past)


@spelling("bool")
def causal_every_other(n: Lengths, pad: Tensor) -> Tensor:
    return (n.columns() <= n.rows()) & ((n.rows() - n.columns()) % 2 == 0)


@spelling("additive")
def a_small_penalty(n: Lengths, pad: Tensor) -> Tensor:
    return torch.where(n.columns() <= n.rows(), 0.0, -5.0)


@spelling("additive")
def two_numbers(n: Lengths, pad: Tensor) -> Tensor:
    """Both masks added: what both hide is -inf, and a query that sees nothing attends to what one of them hides."""
    causal = torch.where(n.columns() <= n.rows(), 0.0, torch.finfo(torch.float32).min)
    return causal + torch.where(pad[:, None, None], 0.0, torch.finfo(torch.float32).min)


# Behind a cache of 40 keys, what the first 7 keys, or the 20th, have beside causality they have by it; and the corner is
# another.
IN_CACHE = {
    "prefix": "causal",
    "causal_and_one_more_key": "causal",
    "one_key_too_far": f"band left=all right={PAST + 1}",
    "strictly_before": f"band left=all right={PAST - 1}",
}


def expected_of(name: str, column: str) -> str:
    """What a spelling is understood as where the lengths are those of `column`."""
    kind = SPELLINGS[name][1]
    if column == "cache" and name in IN_CACHE:
        kind = IN_CACHE[name]
        if kind != "causal":
            return kind
    if column == "dynamic cache" and name == "strictly_before":
        return "band left=all right=computed (symbolic)"  # as many as there are in the cache, less one
    if kind.startswith(("causal", "sliding_window", "band")):
        first, plus, rest = kind.partition(" + ")
        first += " bottom-right" if "cache" in column else ""
        first += " (symbolic)" if column in ("dynamic", "unbacked", "dynamic cache") else ""
        return first + plus + rest
    return kind


def model(
    names: Sequence[str], q: Tensor, k: Tensor, v: Tensor, pad: Tensor, past: Tensor | None
) -> list[Tensor]:
    """Attention behind a cache, `past`, whose keys and values are alike."""
    length = 0 if past is None else past.shape[2]
    if past is not None:
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
    n = Lengths(q.shape[2], k.shape[2], length)
    masks = [SPELLINGS[name][0](n, pad) for name in names]
    return [
        F.scaled_dot_product_attention(q, k, v, mask if mask.dtype == torch.bool else mask.to(q.dtype))
        for mask in masks
    ]


def inputs(q_len: int, past: int) -> list[Tensor | None]:
    pad = torch.rand(2, q_len + past) > 0.3
    pad[:, 0] = True
    q, k, v = (torch.randn(2, 2, q_len, 16) for _ in range(3))
    return [q, k, v, pad, torch.randn(2, 2, past, 16) if past else None]


def check(outputs: Sequence[Tensor], given: Sequence[Any]) -> None:
    """Against eager attention in float64. INT8 scores give .009 at these sizes, one key too many or too few more than .1."""
    in_double = [item.double() if item is not None and item.is_floating_point() else item for item in given]
    exact, eager = model(list(SPELLINGS), *in_double), model(list(SPELLINGS), *given)
    for name, out, expected, like in zip(SPELLINGS, outputs, exact, eager, strict=True):
        assert relative_l2(out, expected) < 0.02 and max_error(out, expected) < 0.06, name
        assert out.stride() == like.stride() and out.dtype == like.dtype, name


def understood(sites: Sequence[Site]) -> dict[str, str]:
    return {name: site.mask for name, site in zip(SPELLINGS, sites, strict=True)}


def expected(column: str) -> dict[str, str]:
    return {name: expected_of(name, column) for name in SPELLINGS}


@pytest.mark.parametrize(("column", "q_len", "past"), [("static", LENGTH, 0), ("cache", NEW, PAST)])
def test_known_lengths(column: str, q_len: int, past: int) -> None:
    torch.compiler.reset()
    backend, given = RewritingBackend(CONFIG), inputs(q_len, past)
    out = torch.compile(partial(model, list(SPELLINGS)), backend=backend, dynamic=False)(*given)
    assert understood(backend.sites) == expected(column)
    check(out, given)


@pytest.mark.parametrize("column", ["dynamic", "dynamic cache"])
def test_symbolic_lengths(column: str) -> None:
    """Compiled once, for all lengths, to one graph, the fewest there can be; and the values are right at each."""
    past = 0 if column == "dynamic" else PAST
    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(partial(model, list(SPELLINGS)), backend=backend, dynamic=True)
    for length, before in ((LENGTH, past), (9, past and past + 3)):
        given = inputs(length, before)
        check(compiled(*given), given)
    assert len(backend.graphs) == 1
    assert understood(backend.sites) == expected(column)


def of_kept_tokens(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, keep: Tensor) -> list[Tensor]:
    at = keep.nonzero().squeeze(1)
    torch._check(at.shape[0] > 1)  # torch's own SDPA asks
    q, k, v = (item.index_select(2, at) for item in (q, k, v))
    return model(list(SPELLINGS), q, k, v, pad.index_select(1, at), None)


def test_lengths_that_only_the_data_tell() -> None:
    backend = RewritingBackend(CONFIG)
    given = [*inputs(LENGTH, 0)[:4], torch.arange(LENGTH) % 4 != 1]
    out = torch.compile(of_kept_tokens, backend=backend, dynamic=True)(*given)
    assert len(backend.graphs) == 1
    assert understood(backend.sites) == expected("unbacked")
    kept = [item.index_select(2, given[4].nonzero().squeeze(1)) for item in given[:3]]
    check(out, [*kept, given[3][:, given[4]], None])


def test_lengths_that_no_mask_fits_into_memory_for() -> None:
    """Traced with tensors that have no memory, and not run: a bool mask is 1 GiB here."""
    sites: list[Site] = []

    def rewrite(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        sites.extend(rewrite_graph(graph_module.graph, CONFIG))
        return lambda *args: example_outputs(graph_module)

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(2, 2, LONG, 16) for _ in range(3)] + [
            torch.empty(2, LONG, dtype=torch.bool),
            None,
        ]
        torch.compile(partial(model, list(SPELLINGS)), backend=rewrite, dynamic=False)(*given)
    assert understood(sites) == expected("static")


def example_outputs(graph_module: fx.GraphModule) -> list[Tensor]:
    (output,) = graph_module.graph.find_nodes(op="output")
    return [node.meta["example_value"] for node in output.args[0]]
