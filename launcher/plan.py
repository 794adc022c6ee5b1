"""What a run will be before it is started: ranks, batch, steps; shape, memory and FLOPs."""

from __future__ import annotations

import shlex
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.configs.errors import ConfigError
from shoal.configs.schema import RunConfig, Stream

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step is dealt out, alike to every rank."""

    rows: int
    ranks: int
    micro_batches: tuple[int, ...]
    """Rows of each forward pass of one rank."""
    padded_rows: int

    def describe(self) -> str:
        """Return the share of one rank and the padding of all, in words."""
        passes = Counter(self.micro_batches)
        share = " + ".join(f"{count} x {rows}" for rows, count in passes.items())
        noun = "row" if self.padded_rows == 1 else "rows"
        return f"each rank {share} rows; {self.padded_rows} padded {noun}"


def plan_batch(config: RunConfig, num_ranks: int) -> BatchPlan:
    """Deal `batch_rows` to the ranks as the loader will."""
    from shoal.data_pipeline.loader import deal_rows

    rows = config.train.batch_rows
    micro_batches = deal_rows(rows, config.train.micro_batch_rows, num_ranks)
    return BatchPlan(rows, num_ranks, micro_batches, num_ranks * sum(micro_batches) - rows)


def print_plan(config: RunConfig, num_ranks: int, argv: Sequence[str]) -> None:
    """Print everything a run would do, and start nothing.

    Raises:
        PreflightError: more ranks than GPUs on this machine.
    """
    from shoal.launcher.processes import WORKER
    from shoal.launcher.world import check_devices, resolve_threads

    device = check_devices(num_ranks)
    threads = resolve_threads(config.world.threads, num_ranks)
    batch, train, model = plan_batch(config, num_ranks), config.train, config.model
    noun = "rank" if num_ranks == 1 else "ranks"
    ranks = [f"{r}={device}{f':{r}' if device == 'cuda' else ''}" for r in range(num_ranks)]
    torchrun = ["torchrun", "--standalone", f"--nproc-per-node={num_ranks}", "--no-python"]
    lines = {
        "run": f"{config.name} -> {Path(config.output) / config.name}",
        "ranks": f"{num_ranks} {noun} on {socket.gethostname()}: {' '.join(ranks)}",
        "threads": f"{threads} CPU threads a rank",
        "model": f"{model.family}, {model.num_layers} layers, width {model.width}, "
        f"context {model.context}" + (f", {model.moe.num_experts} experts" if model.moe else ""),
        "batch": f"{batch.rows} rows = {config.step_tokens:,} tokens a step; {batch.describe()}",
        "steps": f"{config.steps:,}",
        "tokens": f"{config.steps * config.step_tokens:,} ({train.tokens:,} asked for)",
        "precision": f"{train.precision}, ZeRO stage {train.zero_stage}",
        "data": ", ".join(map(_describe_stream, config.data.train)) + _count_passes(config),
        "prepare": config.prepare or "nothing: the shards must exist",
        "command": shlex.join(command_of(config, num_ranks, argv)),
        "starts": shlex.join([*torchrun, *WORKER, *argv]),
    }
    print("dry run: nothing is started")
    for label, text in lines.items():
        print(f"  {label:<10}{text}")


def _describe_stream(stream: Stream) -> str:
    return stream.path if stream.weight == 1.0 else f"{stream.path} (weight {stream.weight:g})"


def _count_passes(config: RunConfig) -> str:
    """Say how often the run reads its rows, where it has one stream and that exists."""
    from shoal.data_pipeline.shards import read_manifest

    folder = Path(config.data.train[0].path)
    if len(config.data.train) > 1 or not (folder / "manifest.json").is_file():
        return ""
    held = read_manifest(folder).rows * config.model.context
    return f": {held:,} tokens, read {config.steps * config.step_tokens / held:,.1f} times"


def command_of(config: RunConfig, num_ranks: int, argv: Sequence[str]) -> list[str]:
    """Return what a user can run from here for this plan, with or without its hostfile.

    `world.ranks` says what a hostfile of this machine says, and changes nothing else of a run.
    """
    from shoal.launcher.world import resolve_ranks

    script = Path(__file__).with_name("run.py")
    here = Path("launcher/run.py")
    if here.is_file() and here.samefile(script):
        script = here
    asked = resolve_ranks(config.world.ranks) == num_ranks
    return [sys.executable, str(script), *argv, *([] if asked else [f"world.ranks={num_ranks}"])]


def find_vocab_size(config: RunConfig) -> int:
    """Return the vocabulary the model will have, without preparing anything.

    Raises:
        ConfigError: neither the config, nor existing shards, nor the corpus config tell.
    """
    if config.model.vocab_size:
        return config.model.vocab_size
    folder = Path(config.data.train[0].path)
    if (folder / "manifest.json").is_file():
        from shoal.data_pipeline.shards import read_manifest

        return _padded(config, read_manifest(folder).vocab_size)
    if config.prepare:
        from shoal.configs.corpus import PrepareConfig
        from shoal.configs.load import load_config

        trained = load_config(PrepareConfig, config.prepare).tokenizer.vocab_size
        if trained:
            return _padded(config, trained)
    raise ConfigError(
        "the vocabulary size is not known before the shards are",
        where="model.vocab_size",
        fix="prepare the corpus first, or add model.vocab_size=N",
    )


def _padded(config: RunConfig, entries: int) -> int:
    return config.model.with_vocab(entries).vocab_size or entries


def shape_table(config: RunConfig, context: int, precision: str) -> Table:
    """Return parameters, inference memory and FLOPs of the model a config describes."""
    from rich.table import Table

    from shoal.trainer.cost import (
        count_parameters,
        flops_per_token,
        kv_bytes_per_token,
        resident_bytes,
        training_flops_per_token,
    )

    model = config.model.model_copy(update={"vocab_size": find_vocab_size(config)})
    counts = count_parameters(model)
    table = Table(title=f"{config.name}: exports as {model.export_class}", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    training = training_flops_per_token(model, model.context)
    flops = flops_per_token(model, context).total
    for label, value in {
        "vocabulary": f"{model.vocab_size:,}",
        "parameters, total": f"{counts.total:,}",
        "parameters, active per token": f"{counts.active:,}",
        "parameters, embedding": f"{counts.embedding:,}",
        f"inference FLOPs per token at context {context}": f"{flops:,}",
        f"resident bytes in {precision}": f"{resident_bytes(model, precision):,}",
        f"KV bytes per token in {precision}": f"{kv_bytes_per_token(model, precision):,}",
        f"KV bytes at context {context}": f"{kv_bytes_per_token(model, precision) * context:,}",
        "training FLOPs per token": f"{training:,}",
        "training tokens": f"{config.steps * config.step_tokens:,}",
        "training FLOPs": f"{training * config.steps * config.step_tokens:.3g}",
    }.items():
        table.add_row(label, value)
    return table
