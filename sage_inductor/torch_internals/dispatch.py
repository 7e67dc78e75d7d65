"""How operators are dispatched: past autograd, autocast and tracing; tensors that do it their own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.autograd import forward_ad


def above_autograd() -> AbstractContextManager[Any]:
    """Inside, autograd records operators (where gradients are enabled) even if it was passed by already."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return cast(AbstractContextManager[Any], torch._C._SetExcludeDispatchKeyGuard(key, False))


def below_autograd() -> AbstractContextManager[Any]:
    """Inside, operators are dispatched past autograd."""
    return cast(AbstractContextManager[Any], torch._C._AutoDispatchBelowAutograd())


def past_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which operators are called past the autocast rules for "cpu" or "cuda"."""
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


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


def in_forward_ad() -> bool:
    """Whether a level of forward-mode AD is open, by `dual_level()` or `torch.func.jvp`. Tensors may carry tangents then, also under
    `torch.no_grad()`. Not while Dynamo traces: it records operators, which look again when they run."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode AD carries a tangent along with `tensor`."""
    return in_forward_ad() and forward_ad.unpack_dual(tensor).tangent is not None


@contextmanager
def outside_tracing() -> Iterator[None]:
    """Operations inside are carried out, and seen by no dispatch mode, whatever is being traced or counted around
    them; without gradients and autocast."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
        with cpu, cuda:
            yield


def outside_fake_tensors() -> AbstractContextManager[Any]:
    """Operations inside are carried out, on tensors that have memory, while tracing around them has fake ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


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
