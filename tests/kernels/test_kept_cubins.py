"""Cubins are code: what is loaded from the cache is what this user, or root, has stored under this very key."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sage_inductor.kernels.hopper import kept

ELF = b"\x7fELF of a kernel"
KEY, NAME = "a kernel", "hopper-1.kernel"


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_warned", set())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that holds a kernel."""
    folder = tmp_path / "sage_inductor" / "kernels"
    kept.store(folder, NAME, KEY, ELF)
    assert kept.load(folder, NAME, KEY) == ELF
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_folder_is_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        kept.store(tmp_path / "cache" / "kernels", NAME, KEY, ELF)
    finally:
        os.umask(old)
    assert mode(tmp_path / "cache") == mode(tmp_path / "cache" / "kernels") == 0o700
    assert mode(tmp_path / "cache" / "kernels" / NAME) == 0o600


def test_a_folder_of_the_users_that_was_open_is_closed(folder: Path) -> None:
    folder.chmod(0o777)
    assert (
        kept.load(folder, NAME, KEY) == ELF
    )  # the file in it is the user's, and nobody else could write to it
    assert mode(folder) == 0o700


def _of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)  # whoever runs the tests is another one


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def _link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "spoil",
    {
        "empty": _rewritten(lambda content: b""),
        "cut": _rewritten(lambda content: content[:-1]),
        "changed": _rewritten(lambda content: content[:-1] + b"!"),
        "no kernel, with its hash": lambda file: kept.store(file.parent, NAME, KEY, b""),
        "of another key": lambda file: kept.store(file.parent, NAME, "another kernel", ELF),
        "writable by the group": lambda file: file.chmod(0o620),
        "writable by all": lambda file: file.chmod(0o602),
        "a link": _link,
        "a pipe": _pipe,
        "a folder": _folder,
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_as_stored_is_not_loaded(
    folder: Path, spoil: tuple[str, Callable[[Path], None]], caplog: pytest.LogCaptureFixture
) -> None:
    spoil[1](folder / NAME)
    with caplog.at_level(logging.WARNING):
        assert kept.load(folder, NAME, KEY) is None
        assert kept.load(folder, NAME, KEY) is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_another_user_owns(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _of_another(folder / NAME if what == "file" else folder, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert kept.load(folder, NAME, KEY) is None
        if what == "folder":
            kept.store(folder, "hopper-2.kernel", KEY, ELF)
            assert [file.name for file in folder.iterdir()] == [NAME]
    assert len(caplog.records) == 1 and "belongs to user" in caplog.text


def test_another_kernels_file(folder: Path) -> None:
    kept.store(folder, "hopper-2.kernel", "another kernel", ELF + b" 2")
    os.replace(folder / "hopper-2.kernel", folder / NAME)
    assert kept.load(folder, NAME, KEY) is None


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    kept.store(folder, "hopper-2.kernel", KEY, ELF)
    assert [file.name for file in folder.iterdir()] == [NAME]
