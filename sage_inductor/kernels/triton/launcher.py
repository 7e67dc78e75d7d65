"""Launches of Triton kernels that are prepared once: only addresses differ from one launch to the next.

At each launch Triton itself looks at each argument, asks the driver about each tensor and encodes each tensor descriptor. That
takes longer than a small attention call on the GPU. Here it is known on which facts the compiled kernel depends, so the
compiled kernel is kept, and launched directly.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .internals import DirectLaunch, direct_launch, has_hooks


class Part(NamedTuple):
    """A part of a workspace: `elements` of `dtype` from byte `offset` on. Of K and V that were quantised before, it is a part of
    their buffer (`packed`)."""

    offset: int
    elements: int
    dtype: torch.dtype
    of_packed: bool = False

    def of(self, workspace: Tensor, packed: Tensor | None = None) -> Tensor:
        memory = packed if self.of_packed and packed is not None else workspace
        return memory[self.offset : self.offset + self.elements * self.dtype.itemsize].view(self.dtype)

    def at(self, workspace: int, packed: int) -> int:
        """Its address, from those of the workspace and of the buffer."""
        return (packed if self.of_packed else workspace) + self.offset

    def as_bytes(self) -> Part:
        return Part(self.offset, self.elements * self.dtype.itemsize, torch.int8)


class Tile(NamedTuple):
    """A part of a workspace as a matrix `[rows, columns]`. TMA reads it in the blocks of `template`."""

    part: Part
    template: TensorDescriptor
    rows: int
    columns: int

    def of(self, workspace: Tensor, packed: Tensor | None = None) -> TensorDescriptor:
        return self.over(self.part.of(workspace, packed))

    def over(self, base: Any) -> TensorDescriptor:
        """A descriptor over `base`. It is a copy of the template, because the checks of its constructor take microseconds."""
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(
            self.template.__dict__, base=base, shape=[self.rows, self.columns], strides=[self.columns, 1]
        )
        return descriptor


class Launch:
    """`kernel(*callers, *own, *numbers, *variant, **constants)` on `programs` programs of device `index`.

    `callers` are the caller's tensors, which come with each launch; `dtypes` has their dtypes, None for one that is missing.
    `own` are parts of the workspace. The kernel is specialised on the strides in `specialized`, and on no other number.
    `constants`, the kernel's last arguments and its options, must live as long as the process. Where `direct` is False,
    each launch is Triton's own: under its interpreter, and for numbers beyond 32 bits, which change the compiled kernel.
    """

    __slots__ = (
        "binaries", "constants", "direct", "dtypes", "index", "kernel", "numbers", "own", "programs", "specialized",
        "variant",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        programs: int,
        *,
        dtypes: tuple[torch.dtype | None, ...],
        own: tuple[Part | Tile | None, ...],
        numbers: tuple[float, ...],
        specialized: tuple[int, ...],
        variant: tuple[Any, ...],
        constants: dict[str, Any],
        index: int | None,
        direct: bool,
    ) -> None:
        self.kernel, self.programs, self.index, self.direct = kernel, programs, index, direct
        self.dtypes, self.own, self.numbers, self.specialized = dtypes, own, numbers, specialized
        self.variant, self.constants = variant, constants
        self.binaries: dict[tuple[bool, ...], _Binary] = {}  # by which of the callers' tensors are aligned

    def __call__(
        self, stream: int, callers: tuple[Tensor | None, ...], workspace: Tensor, packed: Tensor | None = None
    ) -> None:
        """Launch on `stream`. It must be the current stream of device `index`, which must be the current device. `packed` has
        the parts that are not of the workspace."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in callers]
        aligned = tuple([address & 15 == 0 for address in addresses])
        binary = self.binaries.get(aligned) or self._known(aligned)
        if binary is None or has_hooks():
            compiled = self._launch_as_triton_does(callers, workspace, packed)
            is_new = self.direct and binary is None
            if is_new and compiled is not None:  # None: a hook of Triton's has prevented it
                _binaries[self._key(aligned)] = _Binary.of(compiled, self)
            return
        also = 0 if packed is None else packed.data_ptr()
        programs, rest = self.programs, _rest(self, binary, workspace.data_ptr(), also)
        direct = binary.direct
        if direct is None:
            binary.compiled[(programs, 1, 1)](*addresses, *rest, stream=stream)
        else:
            function, metadata, hooks = direct.function, direct.metadata, (None, None, None)
            direct.run(programs, 1, 1, stream, function, metadata, *hooks, *addresses, *rest)

    def _launch_as_triton_does(
        self, callers: tuple[Tensor | None, ...], workspace: Tensor, packed: Tensor | None
    ) -> Any:
        own = [None if part is None else part.of(workspace, packed) for part in self.own]
        return self.kernel[(self.programs,)](*callers, *own, *self.numbers, *self.variant, **self.constants)

    def _known(self, aligned: tuple[bool, ...]) -> _Binary | None:
        """The compiled kernel that a launch of this or other lengths has left; None where there was none."""
        binary = _binaries.get(self._key(aligned)) if self.direct else None
        if binary is not None:
            self.binaries[aligned] = binary
        return binary

    def _key(self, aligned: tuple[bool, ...]) -> tuple[Any, ...]:
        """All that the compiled kernel depends on. The id of `constants` stands for kernel and plan: each pair of those has its
        own."""
        specialized = tuple([_specialization(number) for number in self.specialized])
        return id(self.constants), self.index, self.variant, self.dtypes, aligned, specialized


@dataclass(frozen=True, eq=False)
class _Binary:
    """A compiled kernel. `direct` has what Triton itself launches it with; None where this version of Triton is built
    differently."""

    compiled: Any
    constants: dict[str, Any]  # kept alive: keys hold its id
    tail: tuple[Any, ...]  # the values of the constexprs in it
    direct: DirectLaunch | None

    @classmethod
    def of(cls, compiled: Any, launch: Launch) -> _Binary:
        first = len(launch.dtypes) + len(launch.own) + len(launch.numbers) + len(launch.variant)
        tail = tuple([launch.constants[name] for name in launch.kernel.arg_names[first:]])
        return cls(compiled, launch.constants, tail, direct_launch(compiled))


_binaries: dict[tuple[Any, ...], _Binary] = {}


@lru_cache(maxsize=2048)
def _rest(launch: Launch, binary: _Binary, address: int, packed: int) -> tuple[Any, ...]:
    """The arguments after the callers', with the workspace at `address`, and K and V that were quantised before at `packed`.

    They are kept because torch's allocator gives the same addresses again and again. They hold nothing but numbers, so they
    may outlive the memory.
    """
    own: list[Any] = []
    tiles = 0
    for part in launch.own:
        if isinstance(part, Tile):
            descriptor = part.over(_Address(part.part.at(address, packed)))
            if binary.direct is None or binary.direct.encode is None:
                own.append(descriptor)
            else:
                own += binary.direct.encode(descriptor, binary.direct.descriptors[tiles])
            tiles += 1
        else:
            own.append(None if part is None else part.at(address, packed))
    return *own, *launch.numbers, *launch.variant, *binary.tail


class _Address(NamedTuple):
    """Stands for a tensor while a descriptor is encoded, which asks for its address only."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _specialization(number: int) -> int:
    """How Triton specialises on an integer argument: 1 for 1 itself, 16 for a multiple of 16, 0 for any other."""
    return 1 if number == 1 else 16 if number % 16 == 0 else 0
