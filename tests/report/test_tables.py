"""Tables: no word is broken and no line is too long, whatever the width; what cannot be a table is a list of records."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sage_inductor import Config, Report, calibrate, explain
from sage_inductor.cli import output
from sage_inductor.report.site import Site, TensorInfo
from sage_inductor.report.text import column_widths, plain_records, plain_table

HEADER = ("site", "query", "decision", "reasons")
ROWS = [
    ("transformer_blocks.0.attn1", "1x24x4096x128 bfloat16 NHD", "hopper fast", ""),
    (
        "transformer_blocks.11.attn2",
        "1x24x4096x128 bfloat16 NHD",
        "reference fast",
        "device=cpu (supported: cuda); head_dim=80 (supported: 64, 96, 128); q_len=1 (supported: 2 and more)",
    ),
]


def words(rows: Any) -> list[str]:
    return sorted(word for row in rows for cell in row for word in cell.split())


@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, 120, 150, 400])
def test_no_word_is_broken_and_no_line_too_long(width: int) -> None:
    text = plain_table(HEADER, ROWS, width)
    assert max(map(len, text.splitlines())) <= width
    shown = text.split()
    assert all(word in shown for word in words(ROWS))


def test_a_table_as_wide_as_its_cells_where_there_is_room() -> None:
    table = plain_table(("a", "b"), [("1", "two words"), ("333", "")])
    assert table == "a    b\n---  ---------\n1    two words\n333"


def test_cells_are_wrapped_in_the_column_that_needs_it() -> None:
    table = plain_table(("site", "reasons"), [("blocks.0", "one two three four"), ("b", "x")], 22)
    assert table == (
        "site      reasons\n--------  ------------\nblocks.0  one two\n          three four\nb         x"
    )


def test_records_where_not_even_the_words_fit() -> None:
    assert column_widths(HEADER, ROWS, 40) is None
    text = plain_table(HEADER, ROWS, 40)
    assert text == plain_records(HEADER, ROWS, 40)
    assert text.startswith(
        "transformer_blocks.0.attn1\n"
        "  query     1x24x4096x128 bfloat16 NHD\n"
        "  decision  hopper fast\n"
        "transformer_blocks.11.attn2\n"
    )


def test_a_word_that_is_wider_than_everything_stays_whole() -> None:
    path = ".".join(["module"] * 30)
    assert path in plain_table(("site", "reasons"), [(path, "why")], 80).split()


def make_report() -> Report:
    info = TensorInfo((1, 24, 4096, 128), "bfloat16", "NHD")
    reasons = ("device=cpu (supported: cuda)", "head_dim=80 (supported: 64, 96, 128)")
    sites = tuple(
        Site(name, "attention_processor.py:2771", "sdpa", info, info, info, "causal + key_padding", None, "fast", False, reasons)
        for name in ("transformer_blocks.0.attn1", "single_transformer_blocks.37.attention.self")
    )  # fmt: skip
    return Report(sites)


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_the_reports_of_the_command_line(
    columns: int, colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sage_inductor.cli.explain import show_report

    if colour:
        pytest.importorskip("rich")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.setattr(output, "find_spec", lambda name: None)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    show_report("model.py:make_model", make_report())
    out = capsys.readouterr().out
    table = out.split("2 attention(s)")[0]
    assert max(map(len, table.splitlines())) <= columns
    for word in (
        "attention_processor.py:2771",
        "1x24x4096x128",
        "key_padding",
        "single_transformer_blocks.37.attention.self",
    ):
        assert word in out.replace("│", " ").split()


def test_piped_tables_have_120_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sage_inductor.cli.explain import show_report

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")  # of a terminal that the output does not go to
    show_report("model.py:make_model", make_report())
    lines = capsys.readouterr().out.splitlines()
    assert 60 < max(map(len, lines)) <= 120
    assert max(map(len, str(make_report()).splitlines())) <= 120


class LongNames(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_transformer_block_with_a_long_name_that_goes_on = torch.nn.ModuleDict(
            {
                "and_an_attention_with_a_name_that_is_hardly_shorter_than_that_of_the_block": torch.nn.Identity()
            }
        )

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


def test_plans(inference: None) -> None:
    plan = calibrate(LongNames(), (torch.randn(1, 2, 16, 32),), effect="none")
    assert max(map(len, str(plan).splitlines())) <= 120
    header, rows = plan.table()
    assert len(rows) == 1 and all(len(row) == len(header) for row in rows)
    assert plan.summary()[0].startswith("1 decision(s)") and plan.summary()[-1] in str(plan)


def test_on_a_cpu_the_report_names_the_kernel_that_runs_there(inference: None) -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 16, 32)
    report = explain(attend, q)
    assert 'on a CPU only kernel="reference" runs' in str(report)
    assert "only kernel=&quot;reference&quot; runs" in report.to_html()
    assert explain(attend, q, config=Config(kernel="reference")).hints() == []
    assert explain(lambda q: q + 1, q).hints() == []
