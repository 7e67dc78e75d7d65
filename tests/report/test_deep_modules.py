"""Models whose modules lie deeper than pages and recursion do."""

from __future__ import annotations

from sage_inductor.report.report import Report
from sage_inductor.report.site import Site


def test_six_hundred_modules_in_one_another() -> None:
    paths = [".".join(f"m{index}" for index in range(depth)) for depth in range(2, 601)]
    sites = tuple(_site(path) for path in paths)
    page = Report(sites).to_html()
    assert page.count("data-site=") == len(sites) and "m599" in page


def test_names_are_shown_and_not_sent_to_the_terminal() -> None:
    text = str(Report((_site("a\x1b]0;title\x07b"),)))
    assert "\x1b" not in text and r"a\x1b]0;title\x07b" in text


def _site(name: str) -> Site:
    return Site(name, "model.py:1", "sdpa", None, None, None, "none", None, "fast", False, ("device=cpu",))
