"""The CUDA driver, through cuda-bindings: loading a compiled kernel, tensor maps, the launch."""

# cuda-bindings has no type information.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cuda.bindings import driver

_SWIZZLES = {
    32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
_TYPES = {
    1: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    2: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
}
_ONES = [driver.cuuint32_t(1), driver.cuuint32_t(1)]


def checked(result: tuple[Any, ...]) -> Any:
    """The value that a driver call returned. Raises RuntimeError with the driver's name of an error."""
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {result[0].name}")
    return result[1] if len(result) > 1 else None


def load(cubin: bytes, shared_bytes: dict[str, int]) -> tuple[Any, ...]:
    """The kernels of `cubin` named in `shared_bytes`, `{name: bytes}`, loaded in the current context. Each may use so much
    dynamic shared memory. Raises RuntimeError where the driver refuses."""
    module = checked(driver.cuModuleLoadData(cubin))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    functions = []
    for name, size in shared_bytes.items():
        function = checked(driver.cuModuleGetFunction(module, name.encode()))
        checked(driver.cuFuncSetAttribute(function, attribute, size))
        functions.append(function)
    return tuple(functions)


def tensor_map(
    address: int, element: int, rows: int, columns: int, box_rows: int, box_columns: int, swizzle: int
) -> Any:
    """A tensor map: TMA reads boxes `[box_rows, box_columns]` of the row-major matrix `[rows, columns]` at `address`, whose
    elements have `element` bytes, 1 or 2. Outside of the matrix it reads zeros. `swizzle`: 32, 64 or 128 bytes."""
    return checked(
        driver.cuTensorMapEncodeTiled(
            _TYPES[element],
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(columns * element)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            _ONES,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLES[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def launch(
    function: Any,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: int,
    overlap: bool = False,
) -> None:
    """Launch `function` on `grid` blocks. `arguments` is the address of an array of pointers to its arguments.

    With `overlap` the kernel may start before the preceding one on the stream has ended (programmatic dependent launch). It
    must then wait for that one itself.
    """
    if overlap:
        config = _overlapping(grid, threads, shared_bytes, stream)
        checked(driver.cuLaunchKernelEx(config, function, arguments, 0))
    else:
        checked(driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared_bytes, stream, arguments, 0))


@lru_cache(maxsize=1024)
def _overlapping(grid: tuple[int, int], threads: int, shared_bytes: int, stream: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    config.attrs = [attribute]
    config.numAttrs = 1
    return config
