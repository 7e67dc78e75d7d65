"""`integrations.diffusers.compile` and `calibrate_pipeline` on whole pipelines."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

import flash_operators  # noqa: E402
import pipelines  # noqa: E402

from sage_inductor import Config, Plan, SteppedModel, backend  # noqa: E402
from sage_inductor.integrations import diffusers as sage  # noqa: E402
from sage_inductor.integrations.diffusers.quality import output_loss, pictures  # noqa: E402
from sage_inductor.testing import relative_l2  # noqa: E402

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled; they run as they were rewritten, without Inductor."""
    found: list[torch.fx.GraphModule] = []

    def run(graph_module: torch.fx.GraphModule, *args: Any) -> Callable[..., Any]:
        found.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(backend, "compile_with_inductor", run)
    return found


def precisions(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """The precision of each attention in 8 bits in graphs."""
    return [
        node.kwargs["precision"]
        for graph in graphs
        for node in graph.graph.nodes
        if str(node.target) == "sage_inductor.attention.default"
    ]


def run(pipeline: Any, arguments: dict[str, Any], steps: int = 4) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pictures(pipeline(num_inference_steps=steps, generator=generator, **arguments))[0]


# How many attentions the graphs of each hold; blocks that are compiled one by one share a graph.
COMPILED = {
    "flux": 2, "wan": 2, "stable_diffusion": 2, "stable_diffusion_3": 3, "chroma": 2, "ltx": 2, "hunyuan_video": 3,
    "qwen_image": 1, "pixart_sigma": 4, "cogvideox": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "regional"), [*((name, True) for name in COMPILED), ("flux", False), ("hunyuan_video", False)]
)
def test_compile(
    name: str, regional: bool, graphs: list[torch.fx.GraphModule], new_process: Callable[[], None]
) -> None:
    """Against the pipeline as it is, and in as many graphs as with plain torch.compile."""
    pipeline, arguments = getattr(pipelines, name)()
    arguments["output_type"] = "latent"
    exact = run(pipeline, arguments, steps=2)
    plain: list[torch.fx.GraphModule] = []

    def keep(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        plain.append(graph_module)
        return graph_module.forward

    other, _ = getattr(pipelines, name)()
    model: Any = getattr(other, "transformer", None) or other.unet
    in_blocks = regional and getattr(model, "_repeated_blocks", None)
    (model.compile_repeated_blocks if in_blocks else model.compile)(backend=keep)
    run(other, arguments, steps=2)
    new_process()

    before = dict(pipeline.components)
    assert sage.compile(pipeline, regional=regional, kernel="reference", fullgraph=True) is pipeline
    assert pipeline.components == before
    out = run(pipeline, arguments, steps=2)
    assert 0 < relative_l2(out, exact) < 0.02
    assert len(graphs) == len(plain) and len(precisions(graphs)) == COMPILED[name]
    assert set(precisions(graphs)) == {"fast"}


def test_a_pipeline_whose_model_was_compiled(graphs: list[torch.fx.GraphModule]) -> None:
    """`pipeline.transformer = torch.compile(pipeline.transformer)`, as diffusers' docs have it, and blocks compiled before."""
    pipeline, arguments = pipelines.flux()
    exact, model = run(pipeline, arguments, steps=2), pipeline.transformer
    model.compile_repeated_blocks(backend="eager")
    pipeline.transformer = compiled = torch.compile(model, backend="eager")
    assert relative_l2(run(pipeline, arguments, steps=2), exact) < 1e-5
    found = sage.calibrate_pipeline(pipeline, ranges=1, num_inference_steps=2, **arguments)
    assert pipeline.transformer is compiled and found.steps == {"transformer": 2}
    sage.compile(pipeline, kernel="reference")
    assert pipeline.transformer is model
    assert 0 < relative_l2(run(pipeline, arguments, steps=2), exact) < 0.02 and len(precisions(graphs)) == 2


def test_a_pipeline_with_flash_attention_3(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' backend "_flash_3" holds an operator of its own where SDPA would stand."""
    from diffusers.models import attention_dispatch

    flash_operators.give_diffusers_a_kernel()
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    pipeline, arguments = pipelines.flux()
    exact = run(pipeline, arguments, steps=2)
    pipeline.transformer.set_attention_backend("_flash_3")
    try:
        assert relative_l2(run(pipeline, arguments, steps=2), exact) < 1e-5
        sage.compile(pipeline, kernel="reference", fullgraph=True)
        assert 0 < relative_l2(run(pipeline, arguments, steps=2), exact) < 0.02
    finally:
        pipeline.transformer.reset_attention_backend()
        native = attention_dispatch.AttentionBackendName.NATIVE
        attention_dispatch._AttentionBackendRegistry.set_active_backend(native)
    assert len(graphs) == len(precisions(graphs)) == 2
    assert not any("flash" in str(node.target) for graph in graphs for node in graph.graph.nodes)


Found = tuple[Any, dict[str, Any], torch.Tensor, sage.PipelineCalibration]


@pytest.fixture(scope="module")
def calibrated() -> Found:
    """Flux, its arguments, what it makes in two steps, and its calibration."""
    with torch.no_grad():
        pipeline, arguments = pipelines.flux()
        model, exact = pipeline.transformer, run(pipeline, arguments, steps=2)
        generator = torch.Generator().manual_seed(1)
        found = sage.calibrate_pipeline(
            pipeline, ranges=2, tolerance=0.05, num_inference_steps=2, generator=generator, **arguments
        )
        assert pipeline.transformer is model and not model._forward_pre_hooks
        assert torch.equal(run(pipeline, arguments, steps=2), exact)
    return pipeline, arguments, exact, found


def test_what_a_calibration_shows(calibrated: Found) -> None:
    _, _, _, found = calibrated
    assert found.plan.ranges() == ((0, 0), (1, None)) and found.steps == {"transformer": 2}
    assert {site.decision for site in found.plan.sites} == {"fast"}
    assert 20 < found.loss.psnr_db < 100 and 0 < found.loss.rel_l2 < 0.05
    text = str(found)
    assert "transformer, 2 steps" in text and "PSNR" in text and "the package lpips is not" in text


def decided(plan: Plan, decision: str, steps: tuple[int, int | None]) -> Plan:
    """The plan with another decision in the range `steps`."""
    import dataclasses

    sites = (dataclasses.replace(s, decision=decision) if s.steps == steps else s for s in plan.sites)
    return dataclasses.replace(plan, sites=tuple(sites))


def test_a_calibrated_pipeline_follows_its_steps(
    calibrated: Found, graphs: list[torch.fx.GraphModule], tmp_path: Path
) -> None:
    pipeline, arguments, exact, found = calibrated
    model = pipeline.transformer
    plan = decided(found.plan, "sdpa", (0, 0))
    plan.save(tmp_path / "plan.json")
    sage.compile(pipeline, plan=tmp_path / "plan.json", kernel="reference")
    stepped = pipeline.transformer
    assert isinstance(stepped, SteppedModel) and isinstance(stepped, nn.Module)
    assert (
        type(stepped).__name__ == "FluxTransformer2DModel" and pipeline.components["transformer"] is stepped
    )
    seen = []

    def note(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        seen.append((stepped.step, len(precisions(graphs))))
        return {}

    for _ in range(2):  # the second run begins at step 0 by itself
        out = run(pipeline, {**arguments, "callback_on_step_end": note}, steps=2)
    assert seen == [(0, 0), (1, 2), (0, 2), (1, 2)] and 0 < relative_l2(out, exact) < 0.05
    assert len(graphs) == 4  # two kinds of blocks, two sets of decisions

    pipeline.enable_model_cpu_offload(device="cpu")  # accelerate's hooks, which replace `forward`
    assert hasattr(model, "_hf_hook") and relative_l2(run(pipeline, arguments, steps=2), out) < 1e-5
    pipeline.remove_all_hooks()
    pipeline.to(torch.float64)
    assert model.dtype == torch.float64 and stepped.dtype == torch.float64
    pipeline.to(torch.float32)
    stepped.save_pretrained(tmp_path / "model")
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    assert loaded.config.joint_attention_dim == 32 and loaded.state_dict().keys() == model.state_dict().keys()
    other = diffusers.FluxPipeline.from_pipe(pipeline, transformer=stepped)
    assert other.transformer is stepped
    sage.compile(pipeline, kernel="reference")  # anew, without a plan: from the model itself
    assert pipeline.transformer is model


def test_two_models_have_a_plan_each(graphs: list[torch.fx.GraphModule]) -> None:
    pipeline, arguments = pipelines.wan()
    sage.compile(pipeline, kernel="reference")  # calibrated as if it were not
    found = sage.calibrate_pipeline(pipeline, ranges=2, num_inference_steps=4, **arguments)
    assert not graphs
    assert list(found.plans) == ["transformer", "transformer_2"] and sum(found.steps.values()) == 4
    assert all(one.ranges() for one in found.plans.values())
    assert all(one.measured[0].samples == 2 for one in found.plans["transformer"].sites)  # with guidance
    with pytest.raises(
        ValueError, match=r"plan of 2 models \(valid: plans\[...\]: transformer, transformer_2"
    ):
        _ = found.plan
    with pytest.raises(ValueError, match="one plan for 2 models"):
        sage.compile(pipeline, plan=found.plans["transformer"])
    last = found.plans["transformer_2"].ranges()[-1]
    plans = {**found.plans, "transformer_2": decided(found.plans["transformer_2"], "accurate", last)}
    sage.compile(pipeline, plan=plans, kernel="reference")
    run(pipeline, arguments)
    assert {"fast", "accurate"} == set(precisions(graphs))
    assert pipeline.transformer_2.step == found.steps["transformer_2"] - 1


def test_what_is_not_valid() -> None:
    pipeline, arguments = pipelines.flux()
    with pytest.raises(TypeError, match=r"precison \(valid: kernel, precision.*fullgraph"):
        sage.compile(pipeline, precison="fast")
    with pytest.raises(ValueError, match="precision='rough'"):
        sage.compile(pipeline, precision="rough")
    with pytest.raises(ValueError, match=r"plan for unet \(valid: transformer\)"):
        sage.compile(pipeline, plan={"unet": "plan.json"})
    with pytest.raises(ValueError, match="options\\['sage.plan'\\]"):
        sage.compile(pipeline, options={"sage.plan": "plan.json"})
    with pytest.raises(TypeError, match="pipeline is a Linear"):
        sage.compile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Vae has no model that takes a timestep .* the models: vae"):
        sage.compile(type("Vae", (), {"components": {"vae": pipeline.vae}})())
    with pytest.raises(ValueError, match=r"ranges=0 \(valid: an int from 1\)"):
        sage.calibrate_pipeline(pipeline, ranges=0, **arguments)
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(
        ValueError, match=r"transformer has a cache of blocks enabled .*transformer.disable_cache"
    ):
        sage.calibrate_pipeline(pipeline, **arguments)
    pipeline.transformer.disable_cache()
    sage.register(Config(kernel="reference"))
    try:
        pipeline.transformer.set_attention_backend("sage_inductor")
        with pytest.raises(ValueError, match="transformer has the attention backend sage_inductor"):
            sage.calibrate_pipeline(pipeline, **arguments)
    finally:
        sage.unregister()
    pipeline.transformer.reset_attention_backend()


def test_the_loss_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    exact = torch.rand(2, 3, 16, 16)
    worse = exact.clone()
    worse[1] = (worse[1] + 0.1).clamp(max=1)
    loss = output_loss((worse,), (exact,))
    error = (worse[1] - exact[1]).double().square().mean()
    assert math.isclose(loss.psnr_db, -10 * math.log10(error), rel_tol=1e-6) and loss.lpips is None
    assert math.isclose(loss.rel_l2, float((worse[1] - exact[1]).norm() / exact[1].norm()), rel_tol=1e-5)
    assert output_loss(exact, exact).psnr_db == math.inf
    latents = 20 * (exact - 0.5)
    assert math.isclose(
        output_loss(20 * (worse - 0.5), latents).psnr_db,
        10 * math.log10(float(latents[1].max() - latents[1].min()) ** 2 / float(400 * error)),
        rel_tol=1e-4,
    )
    image = Image.fromarray((exact[0].movedim(0, -1).numpy() * 255).astype("uint8"))
    (picture,) = pictures(types.SimpleNamespace() if False else {"images": [image]})
    assert picture.shape == (16, 16, 3) and (picture - exact[0].movedim(0, -1)).abs().max() < 1 / 255
    with pytest.raises(ValueError, match="holds no images"):
        output_loss({"text": "none"}, {"text": "none"})

    seen = []

    class LPIPS(nn.Module):
        """A stand-in for the package lpips, whose weights are downloaded."""

        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            seen.append((one.shape, float(one.min()), float(one.max())))
            return (one - other).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    video = exact.movedim(1, -1)[None].expand(1, 2, 16, 16, 3).numpy()
    loss = output_loss({"frames": video * 0.5}, {"frames": video})
    assert seen[0][0] == (2, 3, 16, 16) and -1 <= seen[0][1] < seen[0][2] <= 1
    assert loss.lpips is not None and loss.lpips > 0 and "LPIPS 0." in str(loss)
