"""The sites that `include` and `exclude` leave out; globs, and sites of a plan, that match nothing in the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from weakref import WeakKeyDictionary

from torch import fx, nn

from sage_inductor.config import Config
from sage_inductor.graph.places import Place, Places, tails
from sage_inductor.measurement.printable import printable_line
from sage_inductor.plan.plan import Plan
from sage_inductor.report.site import Site

# The warnings given already for each model: a model whose blocks are compiled one by one gives many graphs.
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def matches(glob: str, place: Place) -> bool:
    """Whether `glob` matches one of the names of `place`. For a block that was compiled by itself, and whose holder is not
    known, it is enough that the end of the glob matches the whole path: `blocks.*.attn1` matches `attn1`."""
    if any(fnmatchcase(name, glob) for name in place.names):
        return True
    return place.is_open and any(_same_form(place.path, end) for end in tails(glob)[1:])


def _same_form(path: str, glob: str) -> bool:
    """Whether `path` matches `glob` component by component. False for a glob whose first component is "*", which would match
    at any place."""
    parts, globs = path.split("."), glob.split(".")
    return len(parts) == len(globs) and globs[0] != "*" and all(map(fnmatchcase, parts, globs))


def selection_reasons(config: Config, places: Sequence[Place]) -> list[str]:
    """Why include and exclude leave out the site in `places`, which all run its code. Empty when they do not.

    The most careful decision counts: the site stays if exclude matches one of its places, or include fails to match one.
    """
    reasons = []
    if config.include:
        for place in places:
            if not any(matches(glob, place) for glob in config.include):
                globs = ", ".join(config.include)
                reasons.append(f"site={places[0].path} (include: {globs}{_shared(place, places)})")
                break
    for glob in config.exclude:
        for place in places:
            if matches(glob, place):
                reasons.append(f"site={places[0].path} (exclude: {glob}{_shared(place, places)})")
                break
    return reasons


def _shared(place: Place, places: Sequence[Place]) -> str:
    return "" if place is places[0] else f"; {place.path} runs the same code"


def unmatched(config: Config, sites: Iterable[Site]) -> list[Selector]:
    """The globs that match none of `sites`."""
    places = [place for site in sites for place in site.places]
    return [
        selector
        for selector in _selectors(config)
        if not any(matches(selector.glob, place) for place in places)
    ]


def unmatched_text(what: Iterable[object], sites: Iterable[Site], at_most: int = 8) -> str:
    """ "exclude='*.attn3' matched no attention (sites: blocks.0.attn1, ...)"."""
    paths = list(dict.fromkeys(place.path for site in sites for place in site.places))
    more = f", ... {len(paths) - at_most} more" if len(paths) > at_most else ""
    sites_text = printable_line(", ".join(paths[:at_most]) + more or "none")
    return f"{printable_line(', '.join(map(str, what)))} matched no attention (sites: {sites_text})"


def warn_of_unmatched(config: Config, sites: Sequence[Site], graph: fx.Graph, places: Places) -> None:
    """Warn of globs, and of a plan, that match nothing in `graph` and cannot match in a later one. Once for each model.

    That is known if `graph` is the whole model, or if no module of the model, with attention or without, has such a name.
    """
    is_whole = places.is_whole(graph)
    what = [
        str(selector)
        for selector in unmatched(config, sites)
        if is_whole or not any(fnmatchcase(name, selector.glob) for name in places.all_names)
    ]
    names = () if is_whole else places.all_names
    if isinstance(config.plan, Plan) and config.plan.sites and not _knows(config.plan, sites, names):
        what.append(f"plan (its sites: {config.plan.names_text()})")
    if places.outermost is not None:
        warned = _WARNED.setdefault(places.outermost, set())
        what = [item for item in what if item not in warned]
        warned.update(what)
    if what:
        warnings.warn(f"sage_inductor: {unmatched_text(what, sites)}", stacklevel=2)


def _knows(plan: Plan, sites: Iterable[Site], names: Iterable[str]) -> bool:
    paths = [name for site in sites for place in site.places for name in (place.path, *place.names)]
    return any(plan.sites_called(name) for name in (*paths, *names))


@dataclass(frozen=True)
class Selector:
    """A glob of `include` or `exclude`."""

    field: str
    glob: str

    def __str__(self) -> str:
        return f"{self.field}={self.glob!r}"


def _selectors(config: Config) -> list[Selector]:
    return [
        *(Selector("include", glob) for glob in config.include),
        *(Selector("exclude", glob) for glob in config.exclude),
    ]
