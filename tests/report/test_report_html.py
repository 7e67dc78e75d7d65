"""The page in a real browser, from a file and with no network: tree, colours, filters, bars, hostile names."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sage_inductor import Report, Site
from sage_inductor.report.html.page import module_tree, reason_kinds
from sage_inductor.report.site import TensorInfo

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1200",
)  # fmt: skip
PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
if importlib.util.find_spec("selenium") is None:
    MISSING.append("selenium")
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# No dots: they would be modules.
HOSTILE = "</script><script>self['document']['title']='owned'</script><img src=x onerror=\"document['title']='owned'\">"


def site(name: str, reasons: tuple[str, ...] = (), **kwargs: Any) -> Site:
    info = TensorInfo((1, 12, 4096, 128), "bfloat16", "NHD")
    kernel = None if reasons else "triton"
    fields = {"mask": "none", "source": "model.py:7", "precision": "fast", **kwargs}
    return Site(
        name=name, pattern="sdpa", query=info, key=info, value=info, kernel=kernel, rewritten=not reasons,
        reasons=reasons, **fields,
    )  # fmt: skip


SITES = (
    site("blocks.0.attn1", speedup=1.4, rel_l2=0.02),
    site(
        "blocks.0.attn2",
        ("triton: kv_len=512 (faster than SDPA: from 8192)", "requires_grad=True"),
        speedup=0.7,
    ),
    site("blocks.1.attn1", speedup=2.0, rel_l2=0.04, precision="balanced"),
    site("blocks.1.attn2", ("triton: kv_len=77 (faster than SDPA: from 8192)",), mask="key_padding"),
    site("text.encoder.layers.0.attention", ("head_dim=80 (supported: 64, 128)",)),
    site(f"pooler.{HOSTILE}", (HOSTILE,), source=HOSTILE, mask=HOSTILE),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS["chromedriver"]))
    yield chrome
    chrome.quit()


@pytest.fixture
def show(driver: Any, tmp_path: Path) -> Callable[..., Any]:
    def open_page(report: Report, **kwargs: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(report.to_html(**kwargs), encoding="utf-8")
        driver.get_log("performance")  # forgets those of the page before
        driver.get(file.as_uri())
        return driver

    return open_page


def find(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


def visible(driver: Any) -> list[str]:
    """Full names of the sites that can be seen."""
    shown = [element for element in find(driver, "[data-site]") if element.is_displayed()]
    return [SITES[int(element.get_attribute("data-site"))].name for element in shown]


@needs_browser
def test_every_site_is_in_its_module_with_its_decision(show: Any) -> None:
    page = show(Report(SITES, graphs=2), title="A model")
    assert page.title == "A model"
    assert visible(page) == [site.name for site in SITES]
    names = [element.text for element in find(page, ".group > summary .name")]
    assert names == ["blocks", "0", "1", "text.encoder.layers.0", "pooler"]  # chains are one row
    assert [element.text for element in find(page, ".group > summary .faint")][0] == "2 of 4"
    badges = [element.text for element in find(page, ".site .badge")]
    assert badges == ["triton fast", "SDPA", "triton balanced", "SDPA", "SDPA", "SDPA"]
    colours = [element.value_of_css_property("color") for element in find(page, ".site .badge")]
    assert len(set(colours)) == 3 and colours[1] == colours[3] == colours[5]
    assert "6 attentions, 2 rewritten, 4 left; 2 graphs" in page.page_source


@needs_browser
def test_a_site_opens_to_all_that_is_known(show: Any) -> None:
    page = show(Report(SITES))
    (row,) = find(page, '[data-site="1"]')
    assert not row.find_element("css selector", "dl").is_displayed()
    row.find_element("css selector", "summary").click()
    text = row.find_element("css selector", "dl").text
    for part in ("blocks.0.attn2", "model.py:7", "1x12x4096x128 bfloat16 NHD", *SITES[1].reasons):
        assert part in text


@needs_browser
def test_filters_by_reason_decision_and_words(show: Any) -> None:
    page = show(Report(SITES))

    def tick(name: str, value: str) -> None:
        next(box for box in find(page, f"[name={name}]") if box.get_attribute("value") == value).click()

    offered = [box.get_attribute("value") for box in find(page, "[name=reason]")]
    assert offered == ["triton: kv_len", "requires_grad", "head_dim", HOSTILE.partition("=")[0]]
    tick("reason", "triton: kv_len")
    assert visible(page) == ["blocks.0.attn2", "blocks.1.attn2"]
    groups = [e.text for e in find(page, ".group > summary .name") if e.is_displayed()]
    assert groups == ["blocks", "0", "1"]
    tick("reason", "head_dim")
    assert visible(page) == ["blocks.0.attn2", "blocks.1.attn2", "text.encoder.layers.0.attention"]
    (search,) = find(page, "[name=search]")
    search.send_keys("KEY_padding attn2")
    assert visible(page) == ["blocks.1.attn2"]
    assert find(page, ".count")[0].text == "1 of 6 shown"
    find(page, "[data-clear]")[0].click()
    assert len(visible(page)) == 6
    tick("decision", "triton balanced")
    assert visible(page) == ["blocks.1.attn1"]
    find(page, "[data-clear]")[0].click()
    find(page, '[data-open="false"]')[0].click()
    assert visible(page) == []
    find(page, '[data-open="true"]')[0].click()
    assert len(visible(page)) == 6


@needs_browser
def test_bars_are_as_long_as_what_they_show(show: Any) -> None:
    page = show(Report(SITES))

    def length(index: int, bar: int) -> float:
        script = """
            const bar = document.querySelectorAll(`[data-site="${arguments[0]}"] .bar i`)[arguments[1]];
            return parseFloat(getComputedStyle(bar, "::before").width) / bar.getBoundingClientRect().width;
        """
        return float(page.execute_script(script, index, bar))

    assert length(0, 0) == pytest.approx(0.5, abs=0.01) and length(2, 0) == pytest.approx(1.0, abs=0.01)
    assert length(0, 1) == pytest.approx(0.7, abs=0.01)
    assert length(1, 0) == pytest.approx(0.35, abs=0.01)  # it has a speed-up only
    assert [e.text for e in find(page, ".bar b")] == ["0.0200", "1.40x", "0.70x", "0.0400", "2.00x"]
    assert find(page, ".slower b")[0].text == "0.70x"
    bare = show(Report(SITES[3:]))
    assert find(bare, ".bar") == [] and "speed-up" not in find(bare, ".head")[0].text


@needs_browser
def test_an_error_of_nan_is_shown_and_breaks_nothing(show: Any) -> None:
    page = show(Report((site("a", rel_l2=float("nan")), site("b", rel_l2=0.03))))
    assert [e.text for e in find(page, ".bar b")] == ["nan", "0.0300"]
    assert find(page, ".count")[0].text == "2 of 2 shown" and page.get_log("browser") == []


@needs_browser
def test_names_from_a_model_are_only_text(show: Any) -> None:
    page = show(Report(SITES), title=HOSTILE)
    assert page.title == HOSTILE
    assert find(page, "img") == [] and len(find(page, "script")) == 2
    find(page, '[data-site="5"] summary')[0].click()
    assert find(page, '[data-site="5"] dl')[0].text.count(HOSTILE) == 4
    data = page.execute_script("return document.getElementById('report').textContent")
    assert json.loads(data) == json.loads(Report(SITES).to_json())
    # Were anything not escaped, the page's policy would stop it all the same.
    page.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
    assert page.title == HOSTILE
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


@needs_browser
def test_nothing_is_loaded_and_nothing_is_logged(show: Any) -> None:
    page = show(Report(SITES))
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert urls and all(url.startswith("file:") and url.endswith("report.html") for url in urls)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(show: Any, scheme: str) -> None:
    """WCAG AA: a contrast of 4.5 between text and what it stands on."""
    page = show(Report(SITES))
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    panel = luminance(find(page, ".panel.tree")[0].value_of_css_property("background-color"))
    assert (panel > 0.5) is (scheme == "light")
    for selector in (".site .badge", ".site .name", ".group .faint", ".inputs", ".head", ".bar b"):
        for element in find(page, selector):
            ink = luminance(element.value_of_css_property("color"))
            lighter, darker = max(ink, panel), min(ink, panel)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (selector, element.text)


def luminance(colour: str) -> float:
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_browser
def test_without_script_every_site_is_there(show: Any, driver: Any) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = show(Report(SITES))
        assert visible(page) == [site.name for site in SITES]
        assert not find(page, "form")[0].is_displayed()
        assert "Without JavaScript" in page.find_element("css selector", "main").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_browser
def test_a_model_without_attention(show: Any) -> None:
    page = show(Report())
    assert "No attention found in 1 graph." in page.find_element("css selector", "main").text
    assert page.get_log("browser") == []


def test_reasons_are_grouped_by_what_they_are_about() -> None:
    reasons = (
        "triton: head_dim=80 (supported: 64, 128)",
        "is slower than SDPA",
        "triton: head_dim=7 (supported: 8)",
    )
    assert reason_kinds(site("a", reasons)) == ["triton: head_dim", "is slower than SDPA"]


def test_the_tree_follows_the_dotted_names() -> None:
    root = module_tree([site("a.b.c"), site("a.b.d"), site("<root>"), site("a.b")])
    assert [name for _, name, _ in root.sites] == ["<root>"]
    (a,) = root.children.values()
    assert a.name == "a" and [name for _, name, _ in a.sites] == ["b"]
    (b,) = a.children.values()
    assert [(index, name) for index, name, _ in b.sites] == [(0, "c"), (1, "d")]
    assert [index for index, _ in root.below()] == [2, 3, 0, 1]
