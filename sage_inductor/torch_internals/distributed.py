"""Several ranks: DTensors, torch's rings of ranks (`context_parallel`), collectives, the store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch


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


def ring_attention(
    group: Any, attend: Callable[..., Any], query: Any, key: Any, value: Any, is_causal: bool
) -> Any:
    """torch's ring attention of this rank's shards `[batch, heads, seq, dim]` over `group`: `attend(query, key, value,
    is_causal=...)` gives the output and LSE of one part, torch sends keys and values around and merges. (output, LSE)."""
    return _known(_rings(), "_templated_ring_attention")(
        group, 2, attend, query, key, value, is_causal=is_causal
    )[:2]


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


def sent_to_next(tensor: torch.Tensor, group_name: str, rank: int, ranks: int) -> torch.Tensor:
    """What the rank before this one sends of `tensor`, which has one dim, as long on every rank: this rank, number `rank` of `ranks`
    in the group, sends its own to the next. It is under way until `arrived` has been asked for it."""
    size = tensor.shape[0]
    received, sent = [0] * ranks, [0] * ranks
    received[(rank - 1) % ranks] = sent[(rank + 1) % ranks] = size
    coming: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(tensor, received, sent, group_name)
    return coming


def exchanged(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """What each rank sends of `tensor`, `[ranks, ...]` and contiguous, to this one: row i goes to rank i. Under way until `arrived`."""
    ranks = tensor.shape[0]
    each = [tensor.numel() // ranks] * ranks
    coming: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(
        tensor.view(-1), each, each, group_name
    )
    return coming.view(tensor.shape)


def arrived(coming: torch.Tensor) -> torch.Tensor:
    """What `sent_to_next` gave, when it is there: on a GPU, for what the current stream does from now on."""
    tensor: torch.Tensor = torch.ops._c10d_functional.wait_tensor(coming)
    return tensor


def waited_for(tensor: torch.Tensor) -> torch.Tensor:
    """What a functional collective gave, as a plain tensor; any other tensor as it is."""
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.wait()
    return tensor


def default_store() -> Any:
    """The store by which the ranks of this process's group found one another; None without a group of several processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed import distributed_c10d

    if torch.distributed.get_world_size() < 2 or "fake" in torch.distributed.get_backend():
        return None
    return distributed_c10d._get_default_store()
