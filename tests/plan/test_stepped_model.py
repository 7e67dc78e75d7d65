"""`compile_steps`: a module of the model's own class, and runs that begin where they should."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Plan, SteppedModel, backend, calibrate, compile_steps

pytestmark = pytest.mark.usefixtures("inference")
STEPS = ("fast", "balanced", "sdpa")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.config = {"heads": 2}
        self.seen: list[int] = []

    def forward(self, x: Tensor, timestep: Any = None, scale: float = 1.0) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def save_pretrained(self) -> list[str]:
        return list(self.state_dict())


def make_x() -> Tensor:
    return torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Another decision in each of three steps."""
    import dataclasses

    with torch.no_grad():
        made = calibrate(Net(), {step: (make_x(),) for step in range(3)}, effect="none")
    sites = zip(made.sites, STEPS, strict=True)
    return dataclasses.replace(
        made, sites=tuple(dataclasses.replace(site, decision=decision) for site, decision in sites)
    )


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they were rewritten."""
    monkeypatch.setattr(backend, "compile_with_inductor", lambda graph_module, *args: graph_module.forward)


def make(plan: Plan, **options: Any) -> tuple[Net, SteppedModel, dict[str, Tensor]]:
    """A model, its stepped form, and the output of each decision."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Net().eval()
    outputs = {}
    for step, decision in enumerate(STEPS):
        outputs[decision] = compiled_at(model, plan, step)(make_x())
    return model, compile_steps(model, plan, options={"sage.kernel": "reference"}, **options), outputs


def compiled_at(model: nn.Module, plan: Plan, step: int) -> Any:
    options = {"sage.kernel": "reference", "sage.plan": plan.at(step)}
    return torch.compile(model, backend="sage_inductor", options=options)


def used(output: Tensor, outputs: dict[str, Tensor]) -> str:
    (name,) = [name for name, expected in outputs.items() if torch.equal(output, expected)]
    return name


def test_it_is_a_module_of_the_models_class(plan: Plan) -> None:
    model, stepped, _ = make(plan)
    assert isinstance(stepped, nn.Module) and isinstance(stepped, Net) and isinstance(stepped, SteppedModel)
    assert type(stepped).__name__ == "Net" and type(stepped).__module__ == Net.__module__
    assert stepped.state_dict().keys() == model.state_dict().keys()
    assert stepped.save_pretrained() == ["qkv.weight", "qkv.bias"]
    assert stepped.config is model.config and stepped.qkv is model.qkv
    assert [name for name, _ in stepped.named_parameters()] == ["qkv.weight", "qkv.bias"]
    holder = nn.ModuleDict({"transformer": stepped})
    assert list(holder.state_dict()) == ["transformer.qkv.weight", "transformer.qkv.bias"]


def test_it_shares_the_models_state(plan: Plan) -> None:
    model, stepped, _ = make(plan)
    assert stepped.to(torch.float64) is stepped and model.qkv.weight.dtype == torch.float64
    stepped.to(torch.float32)
    stepped.train()
    assert model.training
    stepped.eval()
    stepped.load_state_dict({name: value * 0 for name, value in model.state_dict().items()})
    assert not model.qkv.weight.any()
    stepped.note = "there"
    assert model.note == "there"
    stepped.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_hooks_and_replaced_forward_functions_run(plan: Plan) -> None:
    _, stepped, outputs = make(plan)
    calls = []
    handle = stepped.register_forward_pre_hook(lambda module, args: calls.append("hook"))
    assert used(stepped(make_x()), outputs) == "fast" and calls == ["hook"]
    handle.remove()
    old = stepped.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:  # as accelerate's offloading does
        return old(*args, **kwargs) + 1

    stepped.forward = forward
    assert used(stepped(make_x()) - 1, {name: o + 1 - 1 for name, o in outputs.items()}) == "fast"
    del stepped.forward
    assert used(stepped(make_x()), outputs) == "fast"


def test_diffusers_pipelines_take_it(plan: Plan, tmp_path: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Denoiser(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, timestep: Any) -> Tensor:
            return self.net(x)

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

        def __call__(self, x: Tensor) -> list[int]:
            steps = []
            for timestep in (900, 500, 100):
                for _ in range(2):  # with and without the prompt
                    self.transformer(x, timestep=torch.tensor([timestep, timestep]))
                    steps.append(self.transformer.step)
            return steps

    model = Denoiser()
    stepped = compile_steps(
        model, calibrate(model, {0: (make_x(), 1), 2: (make_x(), 1)}, effect="none"), follow="timestep"
    )
    pipe = Pipeline(stepped)
    assert pipe.components["transformer"] is stepped
    assert pipe(make_x()) == [0, 0, 1, 1, 2, 2]
    assert pipe(make_x()) == [0, 0, 1, 1, 2, 2]
    pipe.to(torch.float64)
    assert model.net.qkv.weight.dtype == torch.float64
    assert stepped.dtype == torch.float64 and stepped.config.width == 64
    stepped.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_a_callback_that_tells_the_next_step_begins_again_with_steps(plan: Plan) -> None:
    _, stepped, outputs = make(plan, steps=3)
    seen = []
    for _ in range(2):
        for step in range(3):
            seen.append(used(stepped(make_x()), outputs))
            stepped.step = step + 1
    assert seen == [*STEPS, *STEPS]


def test_reset_begins_again(plan: Plan) -> None:
    _, stepped, outputs = make(plan)
    stepped.step = 2
    assert used(stepped(make_x()), outputs) == "sdpa"
    stepped.reset()
    assert stepped.step == 0 and used(stepped(make_x()), outputs) == "fast"


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ((900, 500, 100, 900, 500, 100), [0, 1, 2, 0, 1, 2]),
        ((900, 900, 500, 500, 900, 900, 500), [0, 0, 1, 1, 0, 0, 1]),  # guidance in two calls
        ((0.0, 0.5, 1.0, 0.0, 0.5), [0, 1, 2, 0, 1]),  # time that goes up
        ((900, 500, 700, 300), [0, 1, 0, 1]),  # a run that begins later (image to image)
        ((5, 5, 5), [0, 0, 0]),  # of one step
        ((2, 1, 2, 1), [0, 1, 0, 1]),
    ],
)
@pytest.mark.parametrize("form", [float, lambda t: torch.tensor([t, t]), lambda t: torch.tensor(t), "token"])
def test_steps_follow_the_timestep(plan: Plan, timesteps: Any, expected: list[int], form: Any) -> None:
    if form == "token":  # a timestep for each token, 0 for those that are given (an image's)
        form = lambda t: torch.tensor([[0.0, float(t), float(t)]])  # noqa: E731
    stepped = compile_steps(Net(), plan, follow="timestep", options={"sage.kernel": "reference"})
    counted = []
    for index, timestep in enumerate(timesteps):
        given = form(timestep)
        stepped._steps.counter.advance(
            (None, given) if index % 2 else (None,), {} if index % 2 else {"timestep": given}
        )
        counted.append(stepped.step)
    assert counted == expected
    stepped.reset()
    stepped._steps.counter.advance((None, form(1)), {})
    assert stepped.step == 0


def test_what_is_not_valid(plan: Plan) -> None:
    model = Net()
    for steps in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"steps=.* \(valid: an int from 1, None\)"):
            compile_steps(model, plan, steps=steps)
    with pytest.raises(
        ValueError, match=r"follow='t' \(valid: a parameter of the model: x, timestep, scale\)"
    ):
        compile_steps(model, plan, follow="t")
    with pytest.raises(ValueError, match="steps=3 and follow='timestep'"):
        compile_steps(model, plan, steps=3, follow="timestep")
    with pytest.raises(ValueError, match=r"regional=True names no module \(classes that repeat: none\)"):
        compile_steps(model, plan, regional=True)
    stepped = compile_steps(model, plan, follow="timestep")
    with pytest.raises(ValueError, match=r"step=1 \(valid: not to be set"):
        stepped.step = 1
    with pytest.raises(ValueError, match=r"timestep=None \(valid: a number or a tensor"):
        stepped(make_x())
    for step in (-1, True, "1"):
        with pytest.raises(ValueError, match=r"step=.* \(valid: an int from 0\)"):
            compile_steps(model, plan).step = step


def test_copies_and_pickles_are_models_of_their_own(plan: Plan) -> None:
    model, stepped, outputs = make(plan, steps=3)
    stepped.step = 1
    copied = copy.deepcopy(stepped)
    assert copied.step == 0 and copied.qkv is not model.qkv and type(copied).__name__ == "Net"
    assert used(copied(make_x()), outputs) == "fast"
    loaded = pickle.loads(pickle.dumps(stepped))
    assert used(loaded(make_x()), outputs) == "fast"
    buffer = io.BytesIO()
    torch.save(stepped.state_dict(), buffer)
    assert buffer.tell()


def test_the_model_itself_stays_as_it_is(plan: Plan) -> None:
    model, stepped, outputs = make(plan)
    stepped(make_x())
    assert type(model) is Net and "_steps" not in vars(model)
    assert torch.equal(model(make_x()), outputs["sdpa"])
    copy.deepcopy(model), pickle.dumps(model)


def test_blocks_by_themselves(plan: Plan) -> None:
    """`regional=True`: the blocks are compiled, the model around them is not, and what was compiled before stays."""

    class Model(nn.Module):
        _repeated_blocks = ["Net"]

        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.compiling = False

        def forward(self, x: Tensor) -> Tensor:
            self.compiling |= torch.compiler.is_compiling()
            return self.net(x)

    model = Model().eval()
    before = calibrate(model, {step: (make_x(),) for step in range(2)}, effect="none")
    stepped = compile_steps(model, before, regional=True, options={"sage.kernel": "reference"})
    exact, model.compiling = model(make_x()), False
    out = stepped(make_x())
    assert 0 < (out - exact).norm() / exact.norm() < 0.04
    assert not model.compiling and torch.equal(model(make_x()), exact)
    copied = pickle.loads(pickle.dumps(compile_steps(model.net, plan, steps=3)))
    assert copied.uncompiled.qkv.weight.equal(model.net.qkv.weight)
    assert copy.deepcopy(stepped)(make_x()).equal(out)


def test_functions(plan: Plan) -> None:
    def attend(q: Tensor, timestep: float) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    attend.note = "kept"  # type: ignore[attr-defined]
    stepped = compile_steps(attend, plan, follow="timestep", options={"sage.kernel": "reference"})
    assert isinstance(stepped, nn.Module) and stepped.note == "kept"
    stepped(make_x()[None], 2)
    stepped(make_x()[None], timestep=1)
    assert stepped.step == 1
