"""What the commands show: progress, runs, shards, checkpoints, exports and reports as tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError, ShoalError

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int | None], None]


def show(table: Table) -> None:
    """Print a table; whole lines where the output is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(width=160, highlight=False).print(
        table
    )


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Give a callable (label, done, total) that draws a bar a label, or plain lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_starts(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def draw(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield draw


def _print_starts(console: Any) -> Progress:
    seen: set[str] = set()

    def say(label: str, done: int, total: int | None) -> None:
        if label not in seen:
            seen.add(label)
            console.print(label)

    return say


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Return name and value in two columns, as they are: brackets in a path are no markup."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(escape(name), escape(f"{value:,}" if isinstance(value, int) else str(value)))
    return table


def runs_table(folder: Path) -> Table:
    """Return one line for every run under `folder`.

    Raises:
        ConfigError: there is no such folder.
    """
    from rich.table import Table

    if not folder.is_dir():
        raise ConfigError(
            "no such folder",
            where=folder,
            fix="name the folder that holds runs: shoal runs FOLDER; training makes the one "
            "named runs",
        )
    table = Table(title=f"runs in {folder}", title_justify="left")
    for column in ("run", "step", "of", "loss", "validation", "checkpoint", "last written"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for file in sorted(folder.glob("**/config.yaml")):
        run = file.parent
        try:
            table.add_row(str(run.relative_to(folder)), *_run_row(run))
        except ShoalError as error:
            table.add_row(str(run.relative_to(folder)), "", "", "", error.cause, "", "")
    return table


def _run_row(run: Path) -> list[str]:
    from shoal.launcher.runs import read_run
    from shoal.trainer.metrics import read_metrics

    config, records = read_run(run), read_metrics(run / "metrics.jsonl")
    losses = [r for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "validation"]
    written = datetime.fromtimestamp(run.stat().st_mtime)
    return [
        f"{losses[-1]['step']:,}" if losses else "0",
        f"{config.steps:,}",
        f"{losses[-1]['loss']:.4f}" if losses else "",
        f"{scores[-1]['bits_per_byte']:.4f} bits/byte" if scores else "",
        _newest(run) or "none",
        f"{written:%Y-%m-%d %H:%M}",
    ]


def _newest(run: Path) -> str | None:
    from shoal.launcher.screen import newest_checkpoint

    found = newest_checkpoint(run)
    return Path(found).name if found else None


def inspect_path(path: Path) -> Table:
    """Recognise a run, checkpoint, shards, report, export or model folder and describe it.

    Raises:
        DataError: it is none of them.
    """
    if (path / "config.yaml").is_file() and not (path / "model.safetensors").is_file():
        return _describe_run(path)
    if (path / "report.json").is_file():
        return _describe_report(path)
    if (path / "manifest.json").is_file():
        tree = _read_json(path / "manifest.json")
        return shards_table(path) if "shards_hash" in tree else _describe_checkpoint(path)
    if (path / "config.json").is_file():
        return _describe_model(path)
    raise DataError(
        "is no run, checkpoint, shards, report or model" if path.exists() else "does not exist",
        where=path,
        fix="`shoal runs` lists runs; shards are the train and validation folders of a corpus",
    )


def _describe_run(run: Path) -> Table:
    from shoal.launcher.runs import read_run
    from shoal.trainer.ledger import read_ledger

    config, entries = read_run(run), read_ledger(run / "ledger.jsonl")
    step, of, loss, score, newest, written = _run_row(run)
    return facts_table(
        f"run {run}",
        {
            "model": f"{config.model.family}, {config.model.num_layers} layers, width "
            f"{config.model.width}, exports as {config.model.export_class}",
            "steps": f"{step} of {of}",
            "training loss": loss,
            "validation": score,
            "newest checkpoint": newest,
            "device seconds": f"{sum(entry.device_seconds for entry in entries):,.0f}",
            "last written": written,
        },
    )


def _describe_checkpoint(folder: Path) -> Table:
    from shoal.trainer.checkpoint import read_manifest

    manifest = read_manifest(folder)
    files = [file for file in folder.iterdir() if file.is_file()]
    return facts_table(
        f"checkpoint {folder}",
        {
            "run": manifest.run.get("name"),
            "step": manifest.step,
            "tensors": len(manifest.tensors),
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def _describe_model(folder: Path) -> Table:
    config = _read_json(folder / "config.json")
    facts: dict[str, object] = {
        "class": ", ".join(config.get("architectures") or ["unknown"]),
        "written by Shoal": (folder / "shoal.json").is_file(),
        "bytes of weights": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    if (folder / "shoal.json").is_file():
        ours = _read_json(folder / "shoal.json")
        facts |= {k: v for k, v in ours.items() if isinstance(v, (str, int, float))}
    return facts_table(f"model {folder}", facts)


def _describe_report(folder: Path) -> Table:
    tree = read_report(folder)
    return facts_table(
        f"report {folder}",
        {
            "study": tree["study"]["name"],
            "arms": ", ".join(arm["name"] for arm in tree["arms"]),
            "read it": folder / "report.html",
        },
    )


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report.json of a report's folder.

    Raises:
        DataError: there is none, or it is broken, or not one of ours.
    """
    from shoal.eval.compare import check_report

    file = folder / "report.json"
    tree = _read_json(file)
    try:
        check_report(tree)
    except ConfigError as error:
        raise DataError(f"{error.cause} (at {error.where})", where=file) from None
    return tree


def shards_table(folder: Path) -> Table:
    """Return what a manifest of shards says: counts, sources, domains, what was dropped and why.

    Raises:
        DataError: no shards there, or the manifest was altered.
    """
    from shoal.data_pipeline.manifest import DROPPED
    from shoal.data_pipeline.shards import read_manifest

    manifest = read_manifest(folder)
    facts: dict[str, object] = {
        "rows": manifest.rows,
        "context": manifest.context,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "bytes of text": manifest.text_bytes,
        "bytes per token": f"{manifest.text_bytes / max(manifest.tokens, 1):.3f}",
        "vocabulary": manifest.vocab_size,
        "shards": len(manifest.shards),
        "identity": manifest.shards_hash,
        "tokenizer": manifest.tokenizer_fingerprint,
    }
    for number, source in enumerate(manifest.sources, 1):
        facts[f"source {number}"] = (
            f"{source.path}: {source.documents:,} documents, {source.bytes:,} bytes"
        )
    for domain, count in manifest.domains.items():
        facts[f"domain {domain or '(none)'}"] = count
    facts["dropped"] = manifest.dropped.total
    for reason, count in manifest.dropped.reasons.items():
        facts[f"dropped: {reason}"] = count
    if manifest.dropped.total:
        facts["list of dropped"] = folder / DROPPED
    return facts_table(f"shards {folder}", facts)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=file) from None
    if not isinstance(tree, dict):
        raise DataError("is no JSON object", where=file)
    return tree
