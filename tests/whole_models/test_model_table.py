"""docs/models.md says what the pass does: a part of its rows, measured again, one architecture of each kind."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from model_table import COLUMNS, DOC, Row, kept, measure
from zoo import FAMILIES, Entry, entries

# Measured: at most 2e-6, float32's rounding over the layers. A mask, scale or order of heads that is wrong in one
# attention gives above 1e-2.
REWRITING = 1e-4
# "fast" is within .04 (relative L2) at each attention; the errors of two layers, which most of these models have, add up
# at the worst.
SHARE = 2 * 0.04
SAMPLE = {
    "transformers": (
        "llama", "gemma2", "gpt_oss", "llama4_text", "falcon, ALiBi", "bloom", "xglm", "bert", "deberta", "xlnet", "xlm", "bart",
        "t5", "vit", "swinv2", "hiera", "vitdet", "sam", "siglip", "detr", "wavlm",
    ),
    "diffusers": ("PixArtTransformer2DModel", "SanaTransformer2DModel", "ltx", "PriorTransformer"),
}  # fmt: skip
NAMES = [name.strip() for name in COLUMNS.split("|")]
MEASURED = (
    "graph breaks",
    "exact",
    "error",
    "max",
    "share",
)  # what differs with versions or in the last digit


def cells(line: str) -> dict[str, str]:
    return dict(zip(NAMES, (cell.strip() for cell in line.strip().strip("|").split("|")), strict=True))


def documented(family: str) -> dict[tuple[str, str], dict[str, str]]:
    lines = kept(family, DOC.read_text()).splitlines()[4:]
    rows = [cells(line) for line in lines if line.startswith("|")]
    return {(row["model"], row["attention is"]): row for row in rows}


ELSEWHERE = ("llama", "bert", "vit", "ltx")  # of which test_models.py has the kind, with more checks


def is_elsewhere(entry: Entry, implementation: str) -> bool:
    """Also calls of SDPA by what is measured written out: test_models.py is about such calls."""
    return entry.name in ELSEWHERE or (implementation == "sdpa" and "eager" in entry.implementations)


def sampled() -> list[Any]:
    return [
        pytest.param(
            family,
            entry,
            implementation,
            marks=[pytest.mark.slow] if is_elsewhere(entry, implementation) else [],
            id=f"{family}-{entry.name}-{implementation}",
        )
        for family, names in SAMPLE.items()
        for entry in entries(family)
        if entry.name in names
        for implementation in entry.implementations
    ]


def check(row: Row) -> None:
    assert row.breaks == row.plain_breaks
    assert row.exact < REWRITING
    assert row.share is None or row.share < SHARE


@pytest.mark.parametrize(("family", "entry", "implementation"), sampled())
def test_rows(family: str, entry: Entry, implementation: str) -> None:
    row = measure(entry, implementation)
    check(row)
    expected = documented(family)[entry.name, implementation]
    measured = cells(str(row))
    for name in NAMES:
        if name not in MEASURED:
            assert measured[name] == expected[name], name


def test_the_document_covers_every_family() -> None:
    rows = {family: documented(family) for family in FAMILIES}
    assert all(rows.values())
    assert len({model for family in rows.values() for model, _ in family}) >= 40
    for family in SAMPLE:
        wanted = {
            (entry.name, implementation)
            for entry in entries(family)
            for implementation in entry.implementations
        }
        assert set(rows[family]) == wanted


def test_what_the_document_says_is_within_the_bounds() -> None:
    for family in FAMILIES:
        for (model, implementation), row in documented(family).items():
            where = f"{family}: {model} {implementation}"
            assert float(row["exact"]) < REWRITING, where
            assert not row["share"] or float(row["share"]) < SHARE, where
            assert int(row["8-bit"]) <= int(row["attention"]), where
