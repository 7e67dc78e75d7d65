"""What `Config` takes, and what it keeps of it."""

from __future__ import annotations

import enum
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from sage_inductor import Config


@pytest.mark.parametrize("path", ["cache/here", Path("cache/here"), PurePosixPath("cache/here")])
def test_a_folder_is_given_as_text_or_as_a_path_and_kept_as_text(path: str | os.PathLike[str]) -> None:
    """`repr(config)` is part of the key of compiled graphs."""
    config = Config(cache_dir=path)
    assert config == Config(cache_dir="cache/here") and hash(config) == hash(Config(cache_dir="cache/here"))
    assert repr(config) == repr(Config(cache_dir="cache/here"))
    assert Config.from_options({"sage.cache_dir": path})[0] == config


class Bytes(os.PathLike):  # type: ignore[type-arg]
    def __fspath__(self) -> bytes:
        return b"cache"


@pytest.mark.parametrize("path", [7, b"cache", Bytes(), ("cache",)])
def test_other_folders_are_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=r"cache_dir=.*valid: a path as a string or os.PathLike of one, None"):
        Config(cache_dir=path)


@pytest.mark.parametrize("path", ["", "a\0b", Path("a\0b")])
def test_folders_that_cannot_be_are_refused(path: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_dir=.*valid: a path that is not empty and has no NUL, None"):
        Config(cache_dir=path)


@pytest.mark.parametrize(
    ("field", "valid"),
    [
        ("kernel", "auto, hopper, triton, sageattention, reference"),
        ("precision", "auto, fast, balanced, accurate"),
        ("fallback", "sdpa, warn, error"),
        ("tune", "measure, table, off"),
    ],
)
def test_a_choice_is_checked_when_a_config_is_made(field: str, valid: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}='slow' \(valid: {valid}\)"):
        Config(**{field: "slow"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{field}=\['fast'\]"):
        Config(**{field: ["fast"]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{field}=array\(.* \(valid: {valid}\)"):
        Config(**{field: np.array(["fast", "slow"])})  # type: ignore[arg-type]


class Named(str, enum.Enum):
    FAST = "fast"


def test_texts_and_numbers_of_other_types_are_kept_as_plain_ones() -> None:
    """`repr(config)` is part of the key of compiled graphs."""
    plain = Config(precision="fast", skip_threshold=0.25, include=("fast",), cache_dir="fast")
    for text, number in ((Named.FAST, np.float32(0.25)), (np.str_("fast"), np.float64(0.25))):
        other = Config(precision=text, skip_threshold=number, include=[text], cache_dir=text)  # type: ignore[arg-type]
        assert other == plain and repr(other) == repr(plain)


@pytest.mark.parametrize("name", ["kernel", "sage_kernel", "Sage.kernel", "sage.kernal", "sage."])
def test_options_that_are_spelled_otherwise_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown option '{name}' \(valid: sage.kernel, sage.precision"):
        Config.from_options({name: "reference"})


def test_options_are_a_mapping() -> None:
    with pytest.raises(TypeError, match=r"options='max-autotune' \(valid: a dict, None\)"):
        Config.from_options("max-autotune")  # type: ignore[arg-type]
