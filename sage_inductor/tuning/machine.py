"""The machine that measured times hold for: the device, its driver, and every piece of software that takes part."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from sage_inductor.kernels.installed import cuda_driver_api, driver_version, package_version

SOURCE_SUFFIXES = (".py", ".cu", ".cuh")


@dataclass(frozen=True)
class Machine:
    """A device and the software on it. Times measured on one `Machine` say nothing about another."""

    device: str
    driver: str
    torch: str
    cudnn: str
    triton: str
    sageattention: str
    kernels: str  # hash of their sources, and of those that measure

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


def machine(device: torch.device) -> Machine:
    """The `Machine` of `device`, which must exist."""
    if device.type != "cuda":
        return _machine(device.type, None)
    return _machine("cuda", torch.cuda.current_device() if device.index is None else device.index)


def machines() -> list[Machine]:
    """The `Machine` of every GPU of this process; equal GPUs give one. Empty before CUDA is in use: asking would initialise
    it."""
    if not torch.cuda.is_initialized():
        return []
    found = (machine(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return list(dict.fromkeys(found))


@cache
def _machine(device_type: str, index: int | None) -> Machine:
    package = Path(__file__).parent.parent
    measuring = ("kernels", "operators", "measurement", "torch_internals", "tuning")
    sources = source_files(package / name for name in measuring)
    is_cuda = device_type == "cuda"
    return Machine(
        device=_gpu(index) if is_cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        driver=_driver() if is_cuda else "none",
        torch=f"{torch.__version__}, CUDA {torch.version.cuda}" if is_cuda else torch.__version__,
        cudnn=str(torch.backends.cudnn.version()) if is_cuda else "none",
        triton=version("triton"),
        sageattention=version("sageattention"),
        kernels=digest(sources).hexdigest()[:16],
    )


def _gpu(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    # Slices of a GPU (MIG) and its variants share a name.
    return f"{properties.name}, {properties.multi_processor_count} SMs"


def _driver() -> str:
    # Where the kernel module tells no version, as on WSL, the API's version changes with the driver as a rule.
    return f"{driver_version() or '?'}, CUDA {cuda_driver_api()}"


def version(package: str) -> str:
    """The version of an installed package; "none" for one that is not installed."""
    return package_version(package) or "none"


def source_files(folders: Iterable[Path]) -> list[Path]:
    """Every source file below `folders`, sorted; the archive that holds a folder which is in one (`zipimport`)."""
    found: set[Path] = set()
    for root in folders:
        found.update(file.resolve() for file in root.rglob("*") if file.suffix in SOURCE_SUFFIXES)
        if not root.is_dir():
            found.update(parent for parent in root.parents if parent.is_file())
    return sorted(found)


def digest(files: Iterable[Path]) -> hashlib._Hash:
    """sha256 of the names and contents of `files`."""
    result = hashlib.sha256()
    for file in files:
        result.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return result
