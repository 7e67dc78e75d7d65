"""What is installed: versions of packages and of the NVIDIA driver."""

from __future__ import annotations

import contextlib
import ctypes
import re
from importlib import metadata
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def package_version(package: str) -> str | None:
    """Of a package by its name on PyPI, as its metadata says; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Of the NVIDIA kernel module, such as 570.86.15, which Linux tells in a file ("NVIDIA UNIX x86_64 Kernel Module
    570.86.15 ..."); None where there is no such file, as on WSL, or no number in it."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group() if found else None


def cuda_driver_api() -> int:
    """The newest CUDA version that the installed driver serves, 13000 for 13.0; 0 where it does not say."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):  # no driver; not NVIDIA's
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value
