"""`calibrate`: runs a model on samples, measures every attention both ways, and decides site by site."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sage_inductor.calibration.ledger import Ledger, identity
from sage_inductor.calibration.probe import Prober
from sage_inductor.calibration.records import Key, SkippingMeasurements, figure
from sage_inductor.calibration.samples import Phase, Sample, phases_of
from sage_inductor.config import Config
from sage_inductor.kernels import SMOOTHINGS
from sage_inductor.kernels.arguments import as_number, check_choice
from sage_inductor.kernels.forms import parts_of
from sage_inductor.kernels.skipping import DECIDERS, LADDER, expected_time
from sage_inductor.measurement.metrics import METRICS, compare
from sage_inductor.measurement.printable import printable_line
from sage_inductor.measurement.progress import Progress, ProgressCallback, shown
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import SDPA, Figure, Measured, PlannedSite, steps_text
from sage_inductor.rewriting.selection import unmatched, unmatched_text
from sage_inductor.torch_internals.dynamo_entries import without_leaving_dynamo_entries
from sage_inductor.torch_internals.traced import tensors_of

log = logging.getLogger(__name__)

EFFECTS = ("decided", "all", "none")
Output: TypeAlias = "Callable[[Any], Tensor | Sequence[Tensor]]"


def calibrate(
    model: Callable[..., Any],
    inputs: Any,
    *,
    tolerance: float | None = None,
    metric: str = "rel_l2",
    effect: str = "decided",
    output: Output | None = None,
    config: Config | None = None,
    smoothings: Sequence[str] | None = None,
    skip: bool = False,
    progress: ProgressCallback | None = None,
    keep: str | PathLike[str] | None = None,
) -> Plan:
    """Measure what each precision does to each attention of `model`, and give each the fastest one that holds.

    Every site runs on its own exact inputs: unquantised attention flows on through the model, while "fast",
    "balanced" and "accurate" run beside it on the same tensors, one after another, and only their errors are kept.
    Then the sites are quantised one at a time, and in the end all as decided, for the effect on the model's output.
    Threads may call it; one call of `calibrate` or `explain` is under way at a time, others wait.

        plan = sage_inductor.calibrate(model, [(x1,), (x2,)], tolerance=0.05)
        plan.save("plan.json")
        torch.compile(model, backend="sage_inductor", options={"sage.plan": "plan.json"})

    Args:
        model: a module or function, in the state (dtype, device, eval) in which it will be compiled. Runs without
            gradients. State that it keeps from call to call (a static KV cache) is not put back between runs.
        inputs: a tuple of arguments, a dict of keyword arguments, or an iterable of such: samples of the lengths
            and content that will be met. For a model that is run in steps (diffusion), a dict of any of these by
            step, `{0: sample, 20: sample}`, gives decisions for ranges of steps: each calibrated step speaks for
            those up to the next, the first also for those before it. Keys (first, last) name the ranges.
            `compile_steps` runs the result; applied as it is, a plan takes the most careful decision of all steps.
        tolerance: what the worst of all samples must hold; None: the metric's default.
        metric: what the tolerance is of. Errors of the site's output: "rel_l2" and "max_error" (at most the tolerance;
            default .05), "cosine" (at least; .99875), "sqnr_db" (at least, in dB; 26). Or "output_rel_l2", the relative L2
            error of the model's output with this site alone quantised (at most; .01).
        effect: for which precisions the model's output is measured: the "decided" one of each site (one run of the
            model per site and sample), "all" of them (three), or "none".
        output: a function from what the model returns to the tensors that count: `lambda result: result.logits`. By
            default all floating-point ones count; the error is that of the worst. They are kept for all samples while
            calibrating.
        config: `kernel`, `smoothing`, `include` and `exclude` are used. kernel="auto" measures with every kernel that can run the
            site, those too slow to be chosen included, and keeps the worst: which one will run depends on the lengths,
            the machine and `tune`. Where no kernel can, as on a CPU, it measures with the reference.
        smoothings: those of `Config.smoothing` to measure each precision with, as in ("mean", "both"). A site gets the fastest
            precision that holds, with the least of them that makes it hold; the plan names both, as in "fast+both". By default
            config's alone.
        skip: also find out what each site can leave out (`Config.skip_threshold`): every site that gets a precision is run once
            more with thresholds from .0001 to .1, each by all scores and by a sample of the queries (`Config.skip_by`). Of those that
            hold the tolerance together with 8 bits, and leave tiles out, it gets the one that is expected to be fastest. The plan
            names it, as in "fast+skip=0.01" or "fast+skip=sample:0.001", with the share of tiles (on these samples, by the oracle) and
            what leaving them out adds to the error.
        progress: called as (done, total, what) for each site measured; `total` grows while sites are found. By
            default a bar on a terminal (with `rich` installed), and the log at level INFO.
        keep: a file to which each measurement is written as soon as it is made. After an interruption the same call, with
            the same model, samples and file, goes on where it stopped. The file is removed when the plan is made.

    Raises:
        ValueError, TypeError: an argument that is not valid, named, with what is.
        NotEligibleError: a kernel asked for by name cannot run on this machine.
        RuntimeError: Dynamo made no graph of the model.
        OSError: `keep` cannot be written.
    """
    goal = _Goal.of(metric, tolerance, effect)
    chosen = Config.of(config)
    if chosen.plan is not None:
        raise ValueError("config.plan (valid: None; calibrate makes a plan)")
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__} (valid: a module, a function)")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress={progress!r} (valid: a function, None)")
    if not isinstance(skip, bool):
        raise TypeError(f"skip={skip!r} (valid: True, False)")
    if chosen.skip_threshold:
        raise ValueError(
            f"config.skip_threshold={chosen.skip_threshold} (valid: 0; with skip=True, calibrate finds thresholds)"
        )
    wanted = _smoothings(smoothings, chosen)
    phases = phases_of(inputs)
    units = sum(len(phase.samples) * (1 + skip) + (effect != "none") for phase in phases)
    settings = (
        chosen.kernel,
        chosen.include,
        chosen.exclude,
        effect,
        [phase.steps for phase in phases],
        *([wanted] if wanted != ("auto",) else []),
        *([LADDER, DECIDERS] if skip else []),
        torch.__version__,
    )
    samples = ((sample.args, sample.kwargs) for phase in phases for sample in phase.samples)
    ledger = Ledger(keep, "" if keep is None else identity(model, settings, samples))
    with shown(progress) as callback:
        prober = Prober(chosen, Progress(callback, units), wanted)
        with without_leaving_dynamo_entries(prober.backend), torch.no_grad():
            compiled = torch.compile(model, backend=prober.backend, dynamic=False)
            results = [
                _Decisions(
                    phase, goal, prober, _Runner(compiled, output), ledger, f"phase {index}", skip
                ).run()
                for index, phase in enumerate(phases)
            ]
    sites = [site for decided, _ in results for site in decided]
    if not sites:
        log.warning("no attention found in %d graph(s): the plan is empty", prober.graphs)
    left = unmatched(chosen, prober.found())
    if left:
        warnings.warn(f"sage_inductor: {unmatched_text(left, prober.found())}", stacklevel=2)
    ledger.remove()
    outputs = tuple((phase.steps, total) for phase, (_, total) in zip(phases, results, strict=True) if total)
    return Plan(goal.metric, goal.tolerance, tuple(sites), outputs, prober.made_with())


def _smoothings(given: Sequence[str] | None, config: Config) -> tuple[str, ...]:
    if given is None:
        return (config.smoothing,)
    if isinstance(given, str) or not given or not all(name in SMOOTHINGS for name in given):
        raise ValueError(f"smoothings={given!r} (valid: one or more of {', '.join(SMOOTHINGS)})")
    return tuple(name for name in SMOOTHINGS if name in given)


@dataclass(frozen=True)
class _Goal:
    """The tolerance of a metric that each site has to hold, and for which precisions the model's output is measured."""

    metric: str
    tolerance: float
    effect: str

    @classmethod
    def of(cls, metric: str, tolerance: float | None, effect: str) -> _Goal:
        check_choice("metric", metric, METRICS)
        check_choice("effect", effect, EFFECTS)
        tolerance = as_number(tolerance)
        if effect == "none" and metric == "output_rel_l2":
            raise ValueError("effect='none' with metric='output_rel_l2' (valid: decided, all)")
        criterion = METRICS[metric]
        if tolerance is None:
            return cls(metric, criterion.default, effect)
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise TypeError(f"tolerance={tolerance!r} (valid: a number)")
        if not criterion.low < tolerance < criterion.high:
            raise ValueError(
                f"tolerance={tolerance} of {metric} (valid: between {criterion.low:g} and {criterion.high:g})"
            )
        return cls(metric, float(tolerance), effect)

    def holds(self, figure: Figure | None) -> bool:
        return figure is not None and METRICS[self.metric].holds(figure.worst, self.tolerance)


class _Decisions:
    """The decisions for one range of steps."""

    def __init__(
        self,
        phase: Phase,
        goal: _Goal,
        prober: Prober,
        runner: _Runner,
        ledger: Ledger,
        name: str,
        skip: bool,
    ) -> None:
        self.skip = skip
        self.ledger = ledger
        self.name = name
        self.phase = phase
        self.goal = goal
        self.prober = prober
        self.runner = runner
        self.exact: list[list[Tensor]] = []  # the model's output for each sample

    def run(self) -> tuple[list[PlannedSite], Figure | None]:
        """The sites, and the error of the model's output with all of the decisions."""
        with self.prober.measure() as measured:
            self.exact = self._measure("sample")
        if not self.prober.graphs:
            raise RuntimeError(
                "Dynamo made no graph of the model, nothing was measured (is it compiled already, and at Dynamo's "
                "limit of recompiles? torch._dynamo.reset(); is Dynamo disabled, by TORCHDYNAMO_DISABLE or a stance?)"
            )
        sites = [self._decide(key, results) for key, results in measured.items()]
        if self.skip:
            sites = self._with_thresholds(sites)
        total = None
        if self.goal.effect != "none":
            kept = {(site.name, site.fingerprint): site.decision for site in sites if site.decision != SDPA}
            total = self._effect_of(kept)
        sites += [self.prober.planned(key, SDPA) for key in self.prober.reasons if key not in measured]
        shared = [other for site in sites for other in self.prober.sharing(site)]
        return [replace(site, steps=self.phase.steps) for site in shared], total

    def _measure(self, what: str) -> list[list[Tensor]]:
        """The model's output for each sample. The probes measure, or replay what the ledger has of it."""
        outputs = []
        for index, sample in enumerate(self.phase.samples):
            key = f"{self.name}, {what} {index}"
            with self.prober.replaying(self.ledger.get(key)) as taken:
                try:
                    outputs.append(self.runner.run(sample))
                finally:
                    self.ledger.put(key, taken)  # of an interrupted run, too: the next one replays it
        return outputs

    def _with_thresholds(self, sites: list[PlannedSite]) -> list[PlannedSite]:
        """The same decisions, each with the skip_threshold, and what decides about it, that is expected to gain the most of those
        that hold the tolerance."""
        decided = {(site.name, site.fingerprint): site.decision for site in sites if site.decision != SDPA}
        with self.prober.trying_thresholds(decided) as found:
            self._measure("thresholds, sample")
        return [
            self._with_threshold(site, found) if (site.name, site.fingerprint) in found.measured else site
            for site in sites
        ]

    def _with_threshold(self, site: PlannedSite, found: SkippingMeasurements) -> PlannedSite:
        goal, key = self.goal, (site.name, site.fingerprint)
        results = {error.precision: error for error in site.measured} | found.measured[key]
        for form in sorted(
            found.measured[key], key=lambda form: _expected_time(form, found.share(key, form))
        ):
            if not found.share(key, form):
                continue
            if goal.metric == "output_rel_l2":
                self._add_effect(key, form, results)
            if goal.holds(getattr(results[form], goal.metric)):
                if goal.effect != "none":
                    self._add_effect(key, form, results)
                log.info("%s: %s", printable_line(site.name), form)
                site = replace(
                    site, decision=form, skipped=found.share(key, form), skip_rel_l2=found.added(key, form)
                )
                break
        return replace(site, measured=tuple(results.values()))

    def _decide(self, key: Key, measured: dict[str, Measured]) -> PlannedSite:
        """The site with the fastest precision that holds the tolerance, or SDPA. Effects on the model's output are measured
        as far as `effect` asks for them."""
        goal, results = self.goal, dict(measured)
        if goal.effect == "all":
            for precision in results:
                self._add_effect(key, precision, results)
        decision = SDPA
        for precision in results:  # the fastest first
            if goal.metric == "output_rel_l2":
                self._add_effect(key, precision, results)
            if goal.holds(getattr(results[precision], goal.metric)):
                decision = precision
                break
        if goal.effect != "none":
            if decision != SDPA:
                self._add_effect(key, decision, results)
            self.prober.progress.tick(f"{key[0]}: {decision}")
        log.info("%s, steps %s: %s", printable_line(key[0]), steps_text(self.phase.steps), decision)
        return self.prober.planned(key, decision, tuple(results.values()))

    def _add_effect(self, key: Key, precision: str, results: dict[str, Measured]) -> None:
        if results[precision].output_rel_l2 is None:
            effect = self._effect_of({key: precision})
            results[precision] = replace(results[precision], output_rel_l2=effect)

    def _effect_of(self, precisions: Mapping[Key, str]) -> Figure:
        """The relative L2 error of the model's output with these sites in these precisions, and all others exact."""
        chosen = sorted((repr(site), precision) for site, precision in precisions.items())
        key = f"{self.name}, effect of {hashlib.sha256(repr(chosen).encode()).hexdigest()}"
        errors = self.ledger.get(key)
        if not isinstance(errors, list) or not all(isinstance(error, float) for error in errors):
            with self.prober.quantising(precisions):
                errors = [
                    _output_error(self.runner.run(sample), exact)
                    for sample, exact in zip(self.phase.samples, self.exact, strict=True)
                ]
            self.ledger.put(key, errors)
        return figure("output_rel_l2", errors)


def _expected_time(form: str, share: float) -> tuple[float, float]:
    """What forms that leave something out are tried by: the time that they are expected to take, then the threshold, the larger
    first."""
    parts = parts_of(form)
    return expected_time(parts.skip_by, share), -parts.skip_threshold


class _Runner:
    """Runs the model, each time from the same inputs and the same seed."""

    def __init__(self, compiled: Callable[..., Any], output: Output | None) -> None:
        self.compiled = compiled
        self.output = output

    def run(self, sample: Sample) -> list[Tensor]:
        """The floating-point tensors of the output. The inputs are copied before, and the random seed is 0."""
        sample = sample.copied()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            result = self.compiled(*sample.args, **sample.kwargs)
        tensors = tensors_of(result if self.output is None else self.output(result))
        return [tensor for tensor in tensors if tensor.is_floating_point()]


def _output_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The relative L2 error of the worst tensor. Raises ValueError where there is no tensor."""
    if not exact:
        raise ValueError(
            "the model's output holds no floating-point tensor (valid: output=..., effect='none')"
        )
    errors = [compare(a, e).rel_l2 for a, e in zip(actual, exact, strict=True)]
    return METRICS["output_rel_l2"].worst(errors)
