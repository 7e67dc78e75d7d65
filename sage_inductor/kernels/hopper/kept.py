"""Compiled kernels on disk.

    <folder>/<name>    sha256(key, cubin), cubin

They are code that runs on the GPU with the rights of this process. Only files that nobody but this user or the administrator
can have written are loaded; SECURITY.md says what that covers. The hash is no protection, as anybody can compute it: it finds
a file that is damaged, or another kernel's.
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
    """The cubin stored as `name` for `key`. None where there is none; None with a warning where the file cannot be read or
    trusted, is damaged, or is another kernel's."""
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
    """Keep `cubin` for `load`. The file appears whole, or not at all; where it cannot be written there is a warning."""
    temporary = f".{secrets.token_hex(8)}.tmp"
    try:
        _make(folder)
        with _opened(folder) as directory:
            try:
                # 0600 whatever the umask is: nobody else may write code that this user will run.
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
    """Make the folder and its parents, for the user alone: with a umask of 0 everybody could write to them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`. A folder that is held by it cannot be exchanged for another after the check.

    A folder of this user gets mode 0700. Raises PermissionError for one that others can write to.
    """
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
    """Raise PermissionError for a file or folder that somebody else than this user and root may have written to."""
    status = os.fstat(descriptor)
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to user {status.st_uid} (valid: {os.geteuid()}, this user, or 0)"
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError(f"{path} can be written by others: mode {stat.S_IMODE(status.st_mode):04o}")


_warned: set[str] = set()


def _warn(what: str, why: object) -> None:
    """Warn once for each kind of message, and once for each cause: one bad folder concerns every kernel."""
    if not _warned & {what, str(why)}:
        _warned.update((what, str(why)))
        log.warning("%s: %s", what, why)
