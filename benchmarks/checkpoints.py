"""Checkpoints: what a save keeps training waiting for, against a bare copy and the usual ways.

One rank at stage 1 in bf16 with fp32 masters. The peers write the same state: a clone of the
slices writes nothing, `torch.save` writes one file without syncing, hashing or verifying it, and
DeepSpeed's own save_checkpoint writes its format.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.claims import (
    Claim,
    Target,
    Turns,
    make_parser,
    print_claim,
    take_turns,
    time_call,
    use_all_cores,
)
from benchmarks.speed import be_the_only_rank

if TYPE_CHECKING:
    from benchmarks.contestants import EngineLoop
    from shoal.configs.schema import ModelConfig
    from shoal.data_pipeline.batch import Batch
    from shoal.trainer.saver import Saver


@dataclass(frozen=True)
class Scale:
    """Sizes: of the model, of the batch, and of the stretch that holds one save."""

    layers: int
    width: int
    vocab_size: int
    context: int
    rows: int
    steps: int
    rounds: int


QUICK = Scale(layers=4, width=256, vocab_size=4096, context=64, rows=2, steps=20, rounds=5)
FULL = Scale(layers=12, width=576, vocab_size=16384, context=64, rows=2, steps=100, rounds=5)
"""62M parameters."""


def main() -> None:
    """Print a line for every claim."""
    import torch

    from shoal.trainer.engine import start_process_group, stop_process_group

    scale = QUICK if make_parser(__doc__).parse_args().quick else FULL
    use_all_cores()
    be_the_only_rank()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_process_group(device, timeout_seconds=120)
    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        for claim in measure(scale, device, Path(folder)):
            print_claim(claim)
    stop_process_group()


def measure(scale: Scale, device: Any, folder: Path) -> Iterator[Claim]:
    """Yield the claims of one device."""
    from benchmarks.contestants import EngineLoop, build_objective
    from shoal.trainer.checkpoint import Retention
    from shoal.trainer.saver import Saver
    from shoal.trainer.stores import SharedFolder

    config = model_config(scale)
    loop = EngineLoop(
        build_objective(config, "bf16", device), "bf16", make_batches(scale, device), device
    )
    loop.step()
    saver, numbers = Saver(SharedFolder(folder / "ours"), Retention(1)), itertools.count(1)
    parameters = sum(p.numel() for p in loop.engine.objective.parameters())
    setup = {"parameters": parameters, "device": device.type, "precision": "bf16", "ranks": 1}

    def stall() -> float:
        return time_stall(loop, saver, next(numbers))

    def peers() -> Iterator[tuple[str, Any, Target]]:
        yield "a clone of its slices", lambda: time_clone(loop), Target("<=", 1.3)
        yield "torch.save", lambda: time_torch_save(loop, folder), Target("<=", 0.5)
        yield "DeepSpeed's save_checkpoint", lambda: time_deepspeed(loop, folder), Target("<=", 0.5)

    for name, peer, target in peers():
        turns = take_turns(stall, peer, scale.rounds)
        claim = f"stall of a save against {name}, {device.type}"
        yield Claim.from_turns(claim, "s", turns, target, setup)
    fewer = max(2, scale.rounds // 2)
    turns = time_first_saves(loop, folder / "first", fewer)
    claim = f"stall of a run's first save against a clone in new memory, {device.type}"
    yield Claim.from_turns(claim, "s", turns, Target("<=", 1.3), setup)
    turns = take_turns(
        lambda: time_stretch(loop, scale.steps, saver, next(numbers)),
        lambda: time_stretch(loop, scale.steps, None, 0),
        fewer,
    )
    claim = f"{scale.steps} steps with a save against as many without, {device.type}"
    yield Claim.from_turns(claim, "s", turns, Target("<=", 1.03), setup)
    loop.engine.close()


def time_stall(loop: EngineLoop, saver: Saver, number: int) -> float:
    """Save, and wait for it; return the seconds that training would have waited."""
    seconds = saver.begin(loop.engine, number, {}, {})
    saver.finish()
    return seconds


def time_first_saves(loop: EngineLoop, root: Path, rounds: int) -> Turns:
    """Time the first saves of so many new runs, which get memory for the copy, and clones."""
    from shoal.trainer.checkpoint import Retention
    from shoal.trainer.saver import Saver
    from shoal.trainer.stores import SharedFolder

    # All are kept, or the next one would get the memory of the last.
    savers, clones = list[Saver](), list[Any]()

    def stall() -> float:
        savers.append(Saver(SharedFolder(root), Retention(1)))
        return time_stall(loop, savers[-1], len(savers))

    return take_turns(stall, lambda: time_clone(loop, clones.append), rounds)


def time_clone(loop: EngineLoop, keep: Callable[[Any], object] = lambda copy: None) -> float:
    """Copy what the rank holds to the CPU, and nothing else; `keep` gets the copies."""

    def work() -> None:
        for _, _, _, values in loop.engine.read_slices():
            keep(values.detach().to("cpu", copy=True))

    return time_call(work)


def time_torch_save(loop: EngineLoop, folder: Path) -> float:
    """Write the same state by torch.save."""
    import torch

    state = {f"{state}/{name}": values for name, state, _, values in loop.engine.read_slices()}
    seconds = time_call(lambda: torch.save(state, folder / "torch.pt"))
    (folder / "torch.pt").unlink()
    return seconds


def time_deepspeed(loop: EngineLoop, folder: Path) -> float:
    """Write DeepSpeed's own checkpoint."""
    native = loop.engine._engine  # a peer is called as its users call it
    seconds = time_call(lambda: native.save_checkpoint(str(folder / "deepspeed")))
    shutil.rmtree(folder / "deepspeed")
    return seconds


def time_stretch(loop: EngineLoop, steps: int, saver: Saver | None, number: int) -> float:
    """Train so many steps, in the middle of which a save begins; it ends within them.

    As in a run, replicas are compared in the step after it.
    """
    begun = time.perf_counter()
    for step in range(steps):
        if saver and step == steps // 4:
            saver.begin(loop.engine, number, {}, {}, sound=False)
        loop.step()
        if saver and saver.awaits_word:
            saver.vouch(sound=not loop.engine.compare_replicas())
    if saver:
        saver.finish()
    return time.perf_counter() - begun


def model_config(scale: Scale) -> ModelConfig:
    """Return the shape that is trained."""
    from shoal.configs.schema import ModelConfig

    return ModelConfig(
        vocab_size=scale.vocab_size,
        context=scale.context,
        num_layers=scale.layers,
        width=scale.width,
        num_heads=scale.width // 64,
    )


def make_batches(scale: Scale, device: Any) -> Sequence[Batch]:
    """Return a batch of random tokens: no figure here depends on what is learned."""
    import torch

    from shoal.data_pipeline.batch import Batch

    generator = torch.Generator().manual_seed(0)
    size = (scale.rows, scale.context + 1)
    tokens = torch.randint(0, scale.vocab_size, size, generator=generator)
    segments = torch.zeros(scale.rows, scale.context, dtype=torch.int32)
    return [Batch(tokens[:, :-1], tokens[:, 1:], segments, torch.arange(scale.rows))]


if __name__ == "__main__":
    main()
