"""`sage_inductor.integrations.transformers`: registering, `generate`, what stays exact, what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sage_inductor
from sage_inductor import Config, NotEligibleError
from sage_inductor.integrations import versions
from sage_inductor.integrations.transformers import attention, register, unregister
from sage_inductor.testing import relative_l2

transformers = pytest.importorskip("transformers")

REFERENCE = Config(kernel="reference", precision="accurate")
NAME = "sage_inductor"


@pytest.fixture
def registered() -> Iterator[None]:
    register(REFERENCE)
    yield
    unregister()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Each call's way, and the call."""
    taken: list[tuple[str, Any]] = []
    for name in ("quantised", "by_hand", "by_library"):
        way = getattr(attention, f"_{name}")

        def recording(call: Any, *rest: Any, name: str = name, way: Any = way) -> Any:
            taken.append((name, call))
            return way(call, *rest)

        monkeypatch.setattr(attention, f"_{name}", recording)
    return taken


def counted(ways: list[tuple[str, Any]]) -> Counter[str]:
    return Counter(name for name, _ in ways)


def clear(model: nn.Module) -> Any:
    """Weights far from the default 0.02, so that the greedy choice is no tie."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def llama(implementation: str = "sdpa", **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 24, "max_position_embeddings": 256,
    }  # fmt: skip
    config = transformers.LlamaConfig(**sizes | options)
    config._attn_implementation = implementation
    return clear(transformers.LlamaForCausalLM(config))


def mistral() -> Any:
    config = transformers.MistralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=24, max_position_embeddings=256, sliding_window=12,
    )  # fmt: skip
    return clear(transformers.MistralForCausalLM(config))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return clear(transformers.T5ForConditionalGeneration(config))


PROMPT = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 8},
}


def prompt(padded: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 24, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0  # generation pads on the left
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [0, 7])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("make", [llama, mistral])
def test_generate(make: Any, cache: str, padded: int, registered: None, ways: list[tuple[str, Any]]) -> None:
    """The tokens are those of SDPA, and so sure that quantising could not change them by chance."""
    torch.manual_seed(50)  # the first whose smallest margin is .08 or more, in all four cases
    model, inputs = make(), prompt(padded)
    options = {**inputs, **PROMPT, **CACHES[cache]}
    expected = model.generate(**options, return_dict_in_generate=True, output_scores=True)
    best = torch.stack(expected.scores).topk(2).values
    assert (
        best[..., 0] - best[..., 1]
    ).min() > 0.08  # logits have a standard deviation of 1, and errors of .005
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(**options), expected.sequences)
    prefill = [name for name, call in ways if call.query.shape[2] > 1]
    assert set(prefill) == {"quantised"} and len(prefill) == (8 if cache == "chunks" else 2)
    assert {name for name, call in ways if call.query.shape[2] == 1} == {"by_library"}
    if make is llama and not padded and cache != "static":
        # Causality that ends at the last key needs no mask, whatever came before.
        assert all(call.mask is None for _, call in ways)


def test_generate_with_cross_attention(registered: None, ways: list[tuple[str, Any]]) -> None:
    model, inputs = t5(), prompt(7)
    expected = model.generate(**inputs, **PROMPT)
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(**inputs, **PROMPT), expected)
    assert [name for name, call in ways if call.query.shape[2] > 1] == ["quantised"]


def test_generate_compiled(registered: None) -> None:
    """One graph for a prefill of any length, and one for all steps, as with plain attention; causality is no mask in it."""
    model = llama(NAME)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for length in (20, 33):
            ids = torch.randint(3, 24, (2, length))
            got = compiled(ids, use_cache=True).logits
            assert relative_l2(got, model(ids, use_cache=True).logits) < 1e-5
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "sage_inductor.attention" in str(node.target)]
    assert len(nodes) == 2 and all(node.args[3] is None and node.args[4] is True for node in nodes)


def test_continuous_batching_is_refused_but_for_the_name_of_sdpa(ways: list[tuple[str, Any]]) -> None:
    model, inputs = llama(), prompt(0)
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    expected = model.generate(**inputs, generation_config=config)[:, 30:]
    requests = inputs["input_ids"].tolist()
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    register(REFERENCE)
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="sage_inductor is not supported for continuous batching"):
        model.generate_batch(requests, generation_config=config, continuous_batching_config=small)
    unregister()
    model.set_attn_implementation("sdpa")
    register(REFERENCE, name="sdpa")
    try:
        outputs = model.generate_batch(requests, generation_config=config, continuous_batching_config=small)
    finally:
        unregister("sdpa")
    got = [outputs[request].generated_tokens for request in sorted(outputs)]
    assert got == expected.tolist()
    # Both requests are packed into one sequence, and tell each other apart by the mask.
    assert any(name == "quantised" and tuple(call.query.shape[:3]) == (1, 4, 60) for name, call in ways)


# ----------------------------------------------------------------------------------------------------- what stays exact


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 24, (2, 24))


def test_auto_is_exact_on_a_cpu(ids: Tensor) -> None:
    register()
    model = llama()
    expected = model(ids).logits
    model.set_attn_implementation(NAME)
    assert torch.equal(model(ids).logits, expected)
    unregister()


def gradients(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [
        loss.detach(),
        *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
    ]


def test_training_is_exact_unless_asked_for(ids: Tensor) -> None:
    model = llama()
    expected = gradients(model, ids)
    register(REFERENCE)
    model.set_attn_implementation(NAME)
    assert all(map(torch.equal, gradients(model, ids), expected))
    register(Config(kernel="reference", precision="accurate", training=True))
    got = gradients(model, ids)
    unregister()
    assert len(got) == len(expected)
    # The gradient is exact at the same inputs; those of the second layer come from the quantised first.
    errors = [relative_l2(one, other) for one, other in zip(got, expected, strict=True)]
    assert 1e-6 < max(errors) < 0.05


def test_a_learned_bias_gets_its_gradient(ids: Tensor) -> None:
    """T5's bias is a mask that wants a gradient, which the quantised operator has none for: exact, whatever is asked for."""
    model = t5()
    expected = gradients(model, ids)
    register(Config(kernel="reference", training=True))
    model.set_attn_implementation(NAME)
    got = gradients(model, ids)
    unregister()
    # Attention across has no bias that is learned.
    errors = [relative_l2(one, other) for one, other in zip(got, expected, strict=True)]
    assert len(got) == len(expected) and max(errors) < 0.15  # without its gradient: 1


def test_dropout_stays(ids: Tensor, registered: None, ways: list[tuple[str, Any]]) -> None:
    model = llama(NAME, attention_dropout=0.5).train()
    with torch.no_grad():
        model(ids)
        model.eval()(ids)
    assert [name for name, _ in ways] == ["by_library"] * 2 + ["quantised"] * 2


def test_weights_that_are_asked_for_are_given(registered: None, ids: Tensor) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = clear(transformers.BertModel(config))
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True)
    model.set_attn_implementation(NAME)
    got = model(ids, output_attentions=True)
    assert all(map(torch.equal, got.attentions, expected.attentions))
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def inputs(q_len: int, kv_len: int, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, q_len, 16),
        torch.randn(2, kv_heads, kv_len, 16),
        torch.randn(2, kv_heads, kv_len, 16),
    )


@pytest.fixture
def layer() -> Any:
    return llama().model.layers[0].self_attn


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 9), (5, 20), (1, 20)])
def test_causality_without_a_mask_ends_at_the_last_key(
    q_len: int, kv_len: int, exact: bool, layer: Any
) -> None:
    """Queries that a model dropped before (Gemma 4) are the last ones."""
    q, k, v = inputs(q_len, kv_len)
    forward = attention.make_forward(Config() if exact else REFERENCE)
    with torch.no_grad():
        got, weights = forward(layer, q, k, v, None, scaling=0.25)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)
    assert weights is None and got.shape == (2, q_len, 4, 16) and got.is_contiguous()
    assert relative_l2(got, expected.transpose(1, 2)) < (1e-6 if exact or q_len == 1 else 0.03)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_a_position_bias_is_added(mask: str | None, layer: Any) -> None:
    q, k, v = inputs(9, 9)
    bias = 2 * torch.randn(1, 4, 9, 9)
    allowed = torch.rand(2, 1, 9, 9) > 0.3
    allowed[..., 0] = True
    given = {
        None: None,
        "bool": allowed,
        "additive": torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
    }[mask]
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if mask is None else allowed
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, torch.where(seen, bias, -torch.inf), scale=0.25, enable_gqa=True
    )
    for config, bound in ((REFERENCE, 0.03), (Config(), 1e-6)):
        with torch.no_grad():
            got, _ = attention.make_forward(config)(layer, q, k, v, given, scaling=0.25, position_bias=bias)
        assert relative_l2(got, expected.transpose(1, 2)) < bound


@pytest.mark.parametrize("per_query", [False, True])
def test_sinks(per_query: bool, layer: Any) -> None:
    """gpt-oss has a logit a head, `s_aux`; Inkling one a query, `sinks`."""
    q, k, v = inputs(9, 9)
    sink = torch.randn(2, 4, 9, 1) if per_query else torch.randn(4)
    options = {"sinks": sink} if per_query else {"s_aux": sink}
    with torch.no_grad():
        got, _ = attention.make_forward(REFERENCE)(layer, q, k, v, None, scaling=0.25, **options)
    scores = 0.25 * q @ k.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    columns = sink if per_query else sink.view(1, 4, 1, 1).expand(2, 4, 9, 1)
    weights = torch.cat([scores, columns], -1).softmax(-1)[..., :-1]
    assert relative_l2(got, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)) < 0.03


@pytest.mark.parametrize(("can_do_without", "rows"), [(True, 1), (False, 24)])
def test_padding_is_a_row_unless_the_model_wants_a_mask(
    can_do_without: bool, rows: int, registered: None, ids: Tensor
) -> None:
    """T5 Gemma 2 puts that mask beside the causal one of its own keys."""
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    made = transformers.masking_utils.create_bidirectional_mask(
        config=llama(NAME).config,
        inputs_embeds=torch.zeros(*ids.shape, 8),
        attention_mask=padding,
        allow_is_bidirectional_skip=can_do_without,
    )
    assert torch.equal(made, padding[:, None, None].bool().expand(2, 1, rows, 24))


SPARSE: dict[str, dict[str, Any]] = {
    "deepseek_v32": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "index_topk": 5, "n_group": 1, "topk_group": 1,
    },
    "minimax_m3_vl_text": {
        "num_key_value_heads": 2, "head_dim": 16, "index_topk_blocks": 2, "index_block_size": 4,
        "layer_types": ["minimax_m3_sparse"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SPARSE)
def test_keys_that_the_model_chooses(kind: str, ids: Tensor) -> None:
    """Only "eager" and "sdpa" get them in the mask; others are told their indices."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    sizes = {
        "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "moe_intermediate_size": 32, "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 16,
        "mlp_layer_types": ["dense"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    made = transformers.AutoConfig.for_model(kind, **sizes, **SPARSE[kind])
    model = clear(transformers.AutoModel.from_config(made, attn_implementation="eager"))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outputs = []
    for implementation, config in (("eager", None), (NAME, REFERENCE), (NAME, Config())):
        if config is not None:
            register(config)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(input_ids=ids, attention_mask=mask)[0][mask.bool()])
    unregister()
    expected, quantised, exact = outputs
    assert relative_l2(quantised, expected) < 0.03 and relative_l2(exact, expected) < 1e-5


def test_an_argument_of_one_model_is_left_to_its_own_attention(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(9, 9)
    seen: list[Any] = []

    def eager_attention_forward(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: Any,
        temperature: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        seen.append((temperature, attention_mask))
        return query.transpose(1, 2), None

    monkeypatch.setattr(
        sys.modules[type(layer).__module__], "eager_attention_forward", eager_attention_forward
    )
    forward = attention.make_forward(REFERENCE)
    with torch.no_grad():
        forward(layer, q, k, v, None, scaling=0.25)
        assert seen == []
        forward(layer, q, k, v, None, scaling=0.25, temperature=2.0)
    ((temperature, mask),) = seen
    lowest = torch.finfo(torch.float32).min
    assert temperature == 2.0 and torch.equal(mask[0, 0], torch.full((9, 9), lowest).triu(1))


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_model_with_attention_of_its_own_says_so(registered: None, ids: Tensor) -> None:
    """MPNet adds its mask to its scores: with a bool mask it was wrong by .07, silently."""
    config = transformers.MPNetConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    outputs = []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        model = clear(transformers.AutoModel.from_config(config, attn_implementation=implementation))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs.append(model(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(*outputs)
    assert "MPNetSelfAttention computes attention by itself" in str(caught[0].message)


def test_a_call_that_stays_exact_raises_where_that_is_asked_for(ids: Tensor) -> None:
    register(Config(kernel="reference", fallback="error"))
    model = llama(NAME)
    try:
        with pytest.raises(
            NotEligibleError, match=r"LlamaAttention: requires_grad=output \(supported: none; torch.no_grad"
        ):
            model(ids)
        with torch.no_grad():
            model.generate(ids, **PROMPT)  # one-query steps are exact by design
    finally:
        unregister()


def test_a_kernel_that_cannot_run_here_raises(ids: Tensor) -> None:
    register(Config(kernel="hopper"))
    model = llama(NAME)
    try:
        with torch.no_grad(), pytest.raises(NotEligibleError, match="kernel=hopper"):
            model(ids)
    finally:
        unregister()


def test_two_names_have_configs_of_their_own(ids: Tensor, ways: list[tuple[str, Any]]) -> None:
    register(REFERENCE)
    register(name="exactly")
    model = llama(NAME)
    with torch.no_grad():
        model(ids)
        model.set_attn_implementation("exactly")
        model(ids)
    unregister()
    unregister("exactly")
    assert [name for name, _ in ways] == ["quantised"] * 2 + ["by_library"] * 2


def test_unregister_forgets_the_name_or_gives_it_back() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    for name in (NAME, "sdpa"):
        register(name=name)
        register(REFERENCE, name=name)
        assert dict(ALL_ATTENTION_FUNCTIONS) != before[0]
        unregister(name)
        assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)) == before
    with pytest.raises(ValueError, match=r"name='sdpa' \(registered: none\)"):
        unregister("sdpa")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(exclude=("*",)), r"exclude=\('\*',\) \(valid here: \(\);"),
        (Config(include=("*.0.*",)), "include="),
        (Config(fallback="warn"), r"fallback='warn' \(valid here: sdpa, error\)"),
        (Config(fallback="error"), "fallback='error' with kernel='auto'"),
    ],
)
def test_options_that_hold_only_while_compiling(config: Config, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        register(config)


@pytest.mark.parametrize(
    "name", ["", "eager", "sage_flash", "a/b", "paged|sage", "my_sdpa", "flex_attention"]
)
def test_names_that_mean_something_to_transformers(name: str) -> None:
    with pytest.raises(ValueError, match=r"valid: 'sdpa', or a name that contains none of 'eager'"):
        register(name=name)


def test_a_config_of_another_kind() -> None:
    wrong: Any = {"kernel": "reference"}
    with pytest.raises(TypeError, match=r"valid: a sage_inductor.Config, None"):
        register(wrong)
    wrong = 3
    with pytest.raises(TypeError, match=r"name=3 \(valid: a string\)"):
        register(name=wrong)


@pytest.mark.parametrize("installed", ["4.57.6", "5.3.0", "6.0.0", "5.3.9.dev0"])
def test_other_versions_are_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: installed)
    with pytest.raises(ImportError, match=rf"transformers {installed} is not supported \(supported: transformers 5.4 and newer, below 6\)"):  # fmt: skip
        register()


@pytest.mark.parametrize("installed", ["5.4.0", "5.4", "5.10.2", "5.24.0.dev0", "5.99"])
def test_versions_that_are_taken(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: installed)
    versions.require("transformers", "5.4", "6")


def test_a_library_that_is_missing() -> None:
    with pytest.raises(
        ImportError,
        match=r"no-such-library is not installed \(supported: no-such-library 1 and newer, below 2\)",
    ):
        versions.require("no-such-library", "1", "2")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys, sage_inductor
heavy = ("transformers", "diffusers", "accelerate")
assert not [name for name in heavy if name in sys.modules]
assert "transformers" in dir(sage_inductor.integrations)
sage_inductor.integrations.transformers.unregister
assert not [name for name in (*heavy, "torch._dynamo") if name in sys.modules]
sage_inductor.integrations.transformers.register()
assert "transformers" in sys.modules
try:
    sage_inductor.integrations.gradio
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'gradio' (valid: " in done.stdout, done.stderr
    assert sage_inductor.integrations.transformers.register is register
