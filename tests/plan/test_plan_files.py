"""Plan files as they should not be, and ones that change under a process."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import fuzz
import pytest

from sage_inductor import Config
from sage_inductor.plan import file
from sage_inductor.plan.plan import Plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fuzz.PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def refused(path: Path, content: str) -> str:
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        Plan.load(path)
    return str(caught.value)


def test_duplicate_keys(saved: Path) -> None:
    text = saved.read_text().replace('"decision": "fast"', '"decision": "sdpa", "decision": "fast"')
    assert "decision is there 2 times" in refused(saved, text)


@pytest.mark.parametrize("tolerance", [-0.1, 0, 1e-400])
def test_tolerance_that_no_metric_has(saved: Path, tolerance: float) -> None:
    data = json.loads(saved.read_text()) | {"tolerance": tolerance}
    assert "valid: between 0 and inf" in refused(saved, json.dumps(data))


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name, attempt in (
        ("a\0b", Plan.load),
        ("\ud800", Plan.load),
        ("a\0b", fuzz.PLAN.save),
        ("a\0b", lambda name: Config(plan=name)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name!r} names no file: ")):
            attempt(name)
    for attempt in (Plan.load, fuzz.PLAN.save):  # 0 is a file that is open
        with pytest.raises(TypeError, match=r"path=0 \(valid: a str, an os.PathLike\)"):
            attempt(0)
    fuzz.PLAN.save(os.fsencode(tmp_path / "plan.json"))
    assert Plan.load(os.fsencode(tmp_path / "plan.json")) == fuzz.PLAN
    missing = tmp_path / "missing" / "plan.json"
    with pytest.raises(FileNotFoundError) as caught:  # and not of the file beside it that is written first
        fuzz.PLAN.save(missing)
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{missing}'"


def test_messages_are_short(saved: Path) -> None:
    data = json.loads(saved.read_text())
    for broken in (data | {"metric": "x" * 10**6}, data | {"y" * 10**6: 1}, data | {"sites": ["z" * 10**6]}):
        message = refused(saved, json.dumps(broken))
        assert len(message) < 1000 and "valid" in message


def test_larger_than_any_plan(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MOST_BYTES", 100)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        Plan.load(saved)


def test_saving_replaces_links_targets_and_keeps_permissions(saved: Path) -> None:
    saved.chmod(0o640)
    link = saved.with_name("link.json")
    link.symlink_to(saved)
    fuzz.PLAN.save(link)
    assert link.is_symlink() and saved.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(saved.parent)) == ["link.json", "plan.json"]


def test_an_edited_plan_is_told_of(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch.compile knows the path: what it compiled before goes on with the decisions of then."""
    with caplog.at_level(logging.WARNING):
        Config(plan=str(saved))
        Config(plan=str(saved))
        assert not caplog.records
        saved.write_text(saved.read_text().replace('"decision": "fast"', '"decision": "sdpa"'))
        assert Config(plan=str(saved)).plan != fuzz.PLAN
    assert "has changed since" in caplog.text


@pytest.mark.parametrize("folder", ["", "nul\0"])
def test_cache_dir_that_is_none(folder: str) -> None:
    with pytest.raises(ValueError, match="cache_dir"):
        Config(cache_dir=folder)
