"""Runs a random program as eager torch does, as plain torch.compile does, and rewritten, and says where they differ."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from random_programs import random_program
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sage_inductor import Config, rewrite_exported
from sage_inductor.measurement.ground_truth import DOCUMENTED
from sage_inductor.testing import RewritingBackend

# Rounding of a chain of operations in each dtype, beside attention's documented error.
EPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
# The documented errors are those of many normal numbers: of the few here one in a thousand is twice as far off, and the
# largest of them several times.
FEW = 2.5
LARGEST = 6.0


@dataclass(frozen=True)
class Outcome:
    text: str
    way: str
    difference: str | None
    counted: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What the calls of one program gave: outputs of each, gradients of each, and in how many graphs."""

    outputs: list[tuple[Tensor, ...]]
    gradients: list[list[Tensor | None]]
    aliases: list[list[bool]]
    graphs: int = 0


def way_of(seed: int) -> str:
    """Most programs are traced without Dynamo, which takes a second, rewritten and run eagerly; Inductor takes many."""
    drawn = random.Random(f"way {seed}").random()
    shares = {"inductor": 0.003, "aot": 0.01, "export": 0.015, "dynamo": 0.03}
    for way, share in shares.items():
        if drawn < share:
            return way
        drawn -= share
    return "traced"


def check(seed: int, way: str | None = None) -> Outcome:
    way = way or way_of(seed)
    text = random_program(seed)
    namespace: dict[str, Any] = {}
    exec(compile(text, f"<program {seed}>", "exec"), namespace)
    program, inputs, settings = namespace["program"], namespace["inputs"], namespace["SETTINGS"]
    if way == "export" and settings["grad"]:
        way = "dynamo"
    sizes = settings["sizes"]
    config = Config(kernel="reference", precision=settings["precision"], training=settings["training"])
    counted = [way, sizes]
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"), _flags(sizes):
        try:
            dtypes: list[torch.dtype] = []
            try:
                exact = _run(program, inputs, {**settings, "autocast": None}, exact=True)
                eager = _run(program, inputs, settings)
            except RuntimeError:  # a view of an output whose strides it does not fit
                return Outcome(text, way, None, (*counted, f"eager raises ({sizes})"))
            backend = RewritingBackend(config)
            try:
                traced = None if way != "traced" else _trace(program, inputs, settings)
                if way == "traced" and traced is None:
                    way = "dynamo"
                    counted[0] = way
                plain = eager if traced else _plain(program, inputs, settings, way)
            except Exception:  # not ours to mend
                return Outcome(text, way, None, (*counted, f"plain raises ({way}, {sizes})"))
            try:
                if traced is not None:
                    dtypes = traced.dtypes()
                    guards, ours = traced.rewritten(backend, inputs, settings)
                    if guards:
                        return Outcome(text, way, f"guards: {'; '.join(guards)}", tuple(counted))
                else:
                    ours = _ours(program, inputs, settings, way, backend, config)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                inner = next((line for line in lines[1:] if "Error" in line or "guard" in line), "")
                return Outcome(
                    text, way, f"raises {type(error).__name__}: {lines[0]} {inner}", tuple(counted)
                )
        finally:
            if way != "traced":
                torch.compiler.reset()
            logging.disable(logging.NOTSET)
    if backend.sites:
        counted.append("rewritten" if any(site.rewritten for site in backend.sites) else "seen")
    else:
        counted.append("nothing found")
    difference = _difference(exact, eager, plain, ours, settings, dtypes)
    return Outcome(text, way, difference, tuple(counted))


class _Tracer(fx.Tracer):
    """Sees the functions of sizes, too, that programs import by name."""

    def of(self, program: Any) -> fx.Graph:
        functions = {name: getattr(torch, name) for name in ("arange", "ones", "zeros")}

        def node_of(function: Any) -> Any:
            return lambda *args, **kwargs: self.create_proxy("call_function", function, args, kwargs)

        program.__globals__.update({name: node_of(function) for name, function in functions.items()})
        try:
            return self.trace(program)
        finally:
            program.__globals__.update(functions)


@dataclass(frozen=True)
class _Traced:
    """A graph as Dynamo would make it, its values fake ones of one mode."""

    graph_module: fx.GraphModule
    fakes: list[Any]
    shapes: ShapeEnv | None

    def rewritten(
        self, backend: RewritingBackend, inputs: Any, settings: dict[str, Any]
    ) -> tuple[list[str], Run]:
        """The guards that the rewriting adds, and what the calls of the rewritten graph give."""
        before = [] if self.shapes is None else [str(guard.expr) for guard in self.shapes.guards]
        with _autocast(settings), torch.set_grad_enabled(settings["grad"]):
            run = backend(self.graph_module, [])
        after = [] if self.shapes is None else [str(guard.expr) for guard in self.shapes.guards]
        return after[len(before) :], _run(run, inputs, settings, serves=self.serves)

    def dtypes(self) -> list[torch.dtype]:
        """Those of the outputs as they were traced. An einsum under autocast gives other ones for lengths of 1, which data
        alone tell: what is compiled goes by the trace, eager by the length."""
        (output,) = self.graph_module.graph.find_nodes(op="output")
        return [node.meta["example_value"].dtype for node in output.args[0]]

    def serves(self, arguments: tuple[Tensor, ...]) -> bool:
        return self.shapes is None or bool(
            self.shapes.evaluate_guards_for_args(self.fakes, arguments, ignore_static=False)
        )


def _trace(program: Any, inputs: Any, settings: dict[str, Any]) -> _Traced | None:
    """The graph of `program` at its first sizes, without Dynamo; None where fx cannot trace it."""
    try:
        graph = _Tracer().of(program)
    except (TypeError, ValueError, RuntimeError, fx.proxy.TraceError):
        return None
    symbolic = settings["sizes"] not in ("static", "unbacked")
    shapes = None if settings["sizes"] == "static" else ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False)
    arguments = inputs(0)
    if settings["grad"]:
        arguments = tuple(item.requires_grad_() if item.is_floating_point() else item for item in arguments)
    varying = _varying(inputs, settings) if symbolic else [[False] * item.dim() for item in arguments]
    fakes = [
        mode.from_tensor(
            item, source=ConstantSource(f"argument{at}"), symbolic_context=_context(dims) if shapes else None
        )
        for at, (item, dims) in enumerate(zip(arguments, varying, strict=True))
    ]
    graph_module = fx.GraphModule(torch.nn.Module(), graph)
    with mode, _autocast(settings), torch.set_grad_enabled(settings["grad"]):
        _Recorder(graph_module).run(*fakes)
    for node in list(graph.nodes):  # Dynamo writes what it knows as constants
        value = node.meta.get("example_value")
        if node.op in ("call_function", "call_method") and _is_constant(value):
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg(
                    (user.args, user.kwargs),
                    lambda item, node=node, value=value: value if item is node else item,
                )
            graph.erase_node(node)
    graph_module.recompile()
    return _Traced(graph_module, fakes, shapes)


def _varying(inputs: Any, settings: dict[str, Any]) -> list[list[bool]]:
    """Which dims of each argument get symbols: those that differ from call to call, or all."""
    calls = [inputs(step) for step in range(settings["calls"])]
    return [
        [
            settings["sizes"] == "dynamic" or len(set(sizes)) > 1
            for sizes in zip(*(item.shape for item in items), strict=True)
        ]
        for items in zip(*calls, strict=True)
    ]


def _context(dims: list[bool]) -> StatelessSymbolicContext[Any, Any]:
    return StatelessSymbolicContext([DimDynamic.DUCK if varies else DimDynamic.STATIC for varies in dims])


def _is_constant(value: Any) -> bool:
    if isinstance(value, torch.Size):
        return all(isinstance(size, int) for size in value)
    return isinstance(value, (bool, int, float, torch.dtype, torch.device))


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["example_value"] = value
        return value


@contextmanager
def _flags(sizes: str) -> Iterator[None]:
    with ExitStack() as stack:
        if sizes == "unbacked":
            patch = torch._dynamo.config.patch
            stack.enter_context(patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True))
        yield


def _plain(program: Any, inputs: Any, settings: dict[str, Any], way: str) -> Run:
    torch.compiler.reset()
    if way == "export":
        return _run(_exported(program, inputs, settings).module(), inputs, settings)
    counter = _Counter({"dynamo": "eager", "aot": "aot_eager", "inductor": "inductor"}[way])
    return _compiled(program, inputs, settings, counter)


def _ours(
    program: Any, inputs: Any, settings: dict[str, Any], way: str, rewriting: RewritingBackend, config: Config
) -> Run:
    torch.compiler.reset()
    if way == "export":
        rewritten = rewrite_exported(_exported(program, inputs, settings), config)
        if settings["sizes"] == "unbacked":
            rewritten.run_decompositions()
        return _run(rewritten.module(), inputs, settings)
    return _compiled(
        program,
        inputs,
        settings,
        _Counter({"dynamo": None, "aot": "aot_eager", "inductor": "inductor"}[way], rewriting),
    )


class _Counter:
    """A backend that counts graphs, rewrites them where `rewriting` is given, and has `then` compile them."""

    def __init__(self, then: str | None, rewriting: RewritingBackend | None = None) -> None:
        self.then, self.rewriting, self.graphs = then, rewriting, 0

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        if self.rewriting is not None:
            run = self.rewriting(graph_module, example_inputs)
            if self.then is None:
                return run
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(self.then or "eager")(graph_module, example_inputs)


def _compiled(program: Any, inputs: Any, settings: dict[str, Any], counter: _Counter) -> Run:
    dynamic = {"dynamic": True, "static": False}.get(settings["sizes"])
    found = _run(torch.compile(program, backend=counter, dynamic=dynamic), inputs, settings)
    return Run(found.outputs, found.gradients, found.aliases, counter.graphs)


def _exported(program: Any, inputs: Any, settings: dict[str, Any]) -> torch.export.ExportedProgram:
    class Module(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Any:
            return program(*arguments)

    arguments = inputs(0)
    shapes = None
    if settings["calls"] > 1:
        shapes = (tuple(dict.fromkeys(range(item.dim()), torch.export.Dim.AUTO) for item in arguments),)
    with torch.no_grad(), _autocast(settings):
        return torch.export.export(Module(), arguments, dynamic_shapes=shapes)


def _autocast(settings: dict[str, Any]) -> Any:
    name = settings["autocast"]
    return nullcontext() if name is None else torch.autocast("cpu", getattr(torch, name))


def _run(
    program: Any,
    inputs: Any,
    settings: dict[str, Any],
    exact: bool = False,
    serves: Callable[[tuple[Tensor, ...]], bool] = lambda arguments: True,
) -> Run:
    """What the calls give that the program `serves`, up to the first that it does not."""
    found = Run([], [], [])
    for step in range(settings["calls"]):
        arguments = inputs(step)
        if not serves(arguments):
            break
        if exact:
            arguments = tuple(item.double() if item.is_floating_point() else item for item in arguments)
        leaves = [item for item in arguments if item.is_floating_point()] if settings["grad"] else []
        for leaf in leaves:
            leaf.requires_grad_()
        if settings["sizes"] == "marked":
            for item in arguments:
                for dim, size in enumerate(item.shape):
                    if size > 1 and item.stride(dim) > 0:
                        torch._dynamo.maybe_mark_dynamic(item, dim)
        with torch.set_grad_enabled(settings["grad"]), _autocast(settings):
            outputs = tuple(program(*arguments))
        gradients: list[Tensor | None] = []
        if settings["grad"]:
            total = sum(
                (output.double() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
                for output in outputs
                if output.requires_grad
            )
            gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
        found.outputs.append(tuple(output.detach() for output in outputs))
        found.gradients.append(gradients)
        tensors = [*outputs, *arguments]
        found.aliases.append([_shares(a, b) for i, a in enumerate(outputs) for b in tensors[i + 1 :]])
    return found


def _shares(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _difference(
    exact: Run, eager: Run, plain: Run, ours: Run, settings: dict[str, Any], traced: list[torch.dtype]
) -> str | None:
    """The first difference. What plain torch.compile does otherwise than eager, ours may do likewise."""
    for step, outputs in enumerate(eager.outputs[: len(ours.outputs)]):
        for at, expected in enumerate(outputs):
            actual, compiled, true = (run.outputs[step][at] for run in (ours, plain, exact))
            place = f"output {at} of call {step}"
            if actual.dtype not in (expected.dtype, compiled.dtype, *traced[at : at + 1]):
                return f"dtype of {place}: {actual.dtype}, eager {expected.dtype}"
            if actual.shape != expected.shape:
                return f"shape of {place}: {tuple(actual.shape)}, eager {tuple(expected.shape)}"
            if _strides(actual) not in (_strides(expected), _strides(compiled)):
                return f"strides of {place}: {actual.stride()}, eager {expected.stride()}, plain {compiled.stride()}"
            if wrong := _wrong(actual, compiled, true, settings):
                return f"values of {place}: {wrong}"
        if ours.aliases[step] not in (eager.aliases[step], plain.aliases[step]):
            return f"aliases of call {step}: {ours.aliases[step]}, eager {eager.aliases[step]}"
        for at, gradient in enumerate(eager.gradients[step]):
            actual_gradient, true_gradient = ours.gradients[step][at], exact.gradients[step][at]
            compiled_gradient = plain.gradients[step][at]
            if (gradient is None) is not (actual_gradient is None):
                return f"gradient {at}: {actual_gradient is not None}, eager {gradient is not None}"
            if actual_gradient is None or true_gradient is None or compiled_gradient is None:
                continue
            if wrong := _wrong(actual_gradient, compiled_gradient, true_gradient, settings):
                return f"gradient {at}: {wrong}"
    if ours.graphs > plain.graphs:
        return f"graphs: {ours.graphs}, plain {plain.graphs}"
    return None


def _strides(tensor: Tensor) -> list[int]:
    if tensor.numel() == 0:
        return []
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _wrong(actual: Tensor, plain: Tensor, true: Tensor, settings: dict[str, Any]) -> str | None:
    """Where `actual` is further from the truth than plain torch.compile's rounding and attention's documented error."""
    if true.numel() == 0:
        return None
    actual, plain, true = actual.double(), plain.double(), true.double()
    if not torch.equal(actual.isfinite(), true.isfinite()) and not torch.equal(
        actual.isfinite(), plain.isfinite()
    ):
        return "not finite"
    size, largest = float(true.norm()), float(true.abs().max())
    if size < 1e-3 * true.numel() ** 0.5:  # what is left of numbers that cancel
        return None
    allowed = DOCUMENTED[settings["precision"]]
    error, plain_error = float((actual - true).norm()) / size, float((plain - true).norm()) / size
    worst, plain_worst = (float((item - true).abs().max()) / largest for item in (actual, plain))
    if error > FEW * allowed + 2 * plain_error:
        return f"relative L2 {error:.4f}, plain {plain_error:.4f}, allowed {FEW * allowed:.3f} more"
    if worst > LARGEST * allowed + 2 * plain_worst:
        return f"max error {worst:.4f}, plain {plain_worst:.4f}, allowed {LARGEST * allowed:.3f} more"
    return None
