"""Probes: modules that take the place of every eligible attention in a graph, and run it both exactly and quantised."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sage_inductor import kernels
from sage_inductor.calibration.records import Key, SkippingMeasurements, figure
from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, Kernel
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.forms import form_of, forms_of, parts_of
from sage_inductor.kernels.installed import package_version
from sage_inductor.kernels.reference.algorithm import tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import DECIDERS, LADDER
from sage_inductor.measurement.metrics import METRICS, Errors, compare, worst_of
from sage_inductor.measurement.progress import Progress
from sage_inductor.operators import inference
from sage_inductor.operators.inputs import as_4d, as_segments, make_problem
from sage_inductor.operators.schemas import EXACT
from sage_inductor.plan.sites import Fingerprint, Measured, PlannedSite, calls_per_module
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_sites

PARAMS = ("is_causal", "bottom_right", "window_left", "window_right", "scale")


class Prober:
    """Puts probes into the graphs of a model (`backend`, for `torch.compile`) and keeps what they measure.

    A site may be met in several graphs: recompiled for another shape, or behind a graph break, where names repeat. It is
    one site with the measurements of all of them, and gets one decision.
    """

    def __init__(self, config: Config, progress: Progress, smoothings: Sequence[str] = ("auto",)) -> None:
        self.kernel = config.kernel
        self.forms = forms_of(smoothings)
        """What is measured: precisions, with the smoothing behind them, as in `Measured`."""
        # The oracle runs on every device, so every site that is eligible is found. The kernels judge again when a plan is
        # applied.
        self.config = Config(
            kernel="reference", precision="accurate", include=config.include, exclude=config.exclude
        )
        self.progress = progress
        self.graphs = 0
        self.measuring = False
        self.quantised: Mapping[Key, str] = {}
        self.leaving_out: SkippingMeasurements | None = None
        self.reasons: dict[Key, tuple[str, ...]] = {}
        """Why sites are not measured."""
        self._sites: dict[Key, tuple[Site, int]] = {}
        self._errors: dict[Key, dict[str, list[Errors]]] = {}
        self._kernels: dict[tuple[Key, str], dict[str, float]] = {}
        """By site and precision: the largest relative L2 error of each kernel that was measured."""
        self._key_outliers: dict[Key, float] = {}
        """`PlannedSite.key_outlier`, not always finite."""
        self._device: torch.device | None = None
        self._recorded: Iterator[Any] = iter(())
        self._taken: list[Any] = []

    def backend(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A Dynamo backend: runs the graph eagerly, with a probe in the place of each eligible attention."""
        sites = rewrite_sites(graph_module.graph, self.config)
        calls = calls_per_module(sites)
        keys = {site.name: (site.name, Fingerprint.of(site, calls[site.module])) for site in sites}
        for site in sites:
            key = keys[site.name]
            self._sites.setdefault(key, (site, self.graphs))
            if not site.rewritten:
                self.reasons[key] = site.reasons
            elif site.query is not None and site.query.placements:
                # Ranks would decide differently, and run the model differently often.
                self.reasons[key] = (
                    reason("type of query, key, value", "DTensor", "plain tensors, to measure"),
                )
        for module in [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]:
            for node in list(module.graph.nodes):
                # Where the pass did not write the operator, the model itself calls it: that is no site, and stays.
                ours = node.op == "call_function" and node.target in _Probe.OPERATORS
                if not ours or "sage_site" not in node.meta:
                    continue
                if keys[node.meta["sage_site"]] in self.reasons:
                    node.kwargs = {**node.kwargs, "kernel_name": EXACT}
                else:
                    _put_probe(module, node, _Probe(self, keys[node.meta["sage_site"]], node.target))
            module.recompile()
        self.graphs += 1
        self.progress.sites = len(self._sites) - len(self.reasons)
        return graph_module.forward

    @contextmanager
    def measure(self) -> Iterator[dict[Key, dict[str, Measured]]]:
        """The probes measure inside the context. After it, the dict holds what they have measured, by site and precision."""
        measured: dict[Key, dict[str, Measured]] = {}
        self._errors, self._key_outliers = {}, {}
        self.measuring = True
        try:
            yield measured
        finally:
            self.measuring = False
        for key, by_precision in self._errors.items():
            measured[key] = {
                precision: _measured(
                    precision, ", ".join(self._kernels[key, precision]), by_precision[precision]
                )
                for precision in self.forms
                if precision in by_precision
            }

    @contextmanager
    def replaying(self, recorded: Any) -> Iterator[list[Any]]:
        """Inside the context, the probes take the errors in `recorded` instead of measuring, as long as its entries name
        the calls at hand, in their order. None where nothing was recorded. Yields the list of what the probes record now,
        in a form that JSON has."""
        self._recorded = iter(recorded if isinstance(recorded, list) else ())
        self._taken = []
        yield self._taken

    def replayed(self, key: Key, precision: str, names: Sequence[str]) -> dict[str, Errors] | None:
        """The recorded errors of the kernels `names` at the call at hand; None where they are not recorded."""
        try:
            name, at, errors = next(self._recorded)
            if (name, at) == (key[0], precision) and list(errors) == list(names):
                return {str(kernel): Errors(*map(float, figures)) for kernel, figures in errors.items()}
        except (StopIteration, TypeError, ValueError, OverflowError):
            pass
        self._recorded = iter(())  # another model, or a line that is not ours: the rest says nothing either
        return None

    @contextmanager
    def trying_thresholds(self, decisions: Mapping[Key, str]) -> Iterator[SkippingMeasurements]:
        """Inside the context, the probes run these sites in the form that was decided with every threshold of LADDER and every decider. After it,
        `measured` of what is given has the errors."""
        self._errors = {}
        self.leaving_out = found = SkippingMeasurements(decisions)
        try:
            yield found
        finally:
            self.leaving_out = None
        for key, by_form in self._errors.items():
            found.measured[key] = {
                form: _measured(form, ", ".join(self._kernels[key, form]), errors)
                for form, errors in by_form.items()
            }

    @contextmanager
    def quantising(self, precisions: Mapping[Key, str]) -> Iterator[None]:
        """Inside the context, these sites give their quantised output to the model, and all others the exact one."""
        self.quantised = precisions
        try:
            yield
        finally:
            self.quantised = {}

    def planned(self, key: Key, decision: str, measured: tuple[Measured, ...] = ()) -> PlannedSite:
        site, graph = self._sites[key]
        return PlannedSite(
            name=site.name,
            fingerprint=key[1],
            decision=decision,
            graph=graph,
            source=site.source,
            query=str(site.query),
            key=str(site.key),
            value=str(site.value),
            mask=site.mask,
            measured=measured,
            reasons=() if measured else self.reasons.get(key, ()),
            key_outlier=self._finite_outlier(key) if measured else None,
        )

    def _finite_outlier(self, key: Key) -> float | None:
        outlier = self._key_outliers.get(key, math.nan)
        return outlier if math.isfinite(outlier) else None

    def found(self) -> list[Site]:
        """The sites met so far."""
        return [site for site, _ in self._sites.values()]

    def sharing(self, site: PlannedSite) -> list[PlannedSite]:
        """`site`, and a copy of it for each site that shares its code and was not met by itself, such as the other blocks of
        a transformer whose graph Dynamo reuses."""
        met, _ = self._sites[site.name, site.fingerprint]
        number = met.name.removeprefix(met.module)
        others = [path + number for path in met.serves if path != met.module]
        new = [name for name in others if (name, site.fingerprint) not in self._sites]
        return [site, *(replace(site, name=name) for name in new)]

    def kernels_for(
        self, key: Key, problem: AttentionProblem, forms: Sequence[str] | None = None
    ) -> dict[str, tuple[str, ...]]:
        """`{form: names of kernels}` to measure at a site, of `forms` (None: those that plans decide among): with "auto" every
        kernel that can run it. "auto" may take one kernel at one length and another at the next, so the worst of them counts.
        Empty where none can run it; without `forms` that then is in `reasons`. Raises NotEligibleError where a kernel asked for by
        name cannot run on this machine."""
        wanted_forms = self.forms if forms is None else forms
        self._device = problem.query.device
        if self.kernel != "auto":
            missing = kernels.get(self.kernel).unavailable_reasons(self._device)
            if missing:
                raise NotEligibleError(f"kernel={self.kernel}", missing)
        able: dict[str, tuple[str, ...]] = {}
        against: list[str] = []
        for form in wanted_forms:
            params = replace(problem.params, **parts_of(form).options())
            wanted = replace(problem, params=params)
            runnable: list[Kernel] = []
            if self.kernel != "auto":
                kernel, reasons = kernels.select(wanted, self.kernel)
                runnable, against = [] if kernel is None else [kernel], against + reasons
            elif not kernels.no_choice_reasons(wanted):  # whatever their speed
                runnable, _ = kernels.candidates(wanted)
            if runnable:
                able[form] = tuple(kernel.name for kernel in runnable)
        if not able and self.kernel == "auto":
            able = dict.fromkeys(wanted_forms, ("reference",))
        if not able and forms is None:
            self.reasons[key] = tuple(dict.fromkeys(against))
        return able

    def record(self, key: Key, precision: str, errors: Mapping[str, Errors]) -> None:
        """Keep the `errors` of one call, given by kernel: the worst of each metric counts for the site."""
        self.note(key, precision, errors)
        self._errors.setdefault(key, defaultdict(list))[precision].append(worst_of(list(errors.values())))
        known = self._kernels.setdefault((key, precision), {})
        for kernel, error in errors.items():
            known[kernel] = METRICS["rel_l2"].worst([error.rel_l2, known.get(kernel, error.rel_l2)])

    def note(self, key: Key, what: str, errors: Mapping[str, Errors]) -> None:
        """Let `errors` be replayed."""
        self._taken.append([key[0], what, {kernel: list(astuple(error)) for kernel, error in errors.items()}])

    def look_at_keys(self, key: Key, keys: Tensor) -> None:
        """Keep how far the channels of `keys` `[..., kv_len, head_dim]` are from even."""
        found = _largest_channel(keys)
        self._key_outliers[key] = max(found, self._key_outliers.get(key, found), key=_by_size)

    def worst_kernel(self, key: Key, precision: str, able: Sequence[str]) -> str:
        """The kernel of `able` with the largest relative L2 error so far."""
        known = self._kernels.get((key, precision), {})
        return max(able, key=lambda kernel: _by_size(known.get(kernel, -math.inf)))

    def made_with(self) -> dict[str, str]:
        """What the measurements depend on beside the model: versions, device and kernel."""
        device = "none" if self._device is None else self._device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self._device)
        versions = {name: package_version(name) or "unknown" for name in ("sage_inductor", "torch")}
        return {**versions, "device": device, "kernel": self.kernel}


class _Probe(nn.Module):
    """Stands in a graph for one attention. It gives the exact output on to the model, except while this site is quantised
    (`Prober.quantising`)."""

    OPERATORS = (inference.attention, inference.attention_lse)

    def __init__(self, prober: Prober, key: Key, operator: Any) -> None:
        super().__init__()
        self.prober = prober
        self.key = key
        self.operator = operator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the arguments of `operator`, `sage_inductor::attention` or the one that gives an LSE, too, whose place it has in
        the graph. The output is what is compared."""
        exact = self._attention(args, kwargs, EXACT, "fast")
        wanted = self.prober.quantised.get(self.key)
        if self.prober.leaving_out is not None:
            self._try_thresholds(self.prober.leaving_out, args, kwargs, exact)
            return exact
        if wanted is None and not self.prober.measuring:
            return exact
        problem = _problem(args, kwargs, _output(exact))
        able = self.prober.kernels_for(self.key, problem, None if wanted is None else (wanted,))
        if wanted is not None:
            if wanted not in able:
                return exact
            return self._attention(
                args, kwargs, self.prober.worst_kernel(self.key, wanted, able[wanted]), wanted
            )
        for precision, names in able.items():
            errors = self.prober.replayed(self.key, precision, names)
            if errors is None:
                errors = {
                    name: compare(_output(self._attention(args, kwargs, name, precision)), _output(exact))
                    for name in names
                }
            self.prober.record(self.key, precision, errors)
        self.prober.look_at_keys(self.key, args[1])
        self.prober.progress.tick(self.key[0])
        return exact

    def _try_thresholds(
        self, found: SkippingMeasurements, args: tuple[Any, ...], kwargs: dict[str, Any], exact: Any
    ) -> None:
        """Measure this call with every threshold, from the least on, and everything that can decide about it."""
        decided = found.decisions.get(self.key)
        if decided is None:
            self.prober.progress.tick(self.key[0])
            return
        problem = _problem(args, kwargs, _output(exact))
        margins: dict[str, Tensor] = {}  # by what decides about them
        forms = []
        for skip_by in DECIDERS:
            asked = replace(problem.params, skip_threshold=LADDER[0], skip_by=skip_by)
            if not kernels.get("reference").skip_reasons(replace(problem, params=asked)):
                margins[skip_by] = _margins(args, kwargs, problem, parts_of(decided).smoothing, skip_by)
                forms += [
                    form_of(*parts_of(decided)[:2], threshold, skip_by) for threshold in reversed(LADDER)
                ]
        whole: dict[str, Tensor] = {}  # the output of each kernel with nothing left out
        for form, names in self.prober.kernels_for(self.key, problem, forms).items():
            errors = self.prober.replayed(self.key, form, names)
            alone = self.prober.replayed(self.key, f"{form}, alone", names)
            if errors is None or alone is None:
                errors, alone = {}, {}
                for name in names:
                    if name not in whole:
                        whole[name] = _output(self._attention(args, kwargs, name, decided))
                    output = _output(self._attention(args, kwargs, name, form))
                    errors[name], alone[name] = compare(output, _output(exact)), compare(output, whole[name])
            self.prober.record(self.key, form, errors)
            self.prober.note(self.key, f"{form}, alone", alone)
            found.add(
                (self.key, form),
                skipped_share(margins[parts_of(form).skip_by], parts_of(form).skip_threshold),
                METRICS["rel_l2"].worst([error.rel_l2 for error in alone.values()]),
            )
        self.prober.progress.tick(self.key[0])

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any], kernel: str, form: str) -> Any:
        return self.operator(*args, **{**kwargs, **parts_of(form).options(), "kernel_name": kernel})


def _output(result: Any) -> Tensor:
    """The output of an operator that may give an LSE behind it."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _by_size(error: float) -> float:
    """The key that errors are ordered by, NaN as the largest."""
    return math.inf if math.isnan(error) else error


def _margins(
    args: tuple[Any, ...], kwargs: dict[str, Any], problem: AttentionProblem, smoothing: str, skip_by: str
) -> Tensor:
    """The oracle's `tile_margins` for the operator's arguments."""
    query, key, _, *mask = args
    attn_mask = mask[0] if mask else None
    return tile_margins(
        as_4d(query),
        as_4d(key),
        None if attn_mask is None else as_4d(attn_mask),
        bounds=problem.params.bounds(problem.query.shape[2], problem.key.shape[2]),
        scale=problem.params.scale,
        smoothing=smoothing,
        segments=as_segments(kwargs.get("query_segments"), kwargs.get("key_segments")),
        skip_by=skip_by,
    )


def _largest_channel(keys: Tensor) -> float:
    """The size of the largest channel over that of the middle one, in the head where it is most."""
    keys = keys.double()
    sizes = (keys - keys.mean(-2, keepdim=True)).square().mean(-2).sqrt()
    return float((sizes.amax(-1) / sizes.median(-1).values).max())


def _problem(args: tuple[Any, ...], kwargs: dict[str, Any], exact: Tensor) -> AttentionProblem:
    """The problem that the operator's arguments make, in the dtype of its output, which autocast may have changed."""
    query, key, value, *mask = args
    params = AttentionParams(**{name: kwargs[name] for name in PARAMS if name in kwargs})
    ids = as_segments(kwargs.get("query_segments"), kwargs.get("key_segments"))
    problem = make_problem(query, key, value, mask[0] if mask else None, params, segments=ids)
    q, k, v = (replace(spec, dtype=exact.dtype) for spec in (problem.query, problem.key, problem.value))
    return replace(problem, query=q, key=k, value=v)


def _put_probe(owner: fx.GraphModule, node: fx.Node, probe: _Probe) -> None:
    """Put `probe` in the place of `node`, which calls the operator."""
    name = f"sage_probe_{node.name}"
    owner.add_module(name, probe)
    with owner.graph.inserting_before(node):
        new = owner.graph.call_module(name, node.args, node.kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    owner.graph.erase_node(node)


def _measured(precision: str, kernel: str, errors: Sequence[Errors]) -> Measured:
    names = ("rel_l2", "max_error", "cosine", "sqnr_db")
    figures = {name: figure(name, [getattr(error, name) for error in errors]) for name in names}
    return Measured(precision, kernel, len(errors), **figures)
