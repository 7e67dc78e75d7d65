"""Which versions of a library an integration supports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, first: str, below: str) -> None:
    """Raise ImportError unless `package` is installed in a version from `first` on and below `below`."""
    supported = f"{package} {first} and newer, below {below}"
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed (supported: {supported})", name=package) from None
    if not _numbers(first) <= _numbers(installed) < _numbers(below):
        raise ImportError(f"{package} {installed} is not supported (supported: {supported})", name=package)


def _numbers(text: str) -> tuple[int, ...]:
    """`(5, 23)` for "5.23.0.dev0"."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
