"""accelerate, transformers' Trainer and Lightning: what works in one line, and what their closed lists refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import NAME, llama
from torch import Tensor

from sage_inductor import Config, SageAttentionPass
from sage_inductor.integrations.transformers import register, unregister
from sage_inductor.testing import RewritingBackend, relative_l2

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

TRAINING = Config(kernel="reference", precision="accurate", training=True)


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


def test_a_model_that_compiles_itself_is_prepared_as_it_is(ids: Tensor) -> None:
    """`model.compile(backend="sage_inductor")`, before `prepare`."""
    backend = RewritingBackend(TRAINING)
    model = llama()
    model.compile(backend=backend)
    prepared = accelerate.Accelerator(cpu=True).prepare(model)
    accelerate.Accelerator(cpu=True).backward(prepared(input_ids=ids, labels=ids).loss)
    assert [site.rewritten for site in backend.sites] == [True, True]
    assert all(parameter.grad is not None for parameter in model.parameters())


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


def test_trainer_with_our_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        torch.manual_seed(1)
        ours = trained(llama(NAME), tmp_path).training_loss
    finally:
        unregister()
    torch.manual_seed(1)
    plain = trained(llama(), tmp_path).training_loss
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
