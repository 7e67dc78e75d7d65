"""Copies into the memory of other ranks, and flags between ranks, as work of CUDA streams.

Copies are made by the copy engines, and a stream that waits for a flag waits in the GPU's front end: neither needs a multiprocessor.
NCCL's kernels do, and attention leaves them none until it ends.

A flag is an int32, 0 or 1. Who waits for one takes it back, so that a captured CUDA graph finds everything as it was.
"""

# cuda-bindings has no type information.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from collections.abc import Sequence

import torch
from cuda.bindings import driver
from torch import Tensor

from sage_inductor.kernels.hopper.driver import checked


class StreamQueue:
    """A queue that is a CUDA stream.

    memory, flags: the addresses, here, of the memory and of the flags of each rank. stream: None is whichever is the current one.
    """

    def __init__(
        self, rank: int, memory: Sequence[int], flags: Sequence[int], stream: torch.cuda.Stream | None = None
    ) -> None:
        self.rank, self.memory, self.flags, self._stream = rank, memory, flags, stream

    @property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream() if self._stream is None else self._stream

    def after(self, other: StreamQueue) -> None:
        self.stream.wait_stream(other.stream)

    def copy(self, peer: int, at: int, pitch: int, source: Tensor) -> None:
        rows, columns = source.shape
        width, stride = columns * source.element_size(), source.stride(0) * source.element_size()
        assert source.stride(1) == 1
        target = self.memory[peer] + at
        if rows == 1 or pitch == stride == width:
            checked(
                driver.cuMemcpyDtoDAsync(target, source.data_ptr(), rows * width, self.stream.cuda_stream)
            )
            return
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        copy.srcDevice, copy.srcPitch = source.data_ptr(), stride
        copy.dstDevice, copy.dstPitch = target, pitch
        copy.WidthInBytes, copy.Height = width, rows
        checked(driver.cuMemcpy2DAsync(copy, self.stream.cuda_stream))

    def signal(self, peer: int, flag: int) -> None:
        self._write(peer, flag, 1)

    def wait(self, flag: int) -> None:
        equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        address = self.flags[self.rank] + 4 * flag
        checked(driver.cuStreamWaitValue32(self.stream.cuda_stream, address, 1, int(equal)))
        self._write(self.rank, flag, 0)

    def _write(self, rank: int, flag: int, value: int) -> None:
        # By default everything before it on the stream is visible to all of the system first.
        checked(driver.cuStreamWriteValue32(self.stream.cuda_stream, self.flags[rank] + 4 * flag, value, 0))
