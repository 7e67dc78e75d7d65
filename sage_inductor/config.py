"""Every option of the package, documented once."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args

from sage_inductor.kernels.arguments import as_number, check_choice
from sage_inductor.kernels.skipping import Decider, threshold_problem
from sage_inductor.measurement.printable import printable_line
from sage_inductor.plan.plan import Plan

log = logging.getLogger(__name__)

OPTION_PREFIX = "sage."
# The values that fields take. Editors complete a `Literal`; a Config checks values when it is made.
KernelName: TypeAlias = Literal["auto", "hopper", "triton", "sageattention", "reference"]
Precision: TypeAlias = Literal["auto", "fast", "balanced", "accurate"]
Smoothing: TypeAlias = Literal["auto", "mean", "equalise", "rotate", "both"]
Wires: TypeAlias = Literal["inputs", "8-bit"]
Fallback: TypeAlias = Literal["sdpa", "warn", "error"]
Tune: TypeAlias = Literal["measure", "table", "off"]
CHOICES: dict[str, tuple[str, ...]] = {
    "kernel": get_args(KernelName),
    "precision": get_args(Precision),
    "smoothing": get_args(Smoothing),
    "wires": get_args(Wires),
    "skip_by": get_args(Decider),
    "fallback": get_args(Fallback),
    "tune": get_args(Tune),
}


@dataclass(frozen=True)
class Config:
    """What to rewrite and how. In `torch.compile(options=...)` each field is the key `"sage.<field>"`.

    Raises:
        ValueError: a value that is not valid, with those that are; a plan's file that cannot be read, or holds no plan.
        TypeError: a value of the wrong type, with the types that are valid.
    """

    kernel: KernelName = "auto"
    """"auto": a kernel that can run the site and beats SDPA there, as `tune` says. A name ("hopper",
    "triton", "sageattention", "reference") is used wherever it can run."""

    precision: Precision = "auto"
    """"fast" (INT8 QK^T, FP8 PV), "balanced" (INT8 QK^T, INT8 PV) or "accurate" (INT8 QK^T, 16-bit PV), or "auto": the
    fastest of them that the GPU has, which is "fast", and "balanced" where it cannot compute in FP8 (before Ada). One that is
    named is kept to: where the GPU cannot run it, sites stay SDPA."""

    smoothing: Smoothing = "auto"
    """What is done to Q and K before they are rounded to 8 bits. It changes no score but by a number per query, which softmax
    does not see, and makes their channels even: one that stands out takes the steps of all others. "mean" subtracts a mean from
    K. "equalise" also scales the channels of Q and K to even sizes, "rotate" also rotates both by a signed Hadamard matrix,
    "both" does one after the other: trained models, whose keys have outliers, then keep the error of normal inputs. The kernels
    "hopper", "triton" and "reference" have all four. "auto" is "both" with them, and "mean" with "sageattention"."""

    wires: Wires = "inputs"
    """How keys and values travel in a ring of ranks: in the dtype of the inputs, each shard quantised by every rank that receives
    it; or "8-bit": quantised by their owner once, and sent so, which is about half of the bytes of bf16. Single ranks, and
    attention that is divided by heads or the batch, are as with "inputs"."""

    skip_threshold: float = 0.0
    """From 0 to below 1. A kernel leaves out a tile (64 queries, 128 keys) where no weight of any of its rows reaches this part of the
    largest weight that the row has met so far: no exponential, no product with V. That costs accuracy, which
    `calibrate(skip=True)` measures; 0 leaves nothing out. The kernels "hopper", "triton" and "reference" can; gradients are not for
    it."""

    skip_by: Decider = "scores"
    """What decides which tiles skip_threshold leaves out. "scores": every score, so that no weight above the threshold is lost; all
    scores are computed. "sample": one query in 16, before anything else is computed, for tiles of 128 queries: what is left out costs
    nothing then, but a query between two of the sample may lose a weight above the threshold. It adds up to two or three times the error
    at the same threshold; `calibrate(skip=True)` tries both. It takes no mask but one over keys, and no segments."""

    fallback: Fallback = "sdpa"
    """What happens at a site that cannot be rewritten: "sdpa" leaves it and reports it, "warn" also warns,
    "error" raises NotEligibleError with all reasons."""

    include: tuple[str, ...] = ()
    """fnmatch globs on the site's module path ("blocks.*.attn1"); when given, only sites that match are
    rewritten. A glob matches the whole path, a dotted tail of it ("attn1"), or either behind the class of a module on
    the way ("Block.attn1"). Wrappers (DDP, FSDP, torch.compile, hooks) are no part of a path. Where blocks that were
    compiled one by one share a graph, all of them have to match."""

    exclude: tuple[str, ...] = ()
    """fnmatch globs as for include; sites that match stay SDPA, as do those that share a graph with one. Wins over
    include. A glob of either that matches nothing in the model warns (UserWarning) when its first attention is
    compiled."""

    tune: Tune = "measure"
    """How "auto" chooses. "measure": while compiling, every kernel that can run the site is timed against the
    SDPA call it would replace, on this GPU, and has to win; results are kept on disk, and where nothing can be
    measured (no GPU, no memory to spare) "table" takes over. "table": by the measurements shipped with the
    kernels. "off": the first kernel that can run, be it slower."""

    cache_dir: str | PathLike[str] | None = None
    """Folder for the results of "measure"; None: sage_inductor in $XDG_CACHE_HOME, or in ~/.cache. A path is kept as its text."""

    training: bool = False
    """Also rewrite sites whose inputs need gradients: the forward pass is quantised, the backward pass is the
    exact gradient of unquantised attention at the same inputs (a straight-through estimate)."""

    plan: str | PathLike[str] | Plan | None = None
    """Precision, smoothing, skip_threshold and skip_by site by site: a Plan, or the path of one that was saved, which is read here. A site whose decision is
    "sdpa", and one that the plan was not made for, stay SDPA, with the reason. It overrules those four."""

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            check_choice(name, value, valid)
            object.__setattr__(self, name, _text(value))
        threshold = as_number(self.skip_threshold)
        if problem := threshold_problem(threshold):
            raise (ValueError if isinstance(threshold, (int, float)) else TypeError)(problem)
        object.__setattr__(self, "skip_threshold", float(threshold))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(glob, str) for glob in _as_tuple(name, value)):
                raise TypeError(f"{name}={value!r} (valid: a tuple or list of glob strings)")
            object.__setattr__(self, name, tuple(map(_text, value)))
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", _folder("cache_dir", self.cache_dir))
        if not isinstance(self.training, bool):
            raise TypeError(f"training={self.training!r} (valid: True, False)")
        if isinstance(self.plan, (str, PathLike)):
            path = os.fspath(self.plan)
            try:
                object.__setattr__(self, "plan", Plan.load(path))
            except OSError as error:
                raise ValueError(f"plan={str(path)!r} cannot be read: {error}") from None
            _warn_of_change(os.path.abspath(path), repr(self.plan))
        elif self.plan is not None and not isinstance(self.plan, Plan):
            raise TypeError(f"plan={self.plan!r} (valid: a Plan, the path of one, None)")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
        """Split `torch.compile` options into our Config and those that belong to Inductor. Raises ValueError for an unknown
        "sage." option and for a field of ours that is spelled without it, TypeError for what is no mapping."""
        if not isinstance(options, (Mapping, NoneType)):
            raise TypeError(f"options={options!r} (valid: a dict, None)")
        names = [field.name for field in fields(cls)]
        known = {OPTION_PREFIX + name: name for name in names}
        own: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if key in known:
                own[known[key]] = value
            elif isinstance(key, str) and (key.startswith(OPTION_PREFIX) or _is_near(key, names)):
                raise ValueError(f"unknown option {key!r} (valid: {', '.join(known)})")
            else:
                rest[key] = value
        return cls(**own), rest

    @classmethod
    def of(cls, config: Config | None) -> Config:
        """`config`, or the defaults for None; TypeError for anything else, such as a dict of options."""
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config={config!r} (valid: a sage_inductor.Config, None)")
        return cls() if config is None else config


def _is_near(key: str, names: Collection[str]) -> bool:
    """Whether `key` is one of `names` in another spelling: "kernel", "sage_kernel", "Sage.Kernel". Inductor has no such options."""
    return key.lower().removeprefix("sage").lstrip("._-") in names


_read: dict[str, str] = {}  # the plan that was last read from each path


def _warn_of_change(path: str, content: str) -> None:
    """Warn where a plan's file has changed. torch.compile tells compiled code apart by the options as they were given: by the
    path, not by the content of the file."""
    if _read.setdefault(path, content) != content:
        _read[path] = content
        log.warning(
            "plan %s has changed since this process read it: what was compiled with the path keeps the decisions of then "
            "(torch.compiler.reset() compiles it again; options={'sage.plan': Plan.load(path)} tells contents apart)",
            printable_line(path),
        )


def _folder(name: str, value: object) -> str:
    """A path as text, so that the `repr` of a Config is the same for a str and for any kind of path object."""
    path = os.fspath(value) if isinstance(value, (str, PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(f"{name}={value!r} (valid: a path as a string or os.PathLike of one, None)")
    if not path or "\0" in path:
        raise ValueError(f"{name}={value!r} (valid: a path that is not empty and has no NUL, None)")
    return _text(path)


def _text(text: str) -> str:
    """`text` as a plain str. A subclass, such as a member of an enum of texts, has another `repr`, which tells compiled graphs
    apart."""
    return str.__str__(text)


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}={value!r} (valid: a tuple or list of glob strings)")
    return tuple(value)
