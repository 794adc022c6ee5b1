"""The report on disk: one contract, pages that are whole and alone, written whole or not at all."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from shoal.configs.errors import ConfigError
from shoal.eval.compare import check_report
from shoal.eval.plots import draw_all
from shoal.eval.report import render_html, render_markdown, write_report

SECTIONS = (
    "verdict", "arms", "budgets", "quality", "pairs", "training", "cost", "calibration",
    "contamination", "provenance",
)  # fmt: skip


class Page(HTMLParser):
    """Collects what a page holds and refers to."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.ids, self.tags, self.open, self.urls = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href"):
                self.urls.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_html_is_whole_and_alone(page, report):
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(SECTIONS) <= set(parsed.ids)
    assert all(url.startswith("#") and url[1:] in parsed.ids for url in parsed.urls)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 4
    assert "prefers-color-scheme: dark" in page
    assert page.index('id="verdict"') < page.index('id="arms"')
    for row in report["arms"]:
        assert row["name"] in page


def test_svg_takes_the_colour_of_the_page(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert "currentColor" in drawn
    assert "#000000" not in drawn and "#010203" not in drawn and "#ffffff" not in drawn


@pytest.mark.parametrize("condition", ["precision", "context", "batch"])
def test_targets_meant_under_other_conditions_are_not_drawn(report, condition):
    def count_targets(budget):
        changed = {**report, "budgets": [*report["budgets"], {**report["budgets"][1], **budget}]}
        return draw_all(changed)["quality"].count("stroke-dasharray")

    as_it_is = draw_all(report)["quality"].count("stroke-dasharray")
    assert as_it_is == 3
    assert count_targets({"target": 70_000}) == as_it_is + 1
    other = {"precision": "fp32", "context": 32, "batch": 2}[condition]
    assert count_targets({"target": 70_000, condition: other}) == as_it_is


def test_names_are_escaped(report):
    changed = copy.deepcopy(report)
    changed["arms"][0]["provenance"]["command"] = "<script>alert(1)</script>"
    assert "<script>" not in render_html(changed)


def test_pages_say_what_the_ledger_leaves_out(page, report):
    for text in (page, render_markdown(report)):
        assert "scoring and timing are not counted" in text


def test_rendering_is_deterministic(page, report):
    assert render_html(json.loads(json.dumps(report))) == page


def test_markdown_has_every_section_and_whole_tables(report):
    text = render_markdown(report)
    for heading in ("Verdict", "Arms", "Budgets", "Quality", "Every pair", "Cost", "Provenance"):
        assert f"\n## {heading}\n" in text
    width = None
    for line in text.splitlines():
        if line.startswith("|"):
            columns = line.count("|")
            assert width in (None, columns), line
            width = columns
        else:
            width = None
    assert report["verdict"]["headline"] in text


def test_report_is_written_whole_and_replaced(report, tmp_path):
    folder = write_report(report, tmp_path / "reports" / "small")
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    check_report(json.loads((folder / "report.json").read_text()))
    assert [f.name for f in folder.parent.iterdir()] == ["small"]
    write_report(report, folder)
    assert [f.name for f in folder.parent.iterdir()] == ["small"]


def test_folder_of_somebody_else_is_not_touched(report, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a report"):
        write_report(report, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("verdict"),
        lambda r: r.update(extra=1),
        lambda r: r["arms"][0]["parameters"].update(total="many"),
        lambda r: r["pairs"][0].update(outcome="maybe"),
        lambda r: r["arms"][0]["matched"].pop("rule"),
        lambda r: r["arms"][0]["budgets"]["flops"].pop("rule"),
    ],
)
def test_schema_refuses_what_breaks_the_contract(report, spoil):
    broken = copy.deepcopy(report)
    spoil(broken)
    with pytest.raises(ConfigError, match="not a valid report"):
        check_report(broken)
