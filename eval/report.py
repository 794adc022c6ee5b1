"""The report on disk: report.json, and Markdown and HTML rendered from it and from nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError
from shoal.eval.plots import AXES, arm_looks, draw_all
from shoal.eval.words import (
    AXIS_WORDS,
    METRIC_WORDS,
    TEST_WORDS,
    format_score,
    format_seconds,
    format_share,
    format_si,
    format_signed,
)
from shoal.trainer.storage import open_aside, write_durable

REPORT = "report.json"
FILES = (REPORT, "report.md", "report.html")

SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "h": "⬢"}


def check_folder(folder: Path) -> None:
    """Refuse to write a report over something else.

    Raises:
        ConfigError: `folder` exists and holds no report.
    """
    if folder.exists() and not _is_ours(folder):
        raise ConfigError(
            "the folder exists and is not a report", where=folder, fix="choose another folder"
        )


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write the three files into `folder`, all or none; an older report there is replaced.

    Args:
        report: As `compare` returns it, or as read back and checked.
        folder: Where the report is to be.

    Raises:
        ConfigError: `folder` holds something else.
    """
    check_folder(folder)
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
        write_durable(aside / name, text)
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
    looks = {name: (colour, SIGNS[marker]) for name, (colour, marker) in arm_looks(report).items()}
    return environment.get_template(template).render(r=report, looks=looks, axes=AXES, **values)
