"""calibrate(skip=True) and plans with a skip_threshold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, Plan, calibrate, explain
from sage_inductor.kernels.forms import Form, form_of, is_form, most_careful, parts_of
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import LADDER, expected_time
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.plan.plan import Plan as PlanClass

CHOSEN = "fast+skip=sample:0.1"
THRESHOLDS = [f"fast+skip={threshold}" for threshold in LADDER]
pytestmark = pytest.mark.usefixtures("inference")


class Layer(nn.Module):
    """Attention whose scores are higher by `height` where query and key are about the same of two topics."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.amplitude = (height * 4) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        topic = F.one_hot(torch.arange(x.shape[2]) // 128 % 2, 16)
        about = 0.5 * x + self.amplitude * topic
        return F.scaled_dot_product_attention(about, about, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = Layer(2.0), Layer(5.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.low(x) + self.high(x)


def make_x() -> Tensor:
    return torch.randn(1, 1, 384, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.no_grad():
        return calibrate(Model(), [(make_x(),)], tolerance=0.03, skip=True)


def test_each_site_gets_what_gains_most_of_what_holds(plan: Plan) -> None:
    low, high = plan.sites
    # What is lower by 2 of natural log has weights of .13, and nothing is left out by .1 and less.
    assert (low.decision, low.skipped, low.skip_rel_l2) == ("fast", None, None)
    assert high.decision == CHOSEN
    assert len(high.measured) == 3 + 2 * len(LADDER)

    layer, x = Model().high, make_x()
    about = 0.5 * x + layer.amplitude * F.one_hot(torch.arange(384) // 128 % 2, 16)
    whole, _ = reference.attention(about, about, x)
    out, _ = reference.attention(about, about, x, skip_threshold=0.1, skip_by="sample")
    measured = high.of_decision()
    assert measured is not None and high.skip_rel_l2 is not None
    assert measured.rel_l2.worst == pytest.approx(relative_l2(out, layer(x)))
    assert high.skip_rel_l2.worst == pytest.approx(relative_l2(out, whole)) and high.skip_rel_l2.worst > 0
    assert high.skipped == skipped_share(reference.tile_margins(about, about, skip_by="sample"), 0.1)
    assert 0 < high.skipped < 0.5


class Masked(Layer):
    """The same, but the last query does not see the last key."""

    def forward(self, x: Tensor) -> Tensor:
        topic = F.one_hot(torch.arange(x.shape[2]) // 128 % 2, 16)
        about = 0.5 * x + self.amplitude * topic
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device)
        mask[-1, -1] = False
        return F.scaled_dot_product_attention(about, about, x, mask)


def test_scores_decide_where_no_sample_can() -> None:
    found = calibrate(Masked(5.0), [(make_x(),)], tolerance=0.03, skip=True, effect="none")
    (site,) = found.sites
    assert site.decision == "fast+skip=0.1"
    assert not any("sample" in error.precision for error in site.measured)
    margins = torch.tensor([expected_time("scores", share) for share in (0.0, 0.5, 0.8)])
    torch.testing.assert_close(
        1 / margins, torch.tensor([0.91, 1.22, 1.58]), rtol=0.03, atol=0
    )  # as measured


def test_the_table_shows_what_is_left_out(plan: Plan) -> None:
    header, rows = plan.table()
    shown = dict(zip(header, rows[1], strict=True))
    assert (shown["decision"], shown["tiles left out"]) == (CHOSEN, f"{plan.sites[1].skipped:.1%}")
    assert float(shown["which adds"]) == pytest.approx(plan.sites[1].skip_rel_l2.worst, rel=0.01)  # type: ignore[union-attr, arg-type]
    assert f"1 {CHOSEN}" in plan.summary()[0]


def test_a_plan_reaches_the_graph_and_the_report(plan: Plan) -> None:
    report = explain(Model(), make_x(), config=Config(kernel="reference", plan=plan))
    assert [site.skip_threshold for site in report.sites] == [0.0, 0.1]
    assert [site.skip_by for site in report.sites] == ["scores", "sample"]
    assert report.sites[1].skipped == plan.sites[1].skipped
    share = f"skip_threshold=0.1 by a sample ({plan.sites[1].skipped:.0%} of tiles)"
    assert share in " ".join(str(report).split()) and share in report.to_html()


def test_a_smaller_tolerance_takes_a_smaller_threshold() -> None:
    """The figures that decide are those of 8 bits and of what is left out together."""

    def calibrated(tolerance: float) -> tuple[str, dict[str, float]]:
        options = {"tolerance": tolerance, "skip": True, "effect": "none"}
        (site,) = calibrate(Masked(5.0), [(make_x(),)], **options).sites  # type: ignore[arg-type]
        return site.decision, {error.precision: error.rel_l2.worst or 0.0 for error in site.measured}

    decision, errors = calibrated(0.03)
    assert decision == "fast+skip=0.1" and errors["fast"] < errors[decision]
    tolerance = errors[decision] * 0.999
    expected = next(form for form in THRESHOLDS if errors[form] <= tolerance)
    assert calibrated(tolerance)[0] == expected != decision


def test_an_interrupted_calibration_goes_on(plan: Plan, tmp_path: object) -> None:
    file = f"{tmp_path}/kept.json"

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 4:  # of two sites, each measured, then with thresholds
            raise Stop

    options = {"tolerance": 0.03, "skip": True, "keep": file, "effect": "none"}
    with pytest.raises(Stop):
        calibrate(Model(), [(make_x(),)], progress=stop, **options)  # type: ignore[arg-type]
    with open(file) as kept:
        assert f"{CHOSEN}, alone" in kept.read()
    found = calibrate(Model(), [(make_x(),)], **options)  # type: ignore[arg-type]
    assert found.sites[1].decision == CHOSEN and found.sites[1].skipped == plan.sites[1].skipped


def test_files_are_of_version_2_where_something_is_left_out(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    assert data["version"] == 2 and "skipped" not in data["sites"][0]
    whole = [
        replace(site, decision="fast", skipped=None, skip_rel_l2=None, measured=site.measured[:3])
        for site in plan.sites
    ]
    old = json.loads(replace(plan, sites=tuple(whole)).to_json())
    assert old["version"] == 1 and not any(
        "skipped" in site or "skip_rel_l2" in site for site in old["sites"]
    )
    assert Plan.from_json(json.dumps(old)).sites == tuple(whole)


@pytest.mark.parametrize(
    "decision",
    [
        "fast+skip=1.0",
        "fast+skip=x",
        "fast+skip=0.10",
        "fast+skip=",
        "fast+skip=nan",
        "slow+skip=0.1",
        "fast+skip=scores:0.1",
        "fast+skip=vote:0.1",
        "fast+skip=sample:",
        "fast+skip=sample:1.0",
    ],
)
def test_decisions_that_are_none_are_refused(plan: Plan, decision: str) -> None:
    data = json.loads(plan.to_json())
    data["sites"][1]["decision"] = decision
    with pytest.raises(ValueError, match=r"sites\[1\].decision='.*' \(valid: fast, .*THRESHOLD.*, sdpa\)"):
        Plan.from_json(json.dumps(data))


def test_forms() -> None:
    for form in (
        Form("fast"),
        Form("balanced", "both"),
        Form("accurate", "mean", 0.003),
        Form("fast", "rotate", 1e-05),
        Form("fast", "mean", 0.01, "sample"),
    ):
        assert parts_of(str(form)) == form and is_form(str(form))
    assert form_of("fast", "both", 0.01) == "fast+both+skip=0.01"
    assert most_careful(["fast+skip=0.1", "fast+skip=0.01"]) == "fast+skip=0.01"
    assert form_of("fast", skip_threshold=0.01, skip_by="sample") == "fast+skip=sample:0.01"
    assert most_careful(["fast+skip=0.1", "fast"]) == most_careful(["fast+skip=sample:0.1", "fast"]) == "fast"
    assert most_careful(["fast+skip=0.1", "fast+skip=sample:0.01"]) == "fast+skip=0.01"
    assert most_careful(["fast+skip=sample:0.1", "balanced+skip=sample:0.01"]) == "balanced+skip=sample:0.01"
    assert most_careful(["accurate+skip=0.1", "fast+both+skip=0.01"]) == "accurate+skip=0.01"


def test_several_decisions_for_one_site(plan: Plan) -> None:
    """Of ranges of steps the most careful counts: no threshold where one range has none."""
    high = plan.sites[1]
    steps = [
        replace(high, steps=(0, 4), decision="fast+skip=0.1"),
        replace(high, steps=(5, None), decision="fast+skip=0.01", skipped=0.1),
    ]
    both = PlanClass("rel_l2", 0.03, tuple(steps))
    assert both.decisions() == {"high": "fast+skip=0.01"}
    verdict = both.verdict("high", high.fingerprint)
    assert (verdict.precision, verdict.skipped) == ("fast+skip=0.01", 0.1)
    without = replace(both, sites=(steps[0], replace(steps[1], decision="fast", skipped=None)))
    verdict = without.verdict("high", high.fingerprint)
    assert (verdict.precision, verdict.skipped) == ("fast", None)


@pytest.mark.parametrize("arguments", [{"skip": 1}, {"config": Config(skip_threshold=0.1)}])
def test_wrong_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"skip(=1|_threshold=0.1) \(valid"):
        calibrate(Model(), [(make_x(),)], **arguments)  # type: ignore[arg-type]
