"""A part of what `python tests/helpers/fuzz.py` tries."""

from __future__ import annotations

import random

import fuzz


def test_mutated_files() -> None:
    fuzz.fuzz_files(400, random.Random(1))


def test_command_lines(fresh_compile: None) -> None:
    codes = fuzz.fuzz_commands(60, random.Random(1))
    assert {0, 2} <= set(codes)
