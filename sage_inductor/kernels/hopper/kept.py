"""Compiled kernels on disk. They are code that runs on the GPU with the rights of this process, so that only what this user
or the administrator can have written is loaded; SECURITY.md says what that covers.

    <folder>/<name>    sha256(key, cubin), cubin

Whether a file is trusted depends on who could write it, which the hash does not say: anybody can compute that. The hash
finds a file that is damaged, or another kernel's.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sage_inductor.kernels.files import read_descriptor

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20
_SHA_BYTES = 32
_ELF = b"\x7fELF"  # what a cubin begins with
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def load(folder: Path, name: str, key: str) -> bytes | None:
    """The cubin stored as `name` for `key`; None where there is none that can be trusted, with a warning where there is
    another."""
    try:
        with _opened(folder) as directory:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            try:
                _check_writers(descriptor, folder / name)
                stored = read_descriptor(descriptor, folder / name, MOST_BYTES)
            finally:
                os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn("a compiled kernel is not read, and compiled again", error)
        return None
    cubin = stored[_SHA_BYTES:]
    if stored[:_SHA_BYTES] == _digest(key, cubin) and cubin.startswith(_ELF):
        return cubin
    _warn("a compiled kernel is damaged, or another one, and compiled again", folder / name)
    return None


def store(folder: Path, name: str, key: str, cubin: bytes) -> None:
    """Keep `cubin` for `load`; a warning where that cannot be done. The file appears whole, or not at all."""
    temporary = f".{secrets.token_hex(8)}.tmp"
    try:
        _make(folder)
        with _opened(folder) as directory:
            try:
                # Whatever the umask is: nobody else may write what this user will run.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_digest(key, cubin) + cubin)
                os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
    except OSError as error:
        _warn("compiled kernels are not kept", error)


def _digest(key: str, cubin: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(key.encode()).digest() + cubin).digest()


def _make(folder: Path) -> None:
    """The folder and what leads to it, for the user alone: with a umask of 0 it would be everybody's."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`, by which it cannot be exchanged for another between a check and what follows. It is made
    0700 where it is the user's. PermissionError for one that others can write to."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(directory)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(directory, 0o700)
        _check_writers(directory, folder)
        yield directory
    finally:
        os.close(directory)


def _check_writers(descriptor: int, path: Path) -> None:
    """PermissionError for what somebody else than this user and root may have written."""
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to user {status.st_uid} (valid: {os.geteuid()}, this user, or 0)"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError(f"{path} can be written by others: mode {stat.S_IMODE(status.st_mode):04o}")


_warned: set[str] = set()


def _warn(what: str, why: object) -> None:
    """Once for each kind, and for what is wrong with one folder: that concerns every kernel."""
    if not _warned & {what, str(why)}:
        _warned.update((what, str(why)))
        log.warning("%s: %s", what, why)
