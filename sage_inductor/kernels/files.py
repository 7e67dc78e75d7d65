"""Files: read only where they are files of a reasonable size, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Callable
from os import PathLike
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

PathName: TypeAlias = "str | PathLike[str]"
P = ParamSpec("P")
R = TypeVar("R")


def naming_the_path(function: Callable[Concatenate[PathName, P], R]) -> Callable[Concatenate[PathName, P], R]:
    """Errors of `function` name the path that it was given: Python's about names that no file can have name none, and others the file
    beside it that is written first. Raises TypeError for what is no path; a number would be a file that is open."""

    @functools.wraps(function)
    def named(path: PathName, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(path, (str, bytes, PathLike)):
            raise TypeError(f"path={path!r} (valid: a str, an os.PathLike)")
        try:
            return function(os.fsdecode(path), *args, **kwargs)
        except OSError as error:
            if error.filename is not None:
                error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2  # set to None it would be printed
            raise
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} names no file: {error}") from None

    return named


@naming_the_path
def read_regular(path: PathName, most: int) -> bytes:
    """The content of a regular file of up to `most` bytes. OSError for another one: a pipe would be waited for, a device
    read for ever. ValueError for a name that no file can have."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        return read_descriptor(descriptor, path, most)
    finally:
        os.close(descriptor)


def read_descriptor(descriptor: int, path: PathName, most: int) -> bytes:
    """`read_regular` of a file that is open."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    pieces, length = [], 0
    while piece := os.read(descriptor, min(1 << 20, most + 1 - length)):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise OSError(errno.EFBIG, f"is larger than {most} bytes", str(path))
    return b"".join(pieces)


@naming_the_path
def replace_file(path: PathName, content: bytes, mode: int = 0o666, *, sync: bool = False) -> None:
    """Write `content` beside `path`, then put it in its place. A full disk, an error or a reader meets the old file, whole.

    The target of a link is replaced, not the link. An existing file keeps its permissions; a new one gets `mode` as the
    umask leaves it. A device or pipe is written to. With `sync` the content is on the disk before the name is.

    Raises OSError, and ValueError for a name that no file can have.
    """
    status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        _write_to(path, content)
        return
    target = os.path.realpath(path)
    temporary = _beside(target)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            if status is not None:
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
            _write_all(descriptor, content)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@naming_the_path
def check_target(path: PathName) -> None:
    """Raises what `replace_file` would raise, as far as can be known before there is something to write."""
    status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return  # to open a pipe and close it again would be an end of file to its reader
    target = os.path.realpath(path)
    if not os.path.basename(os.fspath(path)):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = _beside(target)
    with contextlib.suppress(
        FileNotFoundError
    ):  # which says of a missing folder what the next line says better
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(temporary)
    if status is None:
        # The name itself: it may be too long, or one that the file system does not take.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(target)


@naming_the_path
def is_regular_target(path: PathName) -> bool:
    """Whether `path` is a file, or the name of one that is not there yet; no device or pipe."""
    status = _status(path)
    return status is None or stat.S_ISREG(status.st_mode)


def _status(path: PathName) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _beside(target: str) -> str:
    return os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")


def _write_to(path: PathName, content: bytes) -> None:
    # Without O_NONBLOCK a pipe that nobody reads would be waited for.
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        os.set_blocking(descriptor, True)
        _write_all(descriptor, content)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
