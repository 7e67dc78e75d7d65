"""The pass in the form that Inductor takes. Importing this module imports Inductor, and with it triton."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

from sage_inductor.config import Config
from sage_inductor.graph.places import Places
from sage_inductor.graph.surroundings import ambient_pin
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.torch_internals.distributed import default_store
from sage_inductor.torch_internals.inductor import CustomGraphPass
from sage_inductor.torch_internals.sdpa import ambient_settings, autocast_dtypes, float32_precision
from sage_inductor.tuning.choice import is_makeshift
from sage_inductor.tuning.machine import digest, machines, source_files, version

__all__ = ["SageAttentionPass", "rewrite_graph", "source_hash"]


class SageAttentionPass(CustomGraphPass):
    """For `options={"pre_grad_custom_pass": SageAttentionPass(config)}`.

    `then` is a pass that was configured already; it runs after ours.

    The uuid makes compiled graphs cacheable, and keeps them from being reused wrongly. It covers the options, torch's
    settings of attention (`sdpa_kernel`, the flash implementation, cuDNN's flags), the sources of this package, the versions
    of the packages it runs on and, where choices are measured, the GPUs and their driver. Once something could not be
    measured, the uuid forbids caching: the next process may have the memory for it. So it does where ranks of a process group
    choose together.
    """

    def __init__(self, config: Config | None = None, then: Any = None) -> None:
        self.config = Config.of(config)
        self.then = then
        self.times_asked = 0
        """How often Inductor asked for the uuid or ran the pass."""
        self.times_run = 0
        self.rewritten = 0
        """Attentions, in all graphs."""

    def before(self, configured: Any) -> SageAttentionPass:
        """This pass in front of the one, or the list of them (torch 2.13 and later), that is configured."""
        if isinstance(configured, (list, tuple)):
            configured = _Sequence(tuple(configured)) if configured else None
        return SageAttentionPass(self.config, configured)

    def __call__(self, graph: fx.Graph) -> None:
        self.times_asked += 1
        self.times_run += 1
        self.rewritten += sum(site.rewritten for site in rewrite_graph(graph, self.config))
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> Any:
        self.times_asked += 1
        own: tuple[Any, ...] = ("sage_inductor", source_hash(), repr(self.config), _ambient())
        if self.config.tune == "measure":
            # Ranks agree by way of the pass: one that finds its graph in a cache would not have a say.
            if is_makeshift() or default_store() is not None:
                return _Uncacheable()
            # A cached graph holds a choice that was measured: it serves where the measurement would hold.
            own += tuple(machine.fingerprint() for machine in machines())
        if self.config.include or self.config.exclude or self.config.plan is not None:
            # A block that is compiled by itself gives the same graph wherever it stands, but decisions depend on its place.
            own += (Places().of_compiled(),)
        if self.then is None:
            return own
        uuid = getattr(self.then, "uuid", None)
        inner = uuid() if callable(uuid) else None
        # A pass that gives no uuid forbids caching, whatever stands before it.
        return None if inner is None else (*own, inner)


class _Sequence:
    """Several passes as one."""

    def __init__(self, passes: tuple[Any, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        uuids = [graph_pass.uuid() if hasattr(graph_pass, "uuid") else None for graph_pass in self.passes]
        return None if None in uuids else tuple(uuids)


def _ambient() -> str:
    """The settings of torch that the pass looks at, as JSON. A graph that was rewritten where nothing was pinned must not serve
    a process under `sdpa_kernel(...)`."""
    facts = [ambient_pin(), float32_precision(), autocast_dtypes(), ambient_settings()]
    return json.dumps(facts, sort_keys=True)


class _Uncacheable:
    """A uuid with which no cache key can be made, in any version of torch. None would not do: torch 2.13 then assumes that the
    pass ran before the key was made, which is not so for the graph at hand."""

    def __reduce__(self) -> str:
        raise TypeError(
            "sage_inductor's choice is this process's alone, or this group's, and not for a cache"
        )


@cache
def source_hash() -> str:
    """Hash of the package's sources, patterns included, and of the versions of torch, triton,
    sageattention and cuda-bindings."""
    import sage_inductor.patterns

    result = digest(source_files([Path(__file__).parent.parent, *map(Path, sage_inductor.patterns.__path__)]))
    for package in ("torch", "triton", "sageattention", "cuda-bindings"):
        result.update(f"{package}={version(package)};".encode())
    return result.hexdigest()
