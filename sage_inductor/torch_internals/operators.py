"""What an operator is, and what its schema says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch


def is_overload(target: Any) -> bool:
    """Whether `target` is an operator, such as `torch.ops.aten.view.default`."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether `target` is an operator that takes graphs, such as `torch.cond`'s."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_operator(target: Any) -> bool:
    """Whether `target` is an operator, with or without graphs as arguments, and no function of Python's."""
    return is_overload(target) or is_higher_order(target)


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


def draws_random_numbers(target: Any, name: str) -> bool:
    """Whether `target`, which is called `name` where it is torch's own, is an operator that torch knows to draw random
    numbers, or is called like one."""
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    return _draws(name)


@cache
def _draws(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


# Ends the call with an error where its first argument is False, without waiting for the device.
assert_async = torch._assert_async


# The fused operator of `nn.TransformerEncoderLayer`, as Dynamo and as torch.export write it.
FUSED_ENCODER_LAYER = (
    torch._transformer_encoder_layer_fwd,
    torch.ops.aten._transformer_encoder_layer_fwd.default,
)
