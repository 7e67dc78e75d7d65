"""calibrate and Plan: what is measured, what is decided, and that a decision reaches its own site and no other."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor
from sage_inductor import Config, NotEligibleError, Plan, calibrate, compile_steps, explain, rewrite_exported
from sage_inductor.kernels.reference.kernel import ReferenceKernel
from sage_inductor.measurement.metrics import METRICS, compare, relative_l2
from sage_inductor.plan.sites import Figure, Fingerprint
from sage_inductor.testing import RewritingBackend

BAD = 2  # the layer that 8 bits do not hold
SHARP = 30  # errors of .118 to .138 over three draws of inputs, at a tolerance of .05


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q(x), self.k(x), self.v(x))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 4, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.layer_norm(x + block(x), x.shape[-1:])
        return x


def make(bad: int | None = BAD, **sizes: int) -> Model:
    """Layers alike, but for the layer `bad`: Q and K are SHARP times as large there. Its scores lie so far apart that what rounding
    takes from them decides which key draws the weight."""
    torch.manual_seed(0)
    model = Model(**sizes).eval()
    if bad is not None:
        with torch.no_grad():
            layer: Any = model.blocks[bad]
            for parameter in (*layer.k.parameters(), *layer.q.parameters()):
                parameter *= SHARP
    return model


def make_x(batch: int = 2, tokens: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed))


pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.no_grad():
        return calibrate(make(), (make_x(),), effect="all")


def run(model: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Tensor, RewritingBackend]:
    torch.compiler.reset()
    backend = RewritingBackend(Config(kernel="reference", **options))
    return torch.compile(model, backend=backend)(*inputs), backend


# What is measured and decided


def test_planted_bad_layer_is_found_and_only_it_leaves_fast(plan: Plan) -> None:
    assert {name: decision for name, decision in plan.decisions().items() if decision != "fast"} == {
        f"blocks.{BAD}": plan.decisions()[f"blocks.{BAD}"]
    }
    fast = {site.name: site.measured[0].rel_l2.worst for site in plan.sites}
    bad = fast.pop(f"blocks.{BAD}")
    # Well apart, on both sides of the tolerance: the decision is no accident.
    assert bad is not None and bad > 2 * plan.tolerance
    assert all(error is not None and error < 0.8 * plan.tolerance for error in fast.values())


def test_figures_are_those_of_the_kernel_on_exact_inputs(plan: Plan) -> None:
    """Worked out by hand for the last layer, behind the bad one: its errors do not reach further layers."""
    model, x = make(), make_x()
    for block in list(model.blocks)[:-1]:
        x = F.layer_norm(x + block(x), x.shape[-1:])
    last: Any = model.blocks[-1]
    q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (last.q, last.k, last.v))
    exact = F.scaled_dot_product_attention(q, k, v)
    (site,) = (site for site in plan.sites if site.name == "blocks.3")
    assert [measured.precision for measured in site.measured] == ["fast", "balanced", "accurate"]
    for measured in site.measured:
        out = sage_inductor.sage_attention(q, k, v, kernel="reference", precision=measured.precision)
        assert isinstance(out, Tensor) and (measured.kernel, measured.samples) == ("reference", 1)
        errors = compare(out, exact)
        for name in ("rel_l2", "max_error", "cosine", "sqnr_db"):
            figure = getattr(measured, name)
            # Equal but for the float32 rounding of the layers before.
            assert figure.worst == figure.mean == pytest.approx(getattr(errors, name), rel=1e-2)


def test_effect_on_the_output_is_that_of_one_site_alone(plan: Plan) -> None:
    model, x = make(), make_x()
    exact = model(x)
    for site in plan.sites:
        out, _ = run(model, x, include=(site.name,))
        fast = site.measured[0].output_rel_l2
        assert fast is not None and fast.worst == pytest.approx(relative_l2(out, exact), rel=1e-2)
    ((steps, together),) = plan.output_rel_l2
    out, _ = run(model, x, plan=plan)
    assert steps is None and together.worst == pytest.approx(relative_l2(out, exact), rel=1e-2)


def test_errors_by_hand() -> None:
    errors = compare(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert (errors.rel_l2, errors.max_error) == (0.2, 0.25)
    assert errors.cosine == pytest.approx((9 + 20) / (34**0.5 * 5))
    assert errors.sqnr_db == pytest.approx(20 * math.log10(5))
    x = torch.randn(2, 3, 5, 4).transpose(1, 2)
    assert compare(x, x).sqnr_db == 300 and compare(x, x).cosine == pytest.approx(1)
    assert compare(torch.zeros(3), torch.zeros(3)) == compare(torch.zeros(0), torch.zeros(0))
    assert math.isnan(compare(x * math.nan, x).rel_l2) and math.isnan(compare(x / 0, x / 0).cosine)
    with pytest.raises(ValueError, match="actual is .2,., expected .3,."):
        compare(torch.zeros(2), torch.zeros(3))


def test_errors_are_the_same_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_inductor.measurement import metrics

    a, e = torch.randn(2, 3, 50, 4).transpose(1, 2), torch.randn(2, 50, 3, 4)
    whole = compare(a, e)
    monkeypatch.setattr(metrics, "VALUES_AT_ONCE", 7 * 2 * 3 * 4)
    sliced = compare(a, e)
    for name in ("rel_l2", "max_error", "cosine", "sqnr_db"):
        assert getattr(sliced, name) == pytest.approx(getattr(whole, name), rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "tolerance", "decision"),
    [
        ("rel_l2", None, "fast"),
        ("rel_l2", 0.012, "balanced"),
        ("rel_l2", 0.005, "accurate"),
        ("rel_l2", 1e-5, "sdpa"),
        ("sqnr_db", None, "fast"),
        ("sqnr_db", 38.0, "balanced"),
        ("cosine", None, "fast"),
        ("cosine", 0.99999999, "sdpa"),
        ("max_error", 1e-5, "sdpa"),
        ("output_rel_l2", 0.02, "fast"),
        ("output_rel_l2", 1e-6, "sdpa"),
    ],
)
def test_the_fastest_that_holds_is_taken(metric: str, tolerance: float | None, decision: str) -> None:
    plan = calibrate(make(None, layers=1), (make_x(),), metric=metric, tolerance=tolerance)
    (site,) = plan.sites
    assert (plan.metric, site.decision) == (metric, decision)
    assert plan.tolerance == (METRICS[metric].default if tolerance is None else tolerance)
    criterion = METRICS[metric]
    for measured in site.measured:
        figure = getattr(measured, metric)
        if measured.precision == decision:
            assert criterion.holds(figure.worst, plan.tolerance)
            break
        assert not criterion.holds(figure.worst, plan.tolerance), "a faster one holds as well"


def test_what_is_not_finite_holds_no_tolerance() -> None:
    model = make(None, layers=2)
    model.blocks[1].v.bias.data[:] = math.inf  # type: ignore[union-attr]
    plan = calibrate(model, (make_x(),), effect="none")
    first, second = plan.sites
    assert (first.decision, second.decision) == ("fast", "sdpa")
    assert second.measured[0].rel_l2 == Figure(None, None)
    assert Plan.from_json(plan.to_json()) == plan


def test_worst_sample_decides() -> None:
    model = make(None, layers=1)
    quiet, loud = make_x(), make_x(tokens=200, seed=2)
    loud[..., 5] *= 300  # nearly one-hot attention: a small change of the scores moves it
    alone = [calibrate(model, (x,), effect="none").sites[0].measured[0].rel_l2.worst for x in (quiet, loud)]
    both = calibrate(model, [(quiet,), {"x": loud}], effect="none").sites[0].measured[0]
    assert alone[0] != alone[1]
    assert (both.samples, both.rel_l2.worst) == (2, max(alone))  # type: ignore[type-var]
    assert both.rel_l2.mean == pytest.approx(sum(alone) / 2)  # type: ignore[arg-type]


def test_many_lengths_are_all_measured_and_leave_dynamo_as_it_was() -> None:
    """More than Dynamo compiles of one model, beyond which it would run it unmeasured."""
    model = make(None, layers=1)
    samples = [(make_x(tokens=tokens),) for tokens in range(20, 32)]
    (site,) = calibrate(model, samples, effect="none").sites
    assert site.measured[0].samples == len(samples)
    report = explain(model, make_x(tokens=64), config=Config(kernel="reference"))
    assert report.sites[0].query and report.sites[0].query.shape == (2, 2, 64, 32)  # not dynamic


def test_inputs_that_the_model_writes_to_are_given_back() -> None:
    def model(x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(x, x, x)
        x.mul_(10)
        return out

    x = torch.randn(1, 2, 32, 32)
    before = x.clone()
    (site,) = calibrate(model, (x,), effect="all").sites
    assert torch.equal(x, before)
    for measured in site.measured:  # the model's output is the site's: as wrong as it, from the same input
        assert measured.output_rel_l2 == measured.rel_l2


def test_output_picks_what_counts() -> None:
    def model(x: Tensor) -> dict[str, Any]:
        return {
            "exact": 2 * x,
            "attention": F.scaled_dot_product_attention(x, x, x),
            "count": torch.tensor(3),
        }

    x = torch.randn(1, 2, 32, 32)
    (whole,) = calibrate(model, (x,)).sites
    (part,) = calibrate(model, (x,), output=lambda out: out["exact"]).sites
    assert whole.measured[0].output_rel_l2 == whole.measured[0].rel_l2  # the worst tensor's
    assert part.measured[0].output_rel_l2 == Figure(0.0, 0.0)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        calibrate(model, (x,), output=lambda out: out["count"])


def test_autocast_and_subgraphs_are_measured() -> None:
    from torch.utils.checkpoint import checkpoint

    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = F.scaled_dot_product_attention(x, x, x)
            return checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y), x, use_reentrant=False)

    plan = calibrate(model, (torch.randn(1, 2, 32, 32),))
    assert list(plan.decisions().values()) == ["fast", "fast"]
    assert all(site.measured[0].samples == 1 for site in plan.sites)


def test_sites_that_cannot_be_quantised_are_in_the_plan_with_the_reason() -> None:
    model = make(None, layers=2)
    plan = calibrate(model, (make_x(tokens=1),), config=Config(exclude=("blocks.1",)))
    assert plan.decisions() == {"blocks.0": "sdpa", "blocks.1": "sdpa"}
    assert plan.sites[0].reasons[0].startswith("q_len=1")
    assert plan.sites[1].reasons[0] == "site=blocks.1 (exclude: blocks.1)"
    assert not plan.sites[0].measured


def test_one_query_says_nothing_of_many() -> None:
    """As when a language model decodes: the step of one query stays SDPA for itself, not for the prefill."""
    model, x = make(None, layers=1), make_x()
    plan = calibrate(model, [(x,), (x[:, :1],)], effect="none")
    _, backend = run(model, x, plan=plan)
    assert [site.precision for site in backend.sites if site.rewritten] == ["fast"]


def test_model_without_attention(caplog: pytest.LogCaptureFixture) -> None:
    plan = calibrate(lambda x: x + 1, (torch.ones(3),))
    assert plan.sites == () and "no attention found" in caplog.text


def test_progress_and_log(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO, logger="sage_inductor"):
        calibrate(
            make(layers=3), [(make_x(),), (make_x(),)], progress=lambda *progress: seen.append(progress)
        )
    assert [done for done, _, _ in seen] == list(range(1, 10))  # 3 sites x (2 samples + the effect)
    assert {total for _, total, _ in seen} == {9}
    assert seen[0][2] == "blocks.0" and seen[-1][2].startswith("blocks.2: ")
    assert "blocks.0, steps all: fast" in caplog.text


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "psnr"}, ValueError, "(valid: rel_l2, max_error, cosine, sqnr_db, output_rel_l2)"),
        ({"effect": "some"}, ValueError, "(valid: decided, all, none)"),
        ({"effect": "none", "metric": "output_rel_l2"}, ValueError, "effect='none' with metric="),
        ({"tolerance": 0.0}, ValueError, "tolerance=0.0 of rel_l2 (valid: between 0 and inf)"),
        ({"tolerance": math.nan}, ValueError, "tolerance=nan"),
        ({"tolerance": 1.5, "metric": "cosine"}, ValueError, "(valid: between -1 and 1)"),
        ({"tolerance": "0.1"}, TypeError, "(valid: a number)"),
        ({"tolerance": True}, TypeError, "(valid: a number)"),
        ({"metric": ["cosine"]}, ValueError, "metric=['cosine'] (valid: rel_l2"),
        ({"progress": 3}, TypeError, "progress=3 (valid: a function, None)"),
        ({"keep": 3}, TypeError, "path=3 (valid: a str, an os.PathLike)"),
        ({"inputs": []}, ValueError, "inputs has no samples"),
        ({"inputs": torch.ones(3)}, TypeError, "inputs is a Tensor (valid: a tuple of arguments"),
        ({"inputs": [torch.ones(3)]}, TypeError, "inputs[0] is a Tensor"),
        ({"inputs": 3}, TypeError, "inputs is a int"),
        ({"inputs": {"a": (1,), 3: (1,)}}, TypeError, "step 'a' (valid: an int, or (first, last)"),
        ({"inputs": {-1: (1,)}}, ValueError, "step -1 (valid: from 0"),
        ({"inputs": {(0, 5): (1,), 5: (1,)}}, ValueError, "step (0, 5) reaches into that of 5"),
        ({"inputs": {(0, None): (1,), 5: (1,)}}, ValueError, "reaches into"),
        ({"inputs": {(4, 2): (1,)}}, ValueError, "step (4, 2)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = arguments.pop("inputs", (make_x(),))
    try:
        with pytest.raises(error) as raised:
            calibrate(make(layers=1, bad=None), inputs, **arguments)
        assert message in str(raised.value)
    finally:
        arguments["inputs"] = inputs


def test_a_kernel_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot serve stays SDPA with its reasons; where it cannot run at all, that is an error."""
    kernel = sage_inductor.kernels.get("sageattention")
    reasons: list[str] = []
    monkeypatch.setattr(type(kernel), "unavailable_reasons", lambda self, device=None: reasons)
    model, inputs, config = make(None, layers=1), (make_x(),), Config(kernel="sageattention")
    (site,) = calibrate(model, inputs, config=config).sites
    assert site.decision == "sdpa" and not site.measured
    assert "head_dim=32 (supported: 64, 96, 128)" in site.reasons
    reasons.append("no moon")
    with pytest.raises(NotEligibleError, match="kernel=sageattention: no moon"):
        calibrate(model, inputs, config=config)


class Worse(ReferenceKernel):
    """Another kernel that "auto" may take: its "fast" is far off, its "accurate" is missing."""

    name = "worse"
    precisions = ("fast", "balanced")

    def run(self, *args: Any) -> None:
        super().run(*args)
        params, out = args[4], args[5]
        out.mul_(1.2 if params.precision == "fast" else 1.0)


@pytest.mark.parametrize("order", [("reference", "worse"), ("worse", "reference")])
def test_under_auto_the_figures_hold_for_every_kernel_that_may_run(
    order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = sage_inductor.kernels
    by_name: dict[str, Any] = {"worse": Worse(), "reference": kernels.get("reference")}
    monkeypatch.setattr(kernels, "get", by_name.__getitem__)
    monkeypatch.setattr(kernels, "AUTO_ORDER", order)
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu",))
    (site,) = calibrate(make(None, layers=1), (make_x(),), effect="all").sites
    fast, balanced, accurate = site.measured
    assert fast.kernel == balanced.kernel == ", ".join(order) and accurate.kernel == "reference"
    assert fast.samples == 1 and fast.rel_l2.worst is not None and 0.15 < fast.rel_l2.worst < 0.25
    assert fast.output_rel_l2 is not None and balanced.output_rel_l2 is not None
    assert (fast.output_rel_l2.worst or 0.0) > 3 * (balanced.output_rel_l2.worst or 0.0) > 0.0
    assert site.decision == "balanced"


def test_a_precision_that_the_kernel_lacks_is_not_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As "fast" on a GPU without FP8."""
    monkeypatch.setattr(type(sage_inductor.kernels.get("reference")), "precisions", ("balanced", "accurate"))
    (site,) = calibrate(make(None, layers=1), (make_x(),), config=Config(kernel="reference")).sites
    assert [measured.precision for measured in site.measured] == ["balanced", "accurate"]
    assert site.decision == "balanced"


def test_a_plan_is_not_calibrated_under_another(plan: Plan) -> None:
    with pytest.raises(ValueError, match="config.plan"):
        calibrate(make(), (make_x(),), config=Config(plan=plan))


# How a plan is applied


def test_every_way_in_applies_the_plan(
    plan: Plan, tmp_path: Path, fresh_compile: None, new_process: Callable[[], None]
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    model, x = make(), make_x()
    expected, backend = run(model, x, plan=plan)
    decided = {site.name: site.precision if site.rewritten else "sdpa" for site in backend.sites}
    assert decided == plan.decisions() and len(set(decided.values())) == 2
    # The ways differ by the float32 rounding of Inductor's matmuls; fast everywhere is another result.
    limit = relative_l2(run(model, x)[0], expected) / 50
    assert limit > 1e-4
    options = {"sage.kernel": "reference", "sage.plan": str(path)}
    new_process()
    assert relative_l2(torch.compile(model, backend="sage_inductor", options=options)(x), expected) < limit
    new_process()
    with sage_inductor.enabled(Config(kernel="reference", plan=plan)):
        assert relative_l2(torch.compile(model)(x), expected) < limit
    program = rewrite_exported(torch.export.export(model, (x,)), Config(kernel="reference", plan=plan))
    assert relative_l2(program.module()(x), expected) < limit


def test_the_report_shows_decisions_and_errors(plan: Plan) -> None:
    report = explain(make(), make_x(), config=Config(kernel="reference", plan=plan))
    fast, bad = report.sites[0], report.sites[BAD]
    assert fast.rel_l2 == plan.sites[0].measured[0].rel_l2.worst
    if bad.rewritten:
        assert bad.precision == plan.decisions()[bad.name]
    else:
        assert bad.reasons[0].startswith("plan=sdpa (rel_l2: fast 0.")
    assert report.missing == () and "plan has sites" not in str(report)
    assert "blocks.0" in str(plan) and "3 fast" in str(plan) and "tolerance 0.05" in str(plan)


def test_the_plan_overrules_precision(plan: Plan) -> None:
    _, backend = run(make(), make_x(), plan=plan, precision="accurate")
    assert [site.precision for site in backend.sites][:2] == ["fast", "fast"]


def test_batch_and_length_may_differ_dynamic_shapes_too(plan: Plan) -> None:
    model = make()
    backend = RewritingBackend(Config(kernel="reference", plan=plan))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, tokens in ((2, 33), (3, 70)):
        compiled(make_x(batch, tokens))
    assert sum(site.rewritten and site.precision == "fast" for site in backend.sites) == 3


def test_uuid_and_repr_know_the_content(plan: Plan) -> None:
    other = replace(plan, sites=(replace(plan.sites[0], decision="accurate"), *plan.sites[1:]))
    uuids = [
        str(sage_inductor.SageAttentionPass(Config(plan=p)).uuid())
        for p in (plan, other, Plan.from_json(plan.to_json()))
    ]
    assert uuids[0] == uuids[2] != uuids[1] and hash(Config(plan=plan)) is not None
    assert len(repr(plan)) < 120


APPLY = """
import hashlib, sys, torch
sys.path.insert(0, {tests!r})
from test_plan import make, make_x
from sage_inductor import Config, Plan, calibrate
from sage_inductor.testing import RewritingBackend
path, *ways = sys.argv[1:]
for way in ways:
    torch.compiler.reset()
    with torch.no_grad():
        model, x = make(), make_x()
        if way == "make":
            plan = calibrate(model, (x,), effect="none")
            plan.save(path)
            torch.compiler.reset()
        else:
            plan = path
        backend = RewritingBackend(Config(kernel="reference", plan=plan))
        out = torch.compile(model, backend=backend)(x)
    print([(site.name, site.rewritten and site.precision, site.rel_l2) for site in backend.sites], end=" ")
    print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_saved_in_one_process_applied_bit_identically_in_another(tmp_path: Path) -> None:
    script, path = APPLY.format(tests=str(Path(__file__).parent)), str(tmp_path / "plan.json")

    def process(*ways: str) -> list[str]:
        command = [sys.executable, "-c", script, path, *ways]
        # What matters is the plan: matrix products on a CPU may differ in their last bits with the number of threads
        # that are free and with where memory lies, unless they are told not to.
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "random",
            "OMP_NUM_THREADS": "1",
            "MKL_CBWR": "COMPATIBLE",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (made,) = process("make")
    kept = Path(path).read_bytes()
    first, again = process("apply", "make")
    assert made == first == again and "('blocks.0', 'fast'" in made and f"('blocks.{BAD}', 'fast'" not in made
    assert Path(path).read_bytes() == kept  # calibrating again gives the same file, byte for byte


# Plans that do not fit


class Wide(Model):
    """The same names, and twice the heads."""

    def __init__(self) -> None:
        super().__init__(heads=4)


def test_new_and_missing_sites_are_named(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    more, fewer = make(None, layers=5), make(None, layers=3)
    _, backend = run(more, make_x(), plan=plan)
    *known, new = backend.sites
    assert all(site.rewritten or site.name == f"blocks.{BAD}" for site in known) and not new.rewritten
    assert new.reasons == ("plan has no site 'blocks.4' (its sites: blocks.0, blocks.1, blocks.2, blocks.3)",)
    assert "plan has no site 'blocks.4'" in caplog.text and "lacks" not in caplog.text
    caplog.clear()
    run(fewer, make_x(), plan=plan)
    assert "plan has sites that this graph lacks: blocks.3" in caplog.text
    report = explain(fewer, make_x(), config=Config(kernel="reference", plan=plan))
    assert report.missing == ("blocks.3",) and "the model lacks: blocks.3" in str(report)
    assert json.loads(report.to_json())["missing"] == ["blocks.3"]
    with pytest.raises(NotEligibleError, match="plan has no site 'blocks.4'"):
        explain(more, make_x(), config=Config(kernel="reference", plan=plan, fallback="error"))


def test_same_names_with_other_heads_stay_sdpa(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    _, backend = run(Wide().eval(), make_x(), plan=plan)
    assert not any(site.rewritten for site in backend.sites)
    assert backend.sites[0].reasons == (
        "plan is for another 'blocks.0': heads=4 (plan: 2), kv_heads=4 (plan: 2), head_dim=16 (plan: 32), "
        "value_head_dim=16 (plan: 32)",
    )
    assert "plan is for another 'blocks.0'" in caplog.text


class Twice(nn.Module):
    """One module that calls attention in two ways."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        first = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(first * 50, first * 50, x)  # sharp


def test_another_line_of_the_same_module_is_another_site() -> None:
    x = torch.randn(1, 2, 32, 32)
    plan = calibrate(Twice(False), (x,), effect="none")
    assert list(plan.decisions()) == ["<root>", "<root>#2"]
    _, backend = run(Twice(True), x, plan=plan)
    (site,) = backend.sites
    assert (
        not site.rewritten and "code=test_plan.py: return F.scaled_dot_product_attention(x" in site.reasons[0]
    )


def test_calls_of_one_module_behind_a_graph_break_are_not_taken_for_one_another() -> None:
    """Numbers of calls start again in each graph: "<root>" of the second graph is "<root>#2" of a whole one."""

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def whole(x: Tensor) -> Tensor:
        return attend(attend(x) * 50)

    def broken(x: Tensor) -> Tensor:
        x = attend(x)
        torch._dynamo.graph_break()
        return attend(x * 50)

    x = torch.randn(1, 2, 64, 32)
    plan = calibrate(whole, (x,), effect="none")
    _, backend = run(broken, x, plan=plan)
    assert [site.rewritten for site in backend.sites] == [False, False]
    assert "calls=1 (plan: 2)" in backend.sites[0].reasons[0]
    # Calibrated as it is run, both are one site of the plan, with the errors of both.
    plan = calibrate(broken, (x,), effect="none")
    (site,) = plan.sites
    assert site.measured[0].samples == 2
    _, backend = run(broken, x, plan=plan)
    assert [site.precision for site in backend.sites if site.rewritten] == [
        decision for decision in [plan.sites[0].decision] * 2 if decision != "sdpa"
    ]


def test_modules_named_like_numbered_calls_keep_their_decisions() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x)

    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleDict({name: Twice() for name in ("a", "a#2", "#")})

        def forward(self, x: Tensor) -> Tensor:
            return sum((branch(x) for branch in self.branches.values()), x)

    model, x = Keyed().eval(), torch.randn(1, 2, 40, 32)
    plan = calibrate(model, (x,), effect="none")
    names = [site.name for site in plan.sites]
    assert len(set(names)) == 6 and all(site.decision == "fast" for site in plan.sites)
    _, backend = run(model, x, plan=Plan.from_json(plan.to_json()))
    assert [site.name for site in backend.sites] == names
    assert all(site.rewritten for site in backend.sites)
    report = explain(model, x, config=Config(kernel="reference", plan=plan))
    assert [site.name for site in report.sites] == names and not report.missing


def test_masks_read_at_run_time_agree_with_any() -> None:
    def of(mask: str) -> Fingerprint:
        return Fingerprint("sdpa", "m.py: x", 1, 2, 2, 32, 32, mask)

    assert of("none").disagreements(of("runtime")) == [] == of("runtime").disagreements(of("causal"))
    assert of("none").disagreements(of("causal")) == ["mask=none (plan: causal)"]


# Files


def edited(plan: Plan, change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def test_round_trip_is_exact(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan and loaded.to_json() == plan.to_json() and dict(loaded.made_with)["torch"]
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("sage_inductor.plan", 1)
    assert data["sites"][BAD]["measured"]["fast"]["rel_l2"]["worst"] > 0.05
    assert data["sites"][0]["query"] == "2x2x48x32 float32 NHD"


def site_of(data: dict[str, Any]) -> dict[str, Any]:
    site: dict[str, Any] = data["sites"][1]
    return site


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.update(format="onnx"),
            "not a plan: format='onnx' (valid: 'sage_inductor.plan')",
        ),
        (lambda data: data.clear(), "not a plan: format=None"),
        (lambda data: data.update(version=3), "version=3 (valid: 1, 2; made by a newer sage_inductor)"),
        (lambda data: data.update(version="1"), "version='1' (valid: an integer)"),
        (lambda data: data.pop("tolerance"), "tolerance is missing"),
        (lambda data: data.update(tolerance=True), "tolerance=True (valid: a finite number)"),
        (lambda data: data.update(tolerance=math.nan), "tolerance=nan (valid: a finite number)"),
        (lambda data: data.update(tolerance=10**400), "(valid: a finite number)"),
        (lambda data: data.update(metric="psnr"), "metric='psnr' (valid: rel_l2, "),
        (lambda data: data.update(extra=1), "extra is unknown (valid: format, "),
        (lambda data: data.update(sites={}), "sites={} (valid: a list)"),
        (lambda data: data["sites"].append(3), "sites[4]=3 (valid: an object)"),
        (lambda data: data["sites"].append(data["sites"][0]), "sites[4].name='blocks.0' is there twice"),
        (lambda data: data.update(made_with={"torch": 2}), "made_with.torch=2 (valid: a text)"),
        (lambda data: data["output_rel_l2"][0].pop("worst"), "output_rel_l2[0].worst is missing"),
        (lambda data: site_of(data).update(decision="fastest"), "sites[1].decision='fastest' (valid: fast, "),
        (lambda data: site_of(data).update(decision=["fast"]), "sites[1].decision=['fast']"),
        (lambda data: site_of(data).pop("decision"), "sites[1].decision is missing"),
        (
            lambda data: site_of(data).update(steps=[3, 1]),
            "sites[1].steps=[3, 1] (valid: null, [first, last]",
        ),
        (lambda data: site_of(data).update(steps=[1]), "sites[1].steps=[1]"),
        (lambda data: site_of(data).update(reasons=[1]), "sites[1].reasons=[1] (valid: a list of texts)"),
        (lambda data: site_of(data).update(name=None), "sites[1].name=None (valid: a text)"),
        (
            lambda data: site_of(data)["fingerprint"].update(heads=2.5),
            "sites[1].fingerprint.heads=2.5 (valid: an integer or null)",
        ),
        (lambda data: site_of(data)["fingerprint"].pop("code"), "sites[1].fingerprint.code is missing"),
        (lambda data: site_of(data)["measured"].update(best={}), "sites[1].measured.best (valid: fast, "),
        (
            lambda data: site_of(data)["measured"]["fast"]["rel_l2"].update(worst="0"),
            "sites[1].measured.fast.rel_l2.worst='0' (valid: a finite number or null)",
        ),
    ],
)
def test_damaged_files_name_the_field(
    plan: Plan, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(edited(plan, change))
    for read in (Plan.load, lambda path: Config(plan=path)):
        with pytest.raises(ValueError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"[" * 100_000])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not JSON|not a plan"):
        Plan.load(path)


def test_every_cut_of_a_file_is_refused(plan: Plan) -> None:
    text = plan.to_json()
    for length in range(0, len(text) - 2, 97):
        with pytest.raises(ValueError, match="not JSON"):
            Plan.from_json(text[:length])


def test_bad_files_leave_dynamo_as_value_errors(tmp_path: Path, new_process: Callable[[], None]) -> None:
    model, x = make(None, layers=1), make_x()
    for name, content, message in (("a", "{}", "not a plan"), ("b", None, "cannot be read")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        new_process()
        with pytest.raises(ValueError, match=message):
            torch.compile(model, backend="sage_inductor", options={"sage.plan": str(path)})(x)
    with pytest.raises(TypeError, match="valid: a Plan, the path of one, None"):
        Config(plan=3)  # type: ignore[arg-type]


# Steps


def make_sensitive() -> Model:
    """Channel 5 of the input is channel 5 of K, and nothing else sees it."""
    model = make(None, layers=2)
    layer: Any = model.blocks[0]
    for part in (layer.q, layer.v, layer.k):
        part.weight.data[:, 5] = 0
    layer.k.weight.data[5, 5] = 1
    layer.q.weight.data[5], layer.q.bias.data[5] = 0, 0
    return model


@pytest.fixture(scope="module")
def stepped_plan() -> Plan:
    """The same model with inputs that are harmless early and late, and have an outlier channel from step 10 on."""
    with torch.no_grad():
        calm, wild = make_x(), make_x()
        wild[..., 5] *= 1e5  # more than smoothing evens out
        return calibrate(make_sensitive(), {2: (calm,), 10: [(wild,)], 20: (calm,)})


def test_decisions_per_range_of_steps(stepped_plan: Plan) -> None:
    assert stepped_plan.ranges() == ((0, 9), (10, 19), (20, None))
    at = {step: stepped_plan.at(step).decisions() for step in (0, 9, 10, 19, 20, 999)}
    assert at[0] == at[9] == at[20] == at[999] and at[10] == at[19] != at[0]
    assert [steps for steps, _ in stepped_plan.output_rel_l2] == [(0, 9), (10, 19), (20, None)]
    outliers = [site.key_outlier for site in stepped_plan.sites if site.name == "blocks.0"]
    assert outliers[0] == outliers[2] < 1000 < outliers[1]  # type: ignore[operator]
    assert stepped_plan.at(12).ranges() == () and len(stepped_plan.at(12).output_rel_l2) == 1
    assert Plan.from_json(stepped_plan.to_json()) == stepped_plan
    assert "10-19" in str(stepped_plan) and "20-" in str(stepped_plan)
    bounded = calibrate(make(None, layers=1), {(0, 4): (make_x(),)}, effect="none")
    with pytest.raises(ValueError, match=r"step=5 is in no range of the plan \(valid: 0-4\)"):
        bounded.at(5)


def test_without_a_step_the_most_careful_decision_counts(stepped_plan: Plan) -> None:
    _, backend = run(make_sensitive(), make_x(), plan=stepped_plan)
    applied = {site.name: site.precision if site.rewritten else "sdpa" for site in backend.sites}
    assert applied == stepped_plan.decisions() == stepped_plan.at(10).decisions()


def test_compile_steps_dispatches_and_compiles_once_per_set_of_decisions(
    stepped_plan: Plan, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    from sage_inductor import backend

    compiled: list[Any] = []

    def spy(graph_module: Any, *args: Any) -> Any:
        compiled.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(backend, "compile_with_inductor", spy)
    model, x = make_sensitive(), make_x()
    results = {step: run(model, x, plan=stepped_plan.at(step))[0] for step in (0, 10, 20)}
    assert torch.equal(results[0], results[20]) and not torch.equal(results[0], results[10])
    new_process()
    stepped = compile_steps(model, stepped_plan, options={"sage.kernel": "reference"}, fullgraph=True)
    assert stepped.blocks is model.blocks
    for step in (0, 1, 10, 11, 20, 5, 15):
        stepped.step = step
        assert torch.equal(stepped(x), results[10 * (step // 10)]), step
    assert len(compiled) == 2
    with pytest.raises(ValueError, match="options.'sage.plan'."):
        compile_steps(model, stepped_plan, options={"sage.plan": "plan.json"})


# On a GPU, with the kernel that will run


@pytest.mark.gpu
def test_on_a_gpu_the_plan_is_measured_with_the_kernel_that_runs(new_process: Callable[[], None]) -> None:
    """Short enough for "auto" to prefer SDPA: measured nevertheless, and applied by the kernel's name."""
    torch.manual_seed(0)
    model = make(dim=256, heads=2).to("cuda", torch.bfloat16)
    x = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16)
    plan = calibrate(model, (x,))
    kernels = {measured.kernel for site in plan.sites for measured in site.measured}
    assert all("triton" in kernel for kernel in kernels)
    assert plan.made_with["device"] == torch.cuda.get_device_name()
    left = [name for name, decision in plan.decisions().items() if decision != "fast"]
    assert left == [f"blocks.{BAD}"]
    new_process()
    exact = model(x)
    planned = torch.compile(
        model, backend="sage_inductor", options={"sage.kernel": "triton", "sage.plan": plan}
    )
    fast = torch.compile(model, backend="sage_inductor", options={"sage.kernel": "triton"})
    ((_, together),) = plan.output_rel_l2
    error = relative_l2(planned(x), exact)
    assert together.worst is not None and error < 2 * together.worst and error < relative_l2(fast(x), exact)
