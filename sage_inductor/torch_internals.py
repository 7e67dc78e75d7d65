"""Every name of torch that is not public API, in one place."""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import BuiltinFunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, cast

import torch

__all__ = [
    "CustomGraphPass",
    "FUSED_ENCODER_LAYER",
    "above_autograd",
    "allowed_sdpa_backends",
    "ambient_settings",
    "assert_async",
    "autocast_dtypes",
    "below_autograd",
    "bound_arguments",
    "bounds_of",
    "builtin_sdpa",
    "children_of",
    "compile_with_inductor",
    "called_by",
    "compiled_calls",
    "compiled_one_by_one",
    "configured_pre_grad_pass",
    "context_parallel_is_active",
    "context_parallel_is_balanced",
    "context_parallel_mesh",
    "default_store",
    "dispatches_itself",
    "draws_random_numbers",
    "dynamo_is_compiling",
    "ends_its_frame",
    "fake_mode_of",
    "first_fake",
    "float32_precision",
    "expression",
    "graph_breaks",
    "handle_dtensors",
    "hinted",
    "inductor_modes",
    "is_erased",
    "is_higher_order",
    "is_inside_sdpa_kernel",
    "is_operator",
    "is_overload",
    "is_replicated_implicitly",
    "is_always_true",
    "is_backed",
    "is_dtensor",
    "keep_gpu_busy",
    "listen_to_compiles",
    "listens_to_compiles",
    "number_of",
    "operator_name",
    "outside_fake_tensors",
    "outside_tracing",
    "past_autocast",
    "pre_grad_pass",
    "prefers_math",
    "ring_attention",
    "rings_are_on",
    "runs_eagerly",
    "shape_env_of",
    "storage_id",
    "surfaced",
    "tensors_of",
    "trace_artifact",
    "waited_for",
    "without_guards",
    "without_leaving_dynamo_entries",
    "without_limit_of_recompiles",
    "written_arguments",
]


def above_autograd() -> AbstractContextManager[Any]:
    """Inside, autograd records operators (where gradients are enabled) even if it was passed by already."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return cast(AbstractContextManager[Any], torch._C._SetExcludeDispatchKeyGuard(key, False))


def below_autograd() -> AbstractContextManager[Any]:
    """Inside, operators are dispatched past autograd."""
    return cast(AbstractContextManager[Any], torch._C._AutoDispatchBelowAutograd())


def runs_eagerly(arguments: Iterable[object]) -> bool:
    """Whether an operator called with `arguments` computes numbers now: no mode or transform records or fakes it, and its
    tensors are no subclass with a dispatch of its own, nor functionalised, nor to be negated before they are read."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for argument in arguments:  # a loop: generators would cost 1.5 us, a tenth of an operator's call
        if isinstance(argument, torch.Tensor) and (
            type(argument) not in _PLAIN or torch._is_functional_tensor(argument) or argument.is_neg()
        ):
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def compile_with_inductor(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    """What `torch.compile(backend="inductor", mode=..., options=...)` does with a graph."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    inductor = wrapper(mode, dict(options or {}), None)
    return cast(Callable[..., Any], inductor(graph_module, example_inputs))


@contextmanager
def compiled_one_by_one(modules: Sequence[torch.nn.Module], **compile_args: Any) -> Iterator[None]:
    """Inside, calls of these modules are compiled, as `module.compile(**compile_args)` does for good."""
    before = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module.compile(**compile_args)
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            module._compiled_call_impl = call


def compiled_calls(modules: Sequence[torch.nn.Module], **compile_args: Any) -> list[Callable[..., Any]]:
    """What `module.compile(**compile_args)` would let each module's calls be; the modules stay as they are."""
    with compiled_one_by_one(modules, **compile_args):
        return cast(list[Callable[..., Any]], [module._compiled_call_impl for module in modules])


@contextmanager
def called_by(
    modules: Sequence[torch.nn.Module], calls: Sequence[Callable[..., Any] | None]
) -> Iterator[None]:
    """Inside, calls of each module go to its own of `calls`, which `compiled_calls` gave; None: to no compiled code."""
    before = [module._compiled_call_impl for module in modules]
    try:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            module._compiled_call_impl = call


def inductor_modes() -> tuple[str, ...]:
    """What `torch.compile(mode=...)` takes: default, reduce-overhead, ..."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def configured_pre_grad_pass() -> Any:
    """The pass, or passes, that the user set in `torch._inductor.config.pre_grad_custom_pass`."""
    import torch._inductor.config as inductor_config

    return inductor_config.pre_grad_custom_pass


@contextmanager
def pre_grad_pass(graph_pass: Any) -> Iterator[None]:
    """Inductor runs `graph_pass` on every graph that is compiled inside."""
    import torch._inductor.config as inductor_config

    with inductor_config.patch(pre_grad_custom_pass=graph_pass):
        yield


def listen_to_compiles(starts: Callable[[str], None], ends: Callable[[str], None]) -> None:
    """Dynamo calls `starts` and `ends` around every compile, in the thread that compiles, with its number: "3/1" is the second
    compile of the fourth piece of code. `torch._dynamo.reset()` forgets them."""
    from torch._dynamo.callback import callback_handler

    def on_start(args: Any) -> None:
        starts(str(args.compile_id))

    on_start.listener = starts  # type: ignore[attr-defined]
    callback_handler.register_start_callback(on_start)
    callback_handler.register_end_callback(lambda args: ends(str(args.compile_id)))


def listens_to_compiles(starts: Callable[[str], None]) -> bool:
    """Whether Dynamo still calls `starts`."""
    from torch._dynamo.callback import callback_handler

    return any(getattr(callback, "listener", None) is starts for callback in callback_handler.start_callbacks)


def dynamo_is_compiling() -> bool:
    """Whether Dynamo is compiling on this thread: what is called around it is what it compiles."""
    from torch._guards import CompileContext

    return CompileContext.current_compile_id() is not None


def traced_for() -> Any:
    """The backend that Dynamo traces for on this thread, out of what torch.compile wraps it in; None where nothing is traced."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # no translator is at work
        return None
    wrapper: Any = torch._TorchCompileWrapper
    while True:
        if hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, wrapper):
            backend = backend.compiler_fn
        else:
            return backend


def passes_of(backend: Any) -> list[Any]:
    """The passes that Inductor, if `backend` is Inductor, runs before gradients are taken: its options' and the configured."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    if not isinstance(backend, wrapper):
        return []
    found = [backend.config.get("pre_grad_custom_pass"), configured_pre_grad_pass()]
    return [each for item in found for each in (item if isinstance(item, (list, tuple)) else [item])]


def ends_its_frame(graph_module: torch.fx.GraphModule | None) -> bool:
    """Whether this graph of Dynamo's goes on to where the function returns, and is not cut off by a break."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


def _builtin_sdpa() -> Callable[..., torch.Tensor]:
    names = (torch._C._nn, torch.nn.functional)
    found = (getattr(namespace, "scaled_dot_product_attention", None) for namespace in names)
    builtin = next((function for function in found if isinstance(function, BuiltinFunctionType)), None)
    # Where both names are taken, the operator that the builtin calls.
    return torch.ops.aten.scaled_dot_product_attention.default if builtin is None else builtin


# `F.scaled_dot_product_attention` as torch brings it. People put functions of their own in that name's place (SageAttention's
# users `sage_attention` itself, torch's context_parallel a wrapper), before or after this package is loaded; graphs
# hold the builtin all the same, since Dynamo traces through Python functions, and exact attention is what it computes.
builtin_sdpa: Callable[..., torch.Tensor] = _builtin_sdpa()


def graph_breaks() -> int:
    """How often Dynamo has broken a graph in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def allowed_sdpa_backends() -> tuple[str, ...]:
    """Names of the SDPA backends that are enabled now, e.g. ("CUDNN_ATTENTION", "FLASH_ATTENTION", ...)."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return tuple(backend.name for backend in _cur_sdpa_kernel_backends())


def prefers_math() -> bool:
    """Whether SDPA's math backend comes first, which `sdpa_kernel([MATH, ...], set_priority=True)` asks for."""
    from torch.nn.attention import SDPBackend

    return bool(_sdpa_priority()[:1] == [int(cast(Any, SDPBackend.MATH))])


def _sdpa_priority() -> list[int]:
    order = getattr(torch._C, "_get_sdp_priority_order", list)
    return [int(backend) for backend in order()]


def is_inside_sdpa_kernel() -> bool:
    """Whether a `with sdpa_kernel(...)` is open in this process.

    It sets the flags that `torch.backends.cuda.enable_math_sdp(False)` and its like set, and leaves nothing else behind that
    would tell it from them, but itself: a generator that waits to be resumed. To look for it takes as long as a collection of
    garbage."""
    import gc
    import inspect

    from torch.nn.attention import sdpa_kernel

    code = inspect.unwrap(sdpa_kernel).__code__
    return any(
        type(item) is GeneratorType
        and item.gi_code is code
        and inspect.getgeneratorstate(item) == inspect.GEN_SUSPENDED
        for item in gc.get_objects()
    )


def ambient_settings() -> dict[str, Any]:
    """What this process has told torch about attention: all that changes which kernel SDPA runs, how fast it is or what it
    computes, beside its inputs. JSON."""
    from torch import nn

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    flash = getattr(nn.attention, "current_flash_attention_impl", None)  # torch 2.11 may lack it
    return {
        "backends": sorted(allowed_sdpa_backends()),
        "priority": _sdpa_priority(),
        "flash": None if flash is None else str(flash()),
        "cudnn": {
            name: _setting(lambda name=name: getattr(cudnn, name))  # type: ignore[misc]
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
        "math": _setting(cuda.fp16_bf16_reduction_math_sdp_allowed),
        "float16": _setting(lambda: cuda.matmul.allow_fp16_reduced_precision_reduction),
        "bfloat16": _setting(lambda: cuda.matmul.allow_bf16_reduced_precision_reduction),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def number_of(value: Any) -> Any:
    """The number that a symbolic float is known to be, as where it was specialised to what it was traced with: dropout_p of
    SDPA is, always. `value` itself where there is none; adds no guard."""
    expression: Any = getattr(getattr(value, "node", None), "expr", None)
    return float(expression) if getattr(expression, "is_number", False) else value


def autocast_dtypes() -> dict[str, str]:
    """The dtype that autocast casts to, by type of device, where it is on."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return {device: str(torch.get_autocast_dtype(device)) for device in devices}


def float32_precision() -> str:
    """ "highest", "high" or "medium", or "mixed" where single operations have their own."""
    return _setting(torch.get_float32_matmul_precision)


def _setting(read: Callable[[], Any]) -> str:
    try:
        return str(read())
    except (
        RuntimeError
    ):  # set for single operations, by torch's newer interface, which the older one cannot say
        return "mixed"


@contextmanager
def outside_tracing() -> Iterator[None]:
    """Operations inside are carried out, and seen by no dispatch mode, whatever is being traced or counted around
    them; without gradients and autocast."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
        with cpu, cuda:
            yield


_tracing = threading.RLock()  # held by who looks at a model with Dynamo


def _new_lock() -> None:
    global _tracing
    _tracing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may hold the old one


@contextmanager
def without_leaving_dynamo_entries(backend: Callable[..., Any]) -> Iterator[None]:
    """What Dynamo compiles inside for `backend` is of no use to anybody later, and does not count against the limit of
    recompiles; the sizes that it met are forgotten: a later call of another size would be compiled for dynamic shapes
    at once. What others have compiled, before or meanwhile, stays. One thread at a time is inside, others wait.

    Entries are invalidated where they lie, as Dynamo itself does with those of objects that died. To take them away
    (`reset_code`) frees memory that another thread, which is just looking an entry up or compiling, goes on using: that
    is done where there is no other thread, and nobody else has compiled the code.
    """
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.pgo import get_code_state

    with _tracing:
        with compile_lock:
            sizes = copy.deepcopy(get_code_state())
        try:
            with without_limit_of_recompiles():
                yield
        finally:
            with compile_lock:
                get_code_state().clear()
                get_code_state().update(sizes)
            for code, entries in _compiled_code():
                own = [entry for entry in entries if _is_of(entry, backend)]
                for entry in own:
                    _invalidate(entry)
                if own and all(map(_is_spent, entries)) and len(sys._current_frames()) == 1:
                    reset_code(code)


def _compiled_code() -> list[tuple[Any, list[Any]]]:
    """Every code object that Dynamo has compiled, with its cache entries."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo import convert_frame

    codes = (reference() for reference in list(convert_frame.input_codes.seen))
    return [(code, _debug_get_cache_entry_list(code)) for code in codes if code is not None]


_SPENT = "looked at by sage_inductor"


class _Spent:
    """What no call of a model has among its arguments."""


def _is_of(entry: Any, backend: Callable[..., Any]) -> bool:
    wrapper = entry.backend
    return bool(getattr(wrapper, "compiler_fn", wrapper) == backend)


def _invalidate(entry: Any) -> None:
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    manager = entry.guard_manager
    spent = DeletedGuardManagerWrapper(_SPENT)
    # Entries count against the limit of recompiles unless they are for another object than the call at hand; no call has
    # a local variable of this name.
    spent.id_matched_objs = {_SPENT: weakref.ref(_Spent)}
    state = manager.extra_state
    if state is not None:
        manager.cache_entry = manager.extra_state = None
        state.invalidate(entry, spent)


def _is_spent(entry: Any) -> bool:
    return getattr(entry.guard_manager, "invalidation_reason", None) == _SPENT


def keep_gpu_busy(cycles: int) -> None:
    """Occupies the current stream for so many clock cycles, while the host queues work behind it: a million are about
    half a millisecond."""
    torch.cuda._sleep(cycles)


@contextmanager
def without_limit_of_recompiles() -> Iterator[None]:
    """Dynamo compiles code inside for as many shapes as it meets; at its limit (8) it would run it uncompiled."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        yield


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a structure of tuples, dicts and what else is registered with pytree, in order."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


_RINGS = "torch.distributed.tensor.experimental._context_parallel._attention"


def rings_are_on() -> bool:
    """Whether torch computes SDPA of DTensors whose sequence is sharded around a ring of ranks: inside its `context_parallel`,
    or after `_enable_context_parallel_dispatcher`, which the modules wrapped by `_ContextParallel` need."""
    module, dtensor = sys.modules.get(_RINGS), sys.modules.get("torch.distributed.tensor")
    if module is None or dtensor is None:
        return False
    handlers = getattr(dtensor.DTensor._op_dispatcher, "_custom_op_handlers", {})
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers


def context_parallel_is_active() -> bool:
    """Whether torch's `context_parallel` is active: it puts a function in SDPA's place that takes tensors for shards of the
    sequence, and tells DTensor to compute SDPA around a ring of ranks. (The newer way, by `_context_parallel_shard`, hands
    DTensors to modules that were wrapped for it, and leaves calls on plain tensors alone.)"""
    mode = getattr(sys.modules.get(_RINGS), "_dispatch_mode", None)
    return rings_are_on() and getattr(mode, "name", "MONKEY_PATCH") == "MONKEY_PATCH"


# Dynamo calls it while tracing, and takes what it returns for a constant.
context_parallel_is_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def waited_for(tensor: torch.Tensor) -> torch.Tensor:
    """What a functional collective gave, as a plain tensor; any other tensor as it is."""
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.wait()
    return tensor


def dispatches_itself(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of a subclass that carries out operators in its own way: a DTensor, a quantised tensor. It knows what
    it was taught, and what it holds may be other than its shape says. Parameters, and what torch itself traces with, are
    none; neither is a subclass that only overrides functions, which Dynamo traces through."""
    return _dispatches(type(tensor))


def _dispatches(kind: type[torch.Tensor]) -> bool:
    if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not issubclass(kind, (FakeTensor, FunctionalTensor))


_dispatches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a DTensor. Imports nothing: where torch.distributed.tensor was not imported there are none."""
    return _is_dtensor(type(tensor))


def _is_dtensor(kind: type) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


_is_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_replicated_implicitly() -> bool:
    """Whether plain tensors beside DTensors count as replicated (`implicit_replication()`)."""
    from torch.distributed.tensor import DTensor

    return bool(getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False))


def fake_mode_of(value: Any) -> Any:
    """The fake mode that `value` was traced in, of a DTensor that of its local tensor; None where there is none."""
    return getattr(getattr(value, "_local_tensor", value), "fake_mode", None)


def handle_dtensors(operators: Iterable[Any], handler: Callable[..., Any]) -> None:
    """DTensor calls `handler(operator, args, kwargs)` for each of `operators` that is called with DTensors, also inside
    `context_parallel`. torch 2.11 to 2.13 have the tables. Raises RuntimeError where this torch has others."""
    from torch.distributed.tensor import DTensor

    tables = [_known(DTensor._op_dispatcher, "_custom_op_handlers")]
    if _RINGS in sys.modules:
        # `context_parallel` puts a copy of this table, with its own handlers, in the place of the other, and takes it back.
        tables.append(_known(sys.modules[_RINGS], "existing_custom_ops"))
    for operator in operators:
        for table in tables:
            table[operator] = handler


def ring_attention(
    group: Any, attend: Callable[..., Any], query: Any, key: Any, value: Any, is_causal: bool
) -> Any:
    """torch's ring attention of this rank's shards `[batch, heads, seq, dim]` over `group`: `attend(query, key, value,
    is_causal=...)` gives the output and LSE of one part, torch sends keys and values around and merges. (output, LSE)."""
    return _known(_rings(), "_templated_ring_attention")(
        group, 2, attend, query, key, value, is_causal=is_causal
    )[:2]


def context_parallel_is_balanced() -> bool:
    """Whether each rank of a ring holds a chunk from the head of the sequence and one from its tail, as torch shards causal
    attention unless told otherwise."""
    return bool(_known(_known(_rings(), "_cp_options"), "enable_load_balance"))


def context_parallel_mesh() -> tuple[Any, int]:
    """(mesh, dim of the sequence) of the `context_parallel` that is active. Raises RuntimeError where this torch's is not as
    known (2.11 to 2.13): it puts a function in SDPA's place that has both in its closure."""
    replaced = _known(_rings(), "_replaced_functions")
    wrapper = next(reversed(replaced), None)  # the latest
    cells = getattr(wrapper, "__closure__", None) or ()
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    held = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    seq_dim = getattr(getattr(held.get("input_fn"), "__self__", None), "seq_dim", None)
    if "device_mesh" not in held or not isinstance(seq_dim, int):
        raise _other_torch("the function that context_parallel puts in SDPA's place")
    return held["device_mesh"], seq_dim


def _rings() -> Any:
    from importlib import import_module

    return import_module(_RINGS)


def _known(holder: Any, name: str) -> Any:
    found = getattr(holder, name, None)
    if found is None:
        raise _other_torch(f"{getattr(holder, '__name__', type(holder).__name__)}.{name}")
    return found


def _other_torch(what: str) -> RuntimeError:
    return RuntimeError(
        f"torch {torch.__version__} lacks {what}, by which sage_inductor computes attention of DTensors (known: torch 2.11 "
        "to 2.13)"
    )


def default_store() -> Any:
    """The store by which the ranks of this process's group found one another; None without a group of several processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed import distributed_c10d

    if torch.distributed.get_world_size() < 2 or "fake" in torch.distributed.get_backend():
        return None
    return distributed_c10d._get_default_store()


def storage_id(tensor: torch.Tensor) -> int | None:
    """The same for all tensors, fake ones too, that lie in one storage, while one of them exists; None where there is
    none to be had (a nested or sparse tensor)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


@contextmanager
def without_guards(fake_mode: Any) -> Iterator[None]:
    """Operations inside on traced tensors of `fake_mode` leave no guards on symbolic sizes. Nor are their results kept: the
    mode's cache would spare the same operations the guards that they need when the graph itself is traced."""
    caches, fake_mode.cache_enabled = fake_mode.cache_enabled, False
    try:
        with fake_mode, fake_mode.shape_env.suppress_guards():
            yield
    finally:
        fake_mode.cache_enabled = caches


def expression(size: torch.SymInt) -> Any:
    """What tracing knows `size` to be, as a sympy expression (or a number). Max(1, x), which strides of symbolic sizes hold,
    is x: they differ where a tensor is empty, and its strides say nothing."""
    from torch.utils._sympy.functions import Max

    found: Any = getattr(size.node, "expr", size)  # a jagged length has none, and compares by what it is
    if found is size or isinstance(found, int):
        return found
    if found.is_number:
        return int(found)
    if not found.has(Max):
        return found
    return found.replace(
        lambda part: isinstance(part, Max) and len(part.args) == 2 and 1 in part.args,
        lambda part: next(argument for argument in part.args if argument != 1),
    )


def is_always_true(condition: bool | torch.SymBool) -> bool:
    """Whether `condition` holds for all inputs that the trace serves, as far as is known; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


# Ends the call with an error where its first argument is False, without waiting for the device.
assert_async = torch._assert_async


def bounds_of(size: Any, shape_env: Any) -> tuple[int | None, int | None]:
    """The least and the most that a sympy expression of symbolic sizes can be; None where there is no bound. Adds no guard."""
    found = shape_env.bound_sympy(size)
    lower, upper = (int(end) if end.is_Integer else None for end in (found.lower, found.upper))
    return lower, upper


def shape_env_of(size: torch.SymInt) -> Any:
    """Where the bounds of symbolic sizes are known."""
    return size.node.shape_env


def is_backed(size: int | torch.SymInt) -> bool:
    """Whether the inputs of a graph tell `size`; a size that only the data tell is not."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, int) or not free_unbacked_symbols(size)


def hinted(size: torch.SymInt, instead: int) -> int:
    """`size` with the values that it was traced with, and `instead` for each that only the data tell; adds no guard."""
    found, shape_env = size.node.expr, size.node.shape_env
    # The first name is that of torch 2.13 and newer.
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    values = getattr(shape_env, name, {})
    return int(found.xreplace({symbol: values.get(symbol, instead) for symbol in found.free_symbols}))


def trace_artifact(name: str, make_json: Callable[[], str]) -> None:
    """Add JSON to the trace that TORCH_TRACE=folder asks for, where tlparse lists it with the graph's own artifacts."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=make_json)


def surfaced(error: Exception) -> Exception:
    """`error` in a form that leaves Dynamo as what it is. Dynamo wraps what a backend raises in
    BackendCompilerFailed, except for its own ShortenTraceback."""
    return _surfaced_type(type(error))(error)  # type: ignore[arg-type]


@cache
def _surfaced_type(error_type: type[Exception]) -> Callable[[Exception], Exception]:
    from torch._dynamo.exc import ShortenTraceback

    def __init__(self: Any, error: Exception) -> None:
        Exception.__init__(self, *error.args)
        self.__dict__.update(error.__dict__)
        self.first_useful_frame = None

    namespace = {
        "__init__": __init__,
        "__module__": error_type.__module__,
        "__reduce__": error_type.__reduce__,
    }
    return type(error_type.__name__, (error_type, ShortenTraceback), namespace)


def is_overload(target: Any) -> bool:
    """Whether `target` is an operator, such as `torch.ops.aten.view.default`."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether `target` is an operator that takes graphs, such as `torch.cond`'s."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_name(target: Any) -> str | None:
    """`aten::view` of an operator or of all of its overloads together; None of anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name) if isinstance(target, torch._ops.OpOverloadPacket) else None


def bound_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `operator`, such as `torch.ops.aten.view.default`, by their names, its defaults among them."""
    schema = getattr(operator, "default", operator)._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    names = [argument.name for argument in schema]
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def written_arguments(target: Any) -> tuple[tuple[int, str], ...] | None:
    """(position, name) of the arguments that an operator writes to; None of what has no schema that says so."""
    if isinstance(target, torch._ops.OpOverloadPacket) and "default" in target.overloads():
        target = target.default
    if not isinstance(target, torch._ops.OpOverload):
        return None
    arguments = enumerate(target._schema.arguments)
    return tuple(
        (position, argument.name)
        for position, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _draws(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def draws_random_numbers(target: Any, name: str) -> bool:
    """Whether `target`, which is called `name` where it is torch's own, is an operator that torch knows to draw random
    numbers, or is called like one."""
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    return _draws(name)


def is_erased(node: torch.fx.Node) -> bool:
    """Whether `node` is no longer in its graph."""
    return node._erased


def outside_fake_tensors() -> AbstractContextManager[Any]:
    """Operations inside are carried out, on tensors that have memory, while tracing around them has fake ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def is_operator(target: Any) -> bool:
    """Whether `target` is an operator, with or without graphs as arguments, and no function of Python's."""
    return is_overload(target) or is_higher_order(target)


def first_fake(values: Sequence[Any]) -> Any:
    """The first fake tensor among `values`; None where there is none."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value for value in values if isinstance(value, FakeTensor)), None)


def past_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which operators are called past the autocast rules for "cpu" or "cuda"."""
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


def children_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Submodules by their names; one that is held under two names comes twice, as in `named_children` it does not."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


# The fused operator of `nn.TransformerEncoderLayer`, as Dynamo and as torch.export write it.
FUSED_ENCODER_LAYER = (
    torch._transformer_encoder_layer_fwd,
    torch.ops.aten._transformer_encoder_layer_fwd.default,
)


if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass
else:

    def __getattr__(name: str) -> Any:
        """`CustomGraphPass`, whose import brings Inductor, and with it triton."""
        if name != "CustomGraphPass":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from torch._inductor.custom_graph_pass import CustomGraphPass

        return CustomGraphPass
