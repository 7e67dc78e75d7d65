"""accelerate, transformers' Trainer and Lightning: what works in one line, and what their closed lists refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import NAME, clear, llama
from torch import Tensor

from sage_inductor import Config, SageAttentionPass
from sage_inductor.integrations.transformers import register, unregister
from sage_inductor.testing import RewritingBackend, relative_l2

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TRAINING = Config(kernel="reference", precision="accurate", training=True)


# Grouped heads, norms of Q and K, windows, one product for Q, K and V, learned positions.
MODELS = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt")


def causal_lm(name: str) -> Any:
    """A model of two layers, the same at each call."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "attn_pdrop": 0.0,  # the last is GPT-2's: with dropout its attention would stay exact
    }  # fmt: skip
    torch.manual_seed(0)
    return clear(
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes))
    )


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An Accelerator keeps its settings for the process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 24, (2, 24))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_compiles_itself_is_prepared_as_it_is(
    name: str, ids: Tensor, new_process: Callable[[], None]
) -> None:
    """`model.compile(backend="sage_inductor")`, before `prepare`: a step of training against the model as it is."""
    accelerator = accelerate.Accelerator(cpu=True)

    def step(backend: Any) -> Any:
        model = causal_lm(name)
        if backend is not None:
            model.compile(backend=backend)
        accelerator.backward(accelerator.prepare(model)(input_ids=ids, labels=ids).loss)
        return model

    exact = step(None)
    plain: list[torch.fx.GraphModule] = []

    def keep(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        plain.append(graph_module)
        return graph_module.forward

    step(keep)
    new_process()
    backend = RewritingBackend(TRAINING)
    model = step(backend)
    assert [site.rewritten for site in backend.sites] == [True, True] and len(backend.graphs) == len(plain)
    errors = [
        relative_l2(ours.grad, theirs.grad)
        for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True)
        if theirs.grad is not None
        and theirs.grad.norm() > 1e-6  # that of a bias of K is nothing but roundings
    ]
    # The gradient is exact at the same inputs; those of the second layer come from the quantised first. A wrong one is off by 1.
    assert len(errors) > 10 and 1e-4 < max(errors) < 0.1


def test_the_list_of_backends_is_closed() -> None:
    with pytest.raises(ValueError, match="'SAGE_INDUCTOR' is not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="sage_inductor")


def test_inductor_with_our_pass_is_on_the_list(ids: Tensor, fresh_compile: None) -> None:
    """The way around where accelerate is to compile: its plugin hands options on to Inductor."""
    options = {"pre_grad_custom_pass": SageAttentionPass(Config(kernel="reference", precision="accurate"))}
    plugin = accelerate.utils.TorchDynamoPlugin(backend="inductor", options=options)
    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        expected = model(ids).logits
        got = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model)(ids).logits
    assert 1e-4 < relative_l2(got, expected) < 0.02  # quantised, and right


def trained(model: Any, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 24, (2, 24))]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    return trainer.train()


@pytest.mark.parametrize("name", MODELS)
def test_trainer_with_our_attention(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`register(Config(training=True))` and `attn_implementation`: nothing else changes."""
    from sage_inductor.integrations.transformers import attention

    calls: list[bool] = []
    operator = attention.training.attention_training
    monkeypatch.setattr(
        attention.training,
        "attention_training",
        lambda *args, **kwargs: calls.append(True) or operator(*args, **kwargs),
    )
    register(TRAINING)
    try:
        model = causal_lm(name)
        model.set_attn_implementation(NAME)
        torch.manual_seed(1)
        ours = trained(model, tmp_path).training_loss
    finally:
        unregister()
    model = causal_lm(name)
    torch.manual_seed(1)
    plain = trained(model, tmp_path).training_loss
    assert len(calls) == 2 and ours == pytest.approx(plain, rel=0.01)


def test_trainer_takes_a_model_that_compiles_itself(tmp_path: Path) -> None:
    backend = RewritingBackend(TRAINING)
    model = llama()
    model.compile(backend=backend)
    trained(model, tmp_path)
    assert backend.sites and all(site.rewritten for site in backend.sites)


def test_trainers_own_compiling_has_the_closed_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'SAGE_INDUCTOR' is not a valid DynamoBackend"):
        trained(llama(), tmp_path, torch_compile_backend="sage_inductor")


def test_lightning_takes_a_model_that_compiles_itself(ids: Tensor) -> None:
    lightning = pytest.importorskip("lightning")
    backend = RewritingBackend(TRAINING)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()
            self.model.compile(backend=backend)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(ids, batch_size=2))
    assert [site.rewritten for site in backend.sites] == [True, True]
