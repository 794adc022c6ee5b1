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
from shoal.configs.schema import ModelConfig, RunConfig, Stream
from shoal.launcher.runs import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.launcher.hosts import Host
    from shoal.launcher.run import Order


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


def print_plan(order: Order, config: RunConfig, hosts: Sequence[Host]) -> None:
    """Print everything a run would do, and start nothing.

    Raises:
        PreflightError: more ranks than GPUs on this machine.
    """
    from shoal.launcher.ways import describe_ways, is_alone, write_batch_script

    if order.show == "sbatch":  # as a file to submit
        print(*write_batch_script(order, config, hosts), sep="\n")
        return
    num_ranks = sum(host.slots for host in hosts)
    batch, train = plan_batch(config, num_ranks), config.train
    model, world = config.model, config.world
    command = shlex.join(command_of(config, num_ranks, order.words))
    limit = f", {world.time_limit_minutes:g} minutes" if world.time_limit_minutes else ""
    lines = {
        "run": f"{config.name} -> {run_folder(config)}",
        **_place_ranks(config, hosts),
        "model": f"{model.family}, {model.num_layers} layers, width {model.width}, "
        f"context {model.context}" + (f", {model.moe.num_experts} experts" if model.moe else ""),
        "batch": f"{batch.rows} rows = {config.step_tokens:,} tokens a step; {batch.describe()}",
        "steps": f"{config.steps:,}",
        "tokens": f"{config.steps * config.step_tokens:,} ({train.tokens:,} asked for)",
        "precision": f"{train.precision}, ZeRO stage {train.zero_stage}",
        "data": ", ".join(map(_describe_stream, config.data.train)) + _count_passes(config),
        "prepare": config.prepare or "nothing: the shards must exist",
        "saves": _describe_checkpoints(config),
        "logs": str(run_folder(config) / "logs"),
        "limits": f"{world.max_restarts + 1} attempts, on {world.min_hosts} or more hosts{limit}",
        **({"command": command} if is_alone(hosts) else {}),
    }
    print("dry run: nothing is started")
    for label, text in lines.items():
        print(f"  {label:<10}{text}")
    print(*describe_ways(order, config, hosts), sep="\n")
    if not (is_alone(hosts) or order.show):
        print("\nother ways: --show pdsh|slurm|none|deepspeed|sbatch|all")


def _place_ranks(config: RunConfig, hosts: Sequence[Host]) -> dict[str, str]:
    """Return which rank runs where; devices of other machines are known to them alone."""
    from shoal.launcher.hosts import is_local
    from shoal.launcher.processes import changed_environment
    from shoal.launcher.world import check_devices, resolve_threads

    first, lines = 0, dict[str, str]()
    for host in hosts:
        noun = "rank" if host.slots == 1 else "ranks"
        numbers = range(first, first + host.slots)
        devices = host.devices or range(host.slots)
        if is_local(host.name):
            with changed_environment(host.device_variables):
                gpus = check_devices(host.slots) == "cuda"
            names = [f"cuda:{device}" if gpus else "cpu" for device in devices]
            threads = resolve_threads(config.world.threads, host.slots)
            name, behind = socket.gethostname(), f"; {threads} CPU threads a rank"
        else:
            names, behind = [f"device {device}" for device in devices], ""
            name = host.name
        places = ", ".join(f"{rank}={device}" for rank, device in zip(numbers, names, strict=True))
        label = "ranks" if len(hosts) == 1 else f"host {len(lines)}"
        lines[label] = f"{host.slots} {noun} on {name}: {places}{behind}"
        first += host.slots
    return lines


def _describe_checkpoints(config: RunConfig) -> str:
    """Say where checkpoints go, how often, and what the run would go on from."""
    from shoal.launcher.screen import newest_checkpoint

    saves, folder = config.checkpoint, run_folder(config) / "checkpoints"
    found = newest_checkpoint(run_folder(config))
    start = f"goes on from {Path(found).name}" if found else "begins at step 0"
    if not found and saves.resume not in ("auto", "never"):
        start = f"begins from {saves.resume}"
    return f"{folder}, every {saves.every_steps} steps, the newest {saves.keep} kept; {start}"


def _describe_stream(stream: Stream) -> str:
    if isinstance(stream.measure, str):
        return f"{stream.path} ({stream.measure})"
    return stream.path if stream.share == 1.0 else f"{stream.path} (weight {stream.share:g})"


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
    from shoal.launcher.ways import script_path
    from shoal.launcher.world import resolve_ranks

    asked = resolve_ranks(config.world.ranks) == num_ranks
    extra = [] if asked else [f"world.ranks={num_ranks}"]
    return [sys.executable, script_path(), *argv, *extra]


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


def _teacher_shape(config: RunConfig) -> ModelConfig | None:
    """Return the shape of the run's teacher; None without one, and where it is yet to be made."""
    if config.teacher is None or not Path(config.teacher.path).is_dir():
        return None
    from shoal.trainer.export import read_shape

    return read_shape(Path(config.teacher.path))


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
    teacher = _teacher_shape(config)
    training = training_flops_per_token(model, model.context, teacher)
    left_out = ", without the teacher" if config.teacher and not teacher else ""
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
        f"training FLOPs per token{left_out}": f"{training:,}",
        "training tokens": f"{config.steps * config.step_tokens:,}",
        f"training FLOPs{left_out}": f"{training * config.steps * config.step_tokens:.3g}",
    }.items():
        table.add_row(label, value)
    return table
