"""A store file that holds something else counts as absent, whatever it holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fuzz
import pytest

from sage_inductor.kernels.cache_folder import default_folder
from sage_inductor.tuning.store import Store


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    store = Store(str(tmp_path), fuzz.MACHINE)
    store.save(fuzz.KEY, fuzz.RESULT)
    assert store.load(fuzz.KEY) == [fuzz.RESULT]
    (file,) = (tmp_path / fuzz.MACHINE.fingerprint()).iterdir()
    return file


def loaded(file: Path, content: str) -> list[Any]:
    file.write_text(content)
    return Store(str(file.parent.parent), fuzz.MACHINE).load(fuzz.KEY)


def test_deep_nesting(stored: Path) -> None:
    assert loaded(stored, "[" * 100_000) == []
    assert loaded(stored, '{"format": 1, "key": ' + '{"a":' * 100_000) == []


@pytest.mark.parametrize("field", ["q_len", "kv_len", "sdpa_ms", "kernels", "failed"])
@pytest.mark.parametrize(
    "value", ["1e999", "-1", "NaN", "null", '"x"', "[]", "{}", "1" * 400, '{"triton": []}']
)
def test_values(stored: Path, field: str, value: str) -> None:
    data = json.loads(stored.read_text())
    data["results"][0][field] = "HERE"
    results = loaded(stored, json.dumps(data).replace('"HERE"', value))
    assert results == [] or (field in ("kernels", "failed") and value in ("{}", "[]", '{"triton": []}'))


def test_a_pipe_in_the_files_place(stored: Path) -> None:
    stored.unlink()
    os.mkfifo(stored)
    store = Store(str(stored.parent.parent), fuzz.MACHINE)
    assert store.load(fuzz.KEY) == []


def test_a_relative_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(RuntimeError, match="relative"):
        default_folder()
    assert Store("~/cache", fuzz.MACHINE).folder is None
