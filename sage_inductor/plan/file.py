"""Plans as JSON files. One plan always gives the same bytes; everything that is read is checked."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from typing import Any, TypedDict

from sage_inductor.kernels.files import read_regular, replace_file
from sage_inductor.kernels.forms import FORMS, is_form
from sage_inductor.measurement.metrics import METRICS
from sage_inductor.plan.sites import SDPA, Figure, Fingerprint, Measured, PlannedSite, Steps

FORMAT = "sage_inductor.plan"
VERSION = 2
OLDER_VERSION = 1
"""What a plan is written as that leaves out no tiles: packages that knew of none read it."""
MOST_BYTES = 64 * 2**20  # a plan of a thousand sites, each at ten ranges of steps, is a fifth of that
LONGEST_MESSAGE = 600  # characters; the value that is wrong may have megabytes
OF_ONE_SITE = tuple(name for name in METRICS if name != "output_rel_l2")

_VALID_FORMS = f"{', '.join(sorted(FORMS, key=lambda form: '+' in form))}, each with +skip=THRESHOLD, +skip=sample:THRESHOLD or without"
_TYPES: dict[str, tuple[type, ...]] = {
    "a text": (str,),
    "an integer": (int,),
    "a finite number": (int, float),
    "a list": (list,),
    "an object": (dict,),
}


class PlanFields(TypedDict):
    """The fields of a `Plan`, which builds itself from them."""

    metric: str
    tolerance: float
    sites: tuple[PlannedSite, ...]
    output_rel_l2: tuple[tuple[Steps | None, Figure], ...]
    made_with: Mapping[str, str]


def to_json(plan: PlanFields) -> str:
    """The file's text. Numbers are written to the last bit, so that reading them gives the same plan."""
    data = {
        "format": FORMAT,
        "version": VERSION if any(map(_knows_of_skipping, plan["sites"])) else OLDER_VERSION,
        "made_with": dict(plan["made_with"]),
        "metric": plan["metric"],
        "tolerance": plan["tolerance"],
        "output_rel_l2": [
            {"steps": steps, "worst": figure.worst, "mean": figure.mean}
            for steps, figure in plan["output_rel_l2"]
        ],
        "sites": [
            {**_site_fields(site), "measured": {error.precision: _measured(error) for error in site.measured}}
            for site in plan["sites"]
        ],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _site_fields(site: PlannedSite) -> dict[str, Any]:
    data = asdict(site)
    return {name: value for name, value in data.items() if name not in _OF_SKIPPING or value is not None}


_OF_SKIPPING = ("skipped", "skip_rel_l2")


def _knows_of_skipping(site: PlannedSite) -> bool:
    return any("+skip=" in form for form in (site.decision, *(error.precision for error in site.measured)))


def _measured(error: Measured) -> dict[str, Any]:
    return {name: value for name, value in asdict(error).items() if name != "precision"}


def write(plan: PlanFields, path: str | PathLike[str]) -> None:
    """Write `plan` to `path`. Raises OSError where that cannot be done; a file that was there then stays as it was."""
    replace_file(path, to_json(plan).encode(), sync=True)


def read(path: str | PathLike[str]) -> PlanFields:
    content = read_regular(path, MOST_BYTES)
    try:
        return from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_json(text: str | bytes) -> PlanFields:
    """The plan in `text`. Raises ValueError, naming the field, for anything that `to_json` would not write."""
    try:
        return _from_json(text)
    except ValueError as error:
        raise ValueError(_shortened(str(error))) from None


def _shortened(message: str) -> str:
    """A long message without its middle. What is wrong stands at its beginning, what is valid at its end."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"


def _from_json(text: str | bytes) -> PlanFields:
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read: {error}") from None
    except _Duplicate:
        raise
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"not a plan: format={found!r} (valid: {FORMAT!r})")
    version = _get(data, "version", "an integer", "")
    if version not in (OLDER_VERSION, VERSION):
        newer = "; made by a newer sage_inductor" if version > VERSION else ""
        raise ValueError(f"version={version} (valid: {OLDER_VERSION}, {VERSION}{newer})")
    names = ("format", "version", *PlanFields.__annotations__)
    _only(data, names, "")
    made_with = _get(data, "made_with", "an object", "")
    for name in made_with:
        _get(made_with, name, "a text", "made_with.")
    plan = PlanFields(
        metric=_one_of(data, "metric", tuple(METRICS), ""),
        tolerance=_tolerance(data),
        sites=tuple(_site(*item) for item in _items(data, "sites")),
        output_rel_l2=tuple(_output(*item) for item in _items(data, "output_rel_l2")),
        made_with=made_with,
    )
    _no_contradictions(plan)
    return plan


class _Duplicate(ValueError):
    """A name that occurs twice in one object: readers of JSON differ in which of the two values they take."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Duplicate(f"{name} is there {count} times in one object (valid: once)")
    return data


def _site(data: dict[str, Any], where: str) -> PlannedSite:
    _only(data, [part.name for part in fields(PlannedSite)], where)
    measured = _get(data, "measured", "an object", where)
    reasons = _get(data, "reasons", "a list", where)
    if not all(isinstance(reason, str) for reason in reasons):
        raise ValueError(f"{where}reasons={reasons!r} (valid: a list of texts)")
    decision = _get(data, "decision", "a text", where)
    if decision != SDPA and not is_form(decision):
        raise ValueError(f"{where}decision={decision!r} (valid: {_VALID_FORMS}, {SDPA})")
    skip_rel_l2 = data.get("skip_rel_l2")
    texts = {name: _get(data, name, "a text", where) for name in ("source", "query", "key", "value", "mask")}
    return PlannedSite(
        name=_get(data, "name", "a text", where),
        fingerprint=_fingerprint(_get(data, "fingerprint", "an object", where), f"{where}fingerprint."),
        decision=decision,
        steps=_steps(data, where),
        graph=_get(data, "graph", "an integer", where),
        measured=tuple(_measurement(measured, name, f"{where}measured.") for name in measured),
        reasons=tuple(reasons),
        # Plans that were written before it came lack it.
        key_outlier=_get(
            {"key_outlier": None, **data}, "key_outlier", "a finite number", where, or_null=True
        ),
        skipped=_get({"skipped": None, **data}, "skipped", "a finite number", where, or_null=True),
        skip_rel_l2=None
        if skip_rel_l2 is None
        else _figure(_get(data, "skip_rel_l2", "an object", where), f"{where}skip_rel_l2."),
        **texts,
    )


def _fingerprint(data: dict[str, Any], where: str) -> Fingerprint:
    _only(data, [part.name for part in fields(Fingerprint)], where)
    kinds = dict.fromkeys(("pattern", "code", "mask"), "a text")
    sizes = ("heads", "kv_heads", "head_dim", "value_head_dim")
    return Fingerprint(
        **{name: _get(data, name, kind, where) for name, kind in kinds.items()},
        **{name: _get(data, name, "an integer", where, or_null=True) for name in sizes},
        calls=_get(data, "calls", "an integer", where),
    )


def _measurement(measured: dict[str, Any], precision: str, where: str) -> Measured:
    if not is_form(precision):
        raise ValueError(f"{where}{precision} (valid: {_VALID_FORMS})")
    data = _get(measured, precision, "an object", where)
    where = f"{where}{precision}."
    _only(data, [part.name for part in fields(Measured) if part.name != "precision"], where)
    figures = {name: _figure(_get(data, name, "an object", where), f"{where}{name}.") for name in OF_ONE_SITE}
    output = _get(data, "output_rel_l2", "an object", where, or_null=True)
    return Measured(
        precision=precision,
        kernel=_get(data, "kernel", "a text", where),
        samples=_get(data, "samples", "an integer", where),
        output_rel_l2=None if output is None else _figure(output, f"{where}output_rel_l2."),
        **figures,
    )


def _output(data: dict[str, Any], where: str) -> tuple[Steps | None, Figure]:
    steps = _steps(data, where)
    return steps, _figure({name: value for name, value in data.items() if name != "steps"}, where)


def _figure(data: dict[str, Any], where: str) -> Figure:
    _only(data, ("worst", "mean"), where)
    return Figure(
        worst=_get(data, "worst", "a finite number", where, or_null=True),
        mean=_get(data, "mean", "a finite number", where, or_null=True),
    )


def _tolerance(data: dict[str, Any]) -> float:
    metric = _one_of(data, "metric", tuple(METRICS), "")
    value: float = _get(data, "tolerance", "a finite number", "")
    low, high = METRICS[metric].low, METRICS[metric].high
    if not low < value < high:
        raise ValueError(f"tolerance={value} of {metric} (valid: between {low:g} and {high:g})")
    return value


def _steps(data: dict[str, Any], where: str) -> Steps | None:
    value = _get(data, "steps", "a list", where, or_null=True)
    if value is None:
        return None
    good = len(value) == 2 and _is(value[0], int) and (value[1] is None or _is(value[1], int))
    if not good or value[0] < 0 or (value[1] is not None and value[1] < value[0]):
        raise ValueError(f"{where}steps={value!r} (valid: null, [first, last], [first, null])")
    return value[0], value[1]


def _no_contradictions(plan: PlanFields) -> None:
    """Raises ValueError where two sites agree in name, fingerprint and range of steps."""
    seen = set()
    for index, site in enumerate(plan["sites"]):
        key = (site.name, site.fingerprint, site.steps)
        if key in seen:
            raise ValueError(
                f"sites[{index}].name={site.name!r} is there twice, alike in steps and fingerprint"
            )
        seen.add(key)


def _items(data: dict[str, Any], name: str) -> list[tuple[dict[str, Any], str]]:
    items = _get(data, name, "a list", "")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{name}[{index}]={item!r} (valid: an object)")
    return [(item, f"{name}[{index}].") for index, item in enumerate(items)]


def _get(data: dict[str, Any], name: str, kind: str, where: str, or_null: bool = False) -> Any:
    if name not in data:
        raise ValueError(f"{where}{name} is missing")
    value = data[name]
    if not (or_null and value is None) and not _is(value, *_TYPES[kind]):
        raise ValueError(f"{where}{name}={value!r} (valid: {kind}{' or null' if or_null else ''})")
    return value


def _is(value: Any, *types: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max  # not NaN, not infinite


def _one_of(data: dict[str, Any], name: str, valid: tuple[str, ...], where: str) -> str:
    value = data.get(name)
    if name in data and value not in valid:
        raise ValueError(f"{where}{name}={value!r} (valid: {', '.join(valid)})")
    return str(_get(data, name, "a text", where))


def _only(data: dict[str, Any], valid: tuple[str, ...] | list[str], where: str) -> None:
    for name in data:
        if name not in valid:
            raise ValueError(f"{where}{name} is unknown (valid: {', '.join(valid)})")
