"""The pass in the form that Inductor takes. Importing this module imports Inductor, and with it triton."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from sage_inductor.config import Config
from sage_inductor.walk import rewrite_graph

__all__ = ["SageAttentionPass", "rewrite_graph", "source_hash"]


class SageAttentionPass(CustomGraphPass):
    """For `options={"pre_grad_custom_pass": SageAttentionPass(config)}`.

    `then` is a pass that was configured already; it runs after ours. The uuid covers the options, the sources
    of this package and the versions of what it runs on, so that a compiled graph is cached, and never reused
    wrongly.
    """

    def __init__(self, config: Config | None = None, then: Any = None) -> None:
        self.config = Config() if config is None else config
        self.then = then

    def __call__(self, graph: fx.Graph) -> None:
        rewrite_graph(graph, self.config)
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> Any:
        if self.then is None:
            return ("sage_inductor", source_hash(), repr(self.config))
        uuid = getattr(self.then, "uuid", None)
        inner = uuid() if callable(uuid) else None
        # A pass that gives no uuid forbids caching, whatever stands before it.
        return None if inner is None else ("sage_inductor", source_hash(), repr(self.config), inner)


@cache
def source_hash() -> str:
    """Hash of the package's sources, patterns included, and of the versions of torch, triton and
    sageattention."""
    from importlib import metadata

    import sage_inductor.patterns

    digest = hashlib.sha256()
    roots = [Path(__file__).parent, *map(Path, sage_inductor.patterns.__path__)]
    files = sorted(
        {file.resolve() for root in roots for file in root.rglob("*") if file.suffix in (".py", ".cu")}
    )
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    for package in ("torch", "triton", "sageattention"):
        try:
            digest.update(f"{package}={metadata.version(package)};".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{package}=none;".encode())
    return digest.hexdigest()
