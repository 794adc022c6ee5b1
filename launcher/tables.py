"""What the commands show: progress, runs, shards, checkpoints, exports and reports as tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError, ShoalError
from shoal.launcher.history import RunFacts, describe_checkpoint, find_damage, read_history

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.data_pipeline.manifest import CleaningFacts, Manifest
    from shoal.launcher.cleaning import Cleaning

Progress = Callable[[str, int, int | None], None]
SHOWN = 4
"""Checkpoints of a run that are named in a list of runs."""


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
    from rich.markup import escape
    from rich.table import Table

    if not folder.is_dir():
        raise ConfigError(
            "no such folder",
            where=folder,
            fix="name the folder that holds runs: shoal runs FOLDER; training makes the one "
            "named runs",
        )
    from shoal.launcher.history import list_runs

    table = Table(title=escape(f"runs in {folder}"), title_justify="left")
    for column in ("run", "step", "of", "loss", "validation", "checkpoints", "size", "state",
                   "last written"):  # fmt: skip
        left = column in ("run", "checkpoints", "state")
        table.add_column(column, justify="left" if left else "right")
    for run in list_runs(folder):
        name = escape(str(run.relative_to(folder)))
        try:
            table.add_row(name, *_run_row(run))
        except ShoalError as error:
            table.add_row(name, *[""] * 6, escape(error.cause), "")
    return table


def _run_row(run: Path) -> list[str]:
    from shoal.launcher.history import format_bytes, read_history

    facts = read_history(run)
    scores = [r for r in facts.records if r["kind"] == "validation"]
    return [
        f"{facts.last['step']:,}" if facts.last else "0",
        f"{facts.config.steps:,}",
        f"{facts.last['loss']:.4f}" if facts.last else "",
        f"{scores[-1]['bits_per_byte']:.4f} bits/byte" if scores else "",
        _list_checkpoints(facts),
        format_bytes(facts.bytes),
        facts.state,
        f"{facts.written:%Y-%m-%d %H:%M}",
    ]


def _list_checkpoints(facts: RunFacts) -> str:
    """Return the steps that are kept, the newest first, and what some of them are kept for."""
    notes = dict.fromkeys(facts.milestones, "milestone")
    if facts.best is not None:
        notes[facts.best] = "best"
    steps = [f"{step} ({notes[step]})" if step in notes else str(step)
             for step in sorted(facts.checkpoints, reverse=True)]  # fmt: skip
    return ", ".join(steps[:SHOWN]) + (f", {len(steps) - SHOWN} more" if steps[SHOWN:] else "")


def cleaning_table(cleaning: Cleaning, *, dry_run: bool) -> Table:
    """Return a line for each thing that was removed, and the sum."""
    from rich.markup import escape
    from rich.table import Table

    from shoal.launcher.history import format_bytes

    total = format_bytes(sum(one.bytes for one in cleaning.removed))
    verb = "would be removed" if dry_run else "removed"
    table = Table(title=f"{verb}: {total}", title_justify="left", box=None)
    for column in ("size", "what", "why"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for one in cleaning.removed:
        table.add_row(format_bytes(one.bytes), escape(str(one.path)), one.why)
    for run in cleaning.busy:
        table.add_row("", escape(str(run)), "in training: not touched")
    return table


def show_path(path: Path, *, verify: bool = False) -> None:
    """Show what a folder is; with `verify` after reading every byte of its checkpoints or shards.

    Raises:
        DataError: it is nothing of ours, or broken; what can be said of it is shown before.
    """
    table, problems = inspect_path(path, verify=verify)
    show(table)
    if problems:
        for other in problems[1:]:
            problems[0].add_note(str(other))
        raise problems[0]


def inspect_path(path: Path, *, verify: bool = False) -> tuple[Table, list[DataError]]:
    """Recognise a run, checkpoint, shards, report, export or model folder and describe it.

    Returns:
        What there is to be said, and what is broken.

    Raises:
        DataError: it is none of them, or so broken that nothing can be said.
    """
    if (path / "config.yaml").is_file() and not (path / "model.safetensors").is_file():
        return _describe_run(path, verify=verify)
    if (path / "report.json").is_file():
        return _describe_report(path), []
    if (path / "manifest.json").is_file():
        if "shards_hash" not in _read_json(path / "manifest.json"):
            facts, problems = describe_checkpoint(path, verify=verify)
            return facts_table(f"checkpoint {path}", facts), problems
        if verify:
            from shoal.data_pipeline.shards import verify as verify_shards

            verify_shards(path)
        return shards_table(path), []
    if (path / "config.json").is_file():
        return _describe_model(path), []
    raise DataError(
        "is no run, checkpoint, shards, report or model" if path.exists() else "does not exist",
        where=path,
        fix="`shoal runs` lists runs; shards are the train and validation folders of a corpus",
    )


def _describe_run(run: Path, *, verify: bool) -> tuple[Table, list[DataError]]:
    """Describe a run and each of its checkpoints, whole or broken."""
    from shoal.trainer.ledger import read_ledger

    facts, entries = read_history(run), read_ledger(run / "ledger.jsonl")
    step, of, loss, score, kept, size, state, written = _run_row(run)
    model = facts.config.model
    shown = {
        "model": f"{model.family}, {model.num_layers} layers, width {model.width}, "
        f"exports as {model.export_class}",
        "state": state,
        "steps": f"{step} of {of}",
        "training loss": loss,
        "validation": score,
        "checkpoints": kept or "none",
        "size": size,
        "device seconds": f"{sum(entry.device_seconds for entry in entries):,.0f}",
        "last written": written,
    }
    problems: list[DataError] = []
    for path in reversed(facts.checkpoints.values()):
        try:
            damage = find_damage(path, verify=verify)
        except DataError as error:
            damage = [error]
        whole = "verified" if verify else "files and sizes as recorded (--verify reads them)"
        shown[path.name] = f"BROKEN: {damage[0].cause}" if damage else whole
        problems += damage
    return facts_table(f"run {run}", shown), problems


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
    from shoal.data_pipeline.manifest import DROPPED, REMOVED
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
    facts |= _packing_facts(manifest)
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
    if manifest.cleaning is not None:
        facts |= _cleaning_facts(manifest.cleaning)
        facts["list of removed"] = folder / REMOVED
    return facts_table(f"shards {folder}", facts)


def _packing_facts(manifest: Manifest) -> dict[str, object]:
    """Say how documents became rows, and what that wastes."""
    packing = manifest.packing
    cut = packing.cut_documents
    facts: dict[str, object] = {
        "packing": f"{packing.method}, separator {packing.separator}",
        "padding": f"{packing.padding_share:.2%} ({packing.padding_tokens:,} tokens)",
        "documents cut": "not known"
        if cut is None
        else f"{cut:,} ({cut / max(manifest.documents, 1):.1%})",
    }
    for least, count in sorted(manifest.lengths.items(), key=lambda pair: int(pair[0])):
        most = max(0, 2 * int(least) - 1)
        facts[f"documents of {least} to {most} tokens"] = count
    if manifest.derived_from:
        facts["made of shards"] = ", ".join(name[:16] for name in manifest.derived_from)
    return facts


def _cleaning_facts(cleaning: CleaningFacts) -> dict[str, object]:
    """Say what was done to documents before they were tokenised."""
    facts: dict[str, object] = {
        "cleaning kept": f"{cleaning.documents_kept:,} of {cleaning.documents_read:,} documents, "
        f"{cleaning.bytes_kept:,} of {cleaning.bytes_read:,} bytes",
    }
    facts |= {f"removed: {reason}": count for reason, count in cleaning.removed.items()}
    facts |= {f"changed: {kind}": count for kind, count in cleaning.changed.items()}
    facts |= {f"compared with {path}": sha[:16] for path, sha in cleaning.evaluation_sets.items()}
    return facts


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=file) from None
    if not isinstance(tree, dict):
        raise DataError("is no JSON object", where=file)
    return tree
