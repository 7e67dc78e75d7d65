"""The places of nodes in the model: their module's path, and all other names that it can be known by.

A graph that Dynamo made of one block has paths from that block on (`attn1`), and one made of a wrapped model has the wrappers
in its paths, too (`module.blocks.0.attn1`). The modules that are being called stand on Python's stack while Dynamo compiles.
The outermost of them that holds the block gives its full path, and the other modules that run the same code.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType

from torch import fx, nn

from sage_inductor.graph.origin import ROOT, module_path, module_stack
from sage_inductor.torch_internals.dynamo import dynamo_is_compiling, ends_its_frame
from sage_inductor.torch_internals.traced import children_of

# Attributes by which wrappers hold the module that they wrap: torch.compile, FSDP, activation checkpointing.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Classes of wrappers that hold it as `module`. Models use that name, too.
_HOLD_AS_MODULE = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "AveragedModel"})


@dataclass(frozen=True)
class Place:
    """One module of the model in which an attention stands."""

    path: str
    """From the outermost module that is known, without wrappers: "blocks.0.attn1"; "<root>" for that module itself."""
    names: tuple[str, ...] = field(default=(), repr=False)
    """The names that globs are compared with: the path and its dotted tails ("0.attn1", "attn1"), with wrappers and without,
    and each class on the way with the path below it ("Block.attn1", "Attention")."""
    compiled: str = field(default=ROOT, repr=False)
    """The path of the module that was compiled; this one is in it."""
    is_open: bool = field(default=False, repr=False)
    """Whether the path may be the end of a longer one: the module was compiled by itself, and no known module holds it."""


# The modules from the outermost one down to one of its submodules, each with the attribute that holds it.
Chain = tuple[tuple[str, nn.Module], ...]


class Places:
    """The places of the nodes of one graph and the graphs below it, while it is being compiled."""

    def __init__(self) -> None:
        called = called_modules() if dynamo_is_compiling() else []
        self._called = [module for module, _ in called]
        # The Python module of the code that calls the innermost: torch.nn where its forward function is called, its own where
        # that is resumed after a graph break.
        self._calling = called[0][1] if called else ""
        self._of_id: dict[int, list[Chain]] = {}
        self.outermost: nn.Module | None = None
        """The outermost module on the stack that holds the innermost one; None where no module is called."""
        if self._called:
            innermost = self._called[0]
            for module in reversed(self._called):
                if any(part is innermost for part in module.modules()):
                    self.outermost = module
                    break
        if self.outermost is not None:
            for chain in _chains(self.outermost):
                self._of_id.setdefault(id(chain[-1][1]), []).append(chain)

    def of(self, node: fx.Node, shared: fx.Graph | None = None) -> tuple[Place, ...]:
        """The place of `node`, followed by the other places where the same code may run. Dynamo keeps one graph for all modules
        of a class that its guards cannot tell apart, such as the blocks of a transformer compiled one by one. `shared`: a graph
        around `node` that several calls run, for such modules, too."""
        chain = self._chain(node)
        if chain is None:
            return (_place_by_name(node),)
        compiled = self._compiled(chain)
        held = compiled if shared is None else self._front(shared, chain, len(compiled))
        within = _path(chain[len(held) :])
        holders = [
            other
            for chains in self._of_id.values()
            for other in chains
            if type(other[-1][1]) is type(held[-1][1]) and other != held
        ]
        is_open = compiled[-1][1] is _unwrapped(self.outermost)
        places = [_place(chain, compiled, is_open)]
        for holder in holders:
            # The same module below the other holder, if it has one.
            below = next((c for c in self._below(holder) if _path(c[len(holder) :]) == within), None)
            if below is not None:
                places.append(_place(below, holder[: len(compiled)], is_open))
        by_path: dict[str, Place] = {}
        for place in places:
            by_path.setdefault(place.path, place)
        return tuple(by_path.values())

    def is_whole(self, graph: fx.Graph) -> bool:
        """Whether `graph` is all of the outermost module, and no graph break cut off a part before or after it."""
        return (
            self.outermost is not None
            and self._called[0] is _unwrapped(self.outermost)
            and self._calling.startswith("torch.nn.")
            and ends_its_frame(graph.owning_module)
        )

    def of_compiled(self) -> tuple[tuple[str, ...], ...]:
        """The names of the module that is being compiled, and of all that share its code. `of` depends on these and on the
        graph, and on nothing else."""
        if self.outermost is None:
            return ()
        innermost = _unwrapped(self._called[0])
        chains = [chain for chains in self._of_id.values() for chain in chains]
        return tuple(sorted({_names(chain) for chain in chains if type(chain[-1][1]) is type(innermost)}))

    @cached_property
    def all_names(self) -> frozenset[str]:
        """The names of all modules of the model, those without attention included."""
        return frozenset(
            name for chains in self._of_id.values() for chain in chains for name in _names(chain)
        )

    def _chain(self, node: fx.Node) -> Chain | None:
        """The way to the module that makes `node`; None where no module on the stack holds it."""
        stack = module_stack(node)
        if not stack:
            # The node is made by the compiled module itself, the innermost one that is being called.
            return None if not self._called else self._of_id[id(_unwrapped(self._called[0]))][0]
        chains = self._of_id.get(stack[-1].module_id or 0, [])
        # A module may be held in several places: the graph names the one.
        told = module_path(node)
        return max(chains, key=lambda chain: _common_tail(_path(chain), told), default=None)

    def _compiled(self, chain: Chain) -> Chain:
        """The front part of `chain`, up to the module that is being compiled: the innermost one that is called."""
        called = {id(module) for module in self._called}
        length = max(index for index, (_, module) in enumerate(chain) if id(module) in called) + 1
        while length < len(chain) and _is_wrapper(chain[length - 1][1], chain[length][0]):
            length += 1
        return chain[:length]

    def _front(self, shared: fx.Graph, chain: Chain, compiled: int) -> Chain:
        """The front part of `chain`, whose first `compiled` modules lead to the one that is compiled, that leads to the module whose
        calls `shared` holds: what its nodes have in common, but for those of the compiled module itself. All of `chain` where
        they have nothing in common."""
        length = len(chain)
        for other in (self._chain(node) for node in shared.nodes if node.op.startswith("call_")):
            if other is not None and len(other) > compiled:
                same = (one == another for one, another in zip(chain, other, strict=False))
                length = min(length, sum(itertools.takewhile(bool, same)))
        is_call = length > compiled and not isinstance(chain[length - 1][1], (nn.ModuleList, nn.ModuleDict))
        return chain[:length] if is_call else chain

    def _below(self, holder: Chain) -> Iterator[Chain]:
        for chain in _chains(holder[-1][1]):
            yield (*holder[:-1], (holder[-1][0], chain[0][1]), *chain[1:])


def called_modules() -> list[tuple[nn.Module, str]]:
    """The modules that are being called on this thread, the innermost first: the first arguments of the functions on the
    stack. Each comes with the Python module of the innermost such function. Functions of compilers, which call modules of
    their own, are passed over."""
    found: dict[int, tuple[nn.Module, str]] = {}
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        python_module = frame.f_globals.get("__name__", "")
        inside = python_module.startswith(("torch._dynamo.", "torch._inductor.", "sage_inductor.graph"))
        if code.co_argcount and not inside:
            first = _first_argument(frame)
            if isinstance(first, nn.Module) and not isinstance(first, fx.GraphModule):
                found.setdefault(id(first), (first, python_module))
        frame = frame.f_back  # type: ignore[assignment]
    return list(found.values())


def _first_argument(frame: FrameType) -> object:
    """The first argument of the function that `frame` runs."""
    code, variables = frame.f_code, frame.f_locals
    first = variables.get(code.co_varnames[0])
    # Before Python 3.13 that is a copy of all variables, which stays with the frame: what its function deletes later would live until
    # it returns, such as a model. Others who read it get it filled again, unless they hold it now: beside the frame, this function
    # and the call of getrefcount.
    if isinstance(variables, dict) and sys.getrefcount(variables) == 3:
        for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            variables.pop(name, None)
    return first


def tails(path: str) -> tuple[str, ...]:
    """ "blocks.0.attn", "0.attn", "attn"."""
    parts = path.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def _chains(root: nn.Module) -> Iterator[Chain]:
    """The ways from `root` to itself and to all of its submodules. A module that is held twice has two ways."""

    def below(chain: Chain) -> Iterator[Chain]:
        yield chain
        for name, child in children_of(chain[-1][1]):
            if all(child is not module for _, module in chain):
                yield from below((*chain, (name, child)))

    return below((("", root),))


def _is_wrapper(holder: nn.Module, name: str) -> bool:
    if name == "module":
        return any(cls.__name__ in _HOLD_AS_MODULE for cls in type(holder).__mro__)
    return name in _WRAPPED


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The module inside all wrappers of `module`; `module` itself where it is no wrapper."""
    while module is not None:
        inner = next((child for name, child in children_of(module) if _is_wrapper(module, name)), None)
        if inner is None:
            break
        module = inner
    return module


def _path(chain: Chain) -> str:
    """The names in `chain` joined by dots, without those of wrappers. Its first module has a name only if its holder was cut
    off."""
    holders = [None, *(module for _, module in chain)]
    return ".".join(
        name
        for holder, (name, _) in zip(holders, chain, strict=False)
        if name and not (name in _WRAPPED or (holder is not None and _is_wrapper(holder, name)))
    )


def _place(chain: Chain, compiled: Chain, is_open: bool) -> Place:
    names = _names(chain)
    if _path(chain) == _path(compiled):
        names = (*names, ROOT)
    return Place(_path(chain) or ROOT, names, _path(compiled) or ROOT, is_open)


def _names(chain: Chain) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for start in range(len(chain)):
        rest = chain[start + 1 :]
        tail = _path((("", chain[start][1]), *rest))
        names[tail] = names[".".join(name for name, _ in rest)] = None
        for cls in _class_names(type(chain[start][1])):
            names[f"{cls}.{tail}" if tail else cls] = None
    names.pop("", None)
    return tuple(names)


def _class_names(cls: type) -> list[str]:
    """The names of `cls` and of the module classes that it derives from: FSDP makes an `FSDPBlock` of a `Block`."""
    return [base.__name__ for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]


def _place_by_name(node: fx.Node) -> Place:
    """The place of `node` by the graph alone, where the model is no module on the stack or the graph was exported."""
    path = module_path(node)
    names = dict.fromkeys(tails(path))
    for entry in module_stack(node):
        rest = path.removeprefix(entry.path).lstrip(".") if entry.path != ROOT else path
        if path.startswith(entry.path) or entry.path == ROOT:
            rest = "" if rest == ROOT else rest
            names[f"{entry.class_name}.{rest}" if rest else entry.class_name] = None
    return Place(path, tuple(names), is_open=True)


def _common_tail(first: str, second: str) -> int:
    """How many components at the end two paths share."""
    pairs: Iterable[tuple[str, str]] = zip(
        reversed(first.split(".")), reversed(second.split(".")), strict=False
    )
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count
