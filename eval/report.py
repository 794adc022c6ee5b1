"""The report on disk: report.json, and Markdown and HTML rendered from it and from nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError
from shoal.eval.compare import check_report
from shoal.eval.partials import open_aside
from shoal.eval.plots import AXES, COLOURS, MARKERS, draw_all
from shoal.eval.words import AXIS_WORDS, METRIC_WORDS, TEST_WORDS

REPORT = "report.json"
FILES = (REPORT, "report.md", "report.html")

SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "h": "⬢"}


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write the three files into `folder`, all or none; an older report there is replaced.

    Raises:
        ConfigError: the report does not fit its schema, or `folder` holds something else.
    """
    check_report(report)
    if folder.exists() and not _is_ours(folder):
        raise ConfigError(
            "the folder exists and is not a report", where=folder, fix="choose another folder"
        )
    texts = {
        REPORT: json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = open_aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, text in texts.items():
        with (aside / name).open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    if folder.exists():
        # Files are replaced one by one, report.json last: a kill between them leaves the old
        # contract beside newer pages, and the next report makes all three agree again.
        for name in reversed(FILES):
            (aside / name).replace(folder / name)
        aside.rmdir()
    else:
        aside.rename(folder)
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or holds a report."""
    return folder.is_dir() and ((folder / REPORT).is_file() or not any(folder.iterdir()))


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page without any outside resource."""
    return _render("report.html.jinja", report, plots=draw_all(report))


def render_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    return _render("report.md.jinja", report)


def _render(template: str, report: Mapping[str, Any], **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        si=format_si,
        score=format_score,
        signed=format_signed,
        share=format_share,
        seconds=format_seconds,
        axis=AXIS_WORDS.__getitem__,
        test=TEST_WORDS.__getitem__,
        metric=METRIC_WORDS.__getitem__,
    )
    looks = {
        arm["name"]: (COLOURS[i % len(COLOURS)], SIGNS[MARKERS[i % len(MARKERS)]])
        for i, arm in enumerate(report["arms"])
    }
    return environment.get_template(template).render(r=report, looks=looks, axes=AXES, **values)


def format_si(value: float | None, unit: str = "") -> str:
    """Return a number with an SI prefix: 1.23 M."""
    if value is None:
        return "–"
    size = abs(value)
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if size >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.2f}".rstrip("0").rstrip(".") + (f" {unit}" if unit else "")


def format_score(value: float | None, metric: str) -> str:
    """Return a metric as people write it."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4f}"


def format_signed(value: float, metric: str) -> str:
    """Return a difference with its sign."""
    return f"{100 * value:+.1f} pp" if metric == "accuracy" else f"{value:+.4f}"


def format_share(value: float, digits: int = 1) -> str:
    """Return a signed share in percent."""
    return f"{100 * value:+.{digits}f}%"


def format_seconds(value: float) -> str:
    """Return a duration in its natural unit."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"
