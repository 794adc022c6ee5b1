"""Training speed: the engine against a plain loop, ours against transformers, MoE against dense.

Where there is a GPU, it and the CPU are measured in processes of their own: DeepSpeed settles on
one kind of device a process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.claims import (
    Claim,
    Target,
    WrongResultError,
    check_equal,
    make_parser,
    print_claim,
    take_turns,
    use_all_cores,
)

if TYPE_CHECKING:
    import torch

    from benchmarks.contestants import Contestant
    from shoal.configs.schema import ModelConfig
    from shoal.data_pipeline.batch import Batch

WARM_UP = 2
NUM_BATCHES = 8
LOSS_TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
"""Of mean losses in nats. In bf16 every side rounds at other places: any bf16 run differs from an
fp32 run by about 1e-3, and engine and plain loop from each other as much."""


@dataclass(frozen=True)
class Scale:
    """Sizes of one device: of the model, of the batch, and of the layer for the MoE claim."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    rows: int
    rounds: int
    layer_tokens: int
    layer_width: int


SCALES = {
    ("cpu", True): Scale(4, 256, 4, 4096, 128, 4, 9, 1024, 384),
    # 17M parameters: large enough that matrix products, not calls, take the time.
    ("cpu", False): Scale(6, 384, 6, 16384, 256, 8, 25, 2048, 384),
    ("cuda", True): Scale(6, 512, 8, 16384, 1024, 8, 21, 16384, 768),
    ("cuda", False): Scale(12, 768, 12, 16384, 1024, 16, 51, 16384, 768),
}


def main() -> None:
    """Print a line for every claim."""
    from shoal.launcher.world import count_gpus

    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.device is None and count_gpus():
        _run_each(arguments.quick)
        return
    import torch

    use_all_cores()
    device = torch.device(arguments.device or "cpu")
    for claim in measure(SCALES[device.type, arguments.quick], device):
        print_claim(claim)


def _run_each(quick: bool) -> None:
    """Measure either device in a child, the CPU's without a GPU in sight."""
    for device in ("cpu", "cuda"):
        command = [sys.executable, "-m", "benchmarks.speed", "--device", device]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        flags = ["--quick"] if quick else []
        subprocess.run([*command, *flags], env=os.environ | hidden, check=True)


def measure(scale: Scale, device: torch.device) -> Iterator[Claim]:
    """Yield the claims of one device."""
    from shoal.trainer.engine import start_process_group, stop_process_group

    with tempfile.TemporaryDirectory(prefix="shoal-benchmark-") as folder:
        masked, plain = _read_batches(Path(folder), scale)
    be_the_only_rank()
    start_process_group(device, timeout_seconds=120)
    for precision in ("fp32", "bf16"):
        yield measure_engine(scale, device, precision, masked)
    stop_process_group()
    for precision in ("fp32", "bf16"):
        yield measure_llama(scale, device, precision, plain)
    yield measure_experts(scale, device)


def _read_batches(folder: Path, scale: Scale) -> tuple[list[Batch], list[Batch]]:
    """Return batches of the sample corpus, with and without a document mask."""
    from benchmarks import samples
    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.rows import Rows
    from shoal.data_pipeline.shards import prepare

    config = samples.make_config(
        folder / "corpus", scale.context, vocab_size=scale.vocab_size, max_bytes=1_000_000
    )
    rows = Rows.open(prepare(config).train)

    def read(document_mask: bool) -> list[Batch]:
        loader = Loader(
            [(rows, 1.0)],
            seed=0,
            batch_rows=scale.rows,
            micro_batch_rows=scale.rows,
            document_mask=document_mask,
        )
        return [loader.microbatches(step)[0] for step in range(NUM_BATCHES)]

    return read(True), read(False)


def be_the_only_rank() -> None:
    """Say what a launcher would tell the one rank of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in facts.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")


def _model_config(scale: Scale) -> ModelConfig:
    from shoal.configs.schema import ModelConfig

    return ModelConfig(
        vocab_size=scale.vocab_size,
        context=scale.context,
        num_layers=scale.layers,
        width=scale.width,
        num_heads=scale.heads,
    )


def _describe(scale: Scale, device: torch.device, precision: str, **more: Any) -> dict[str, Any]:
    from benchmarks.contestants import choose_kernels

    return {
        "device": device.type,
        "precision": precision,
        "kernels": asdict(choose_kernels(precision, device)),
        **more,
    }


def _describe_model(scale: Scale, device: torch.device, precision: str) -> dict[str, Any]:
    config = _model_config(scale)
    names = ("num_layers", "width", "num_heads", "vocab_size", "context")
    shape = {name: getattr(config, name) for name in names}
    return _describe(scale, device, precision, **shape, rows=scale.rows)


def measure_engine(
    scale: Scale, device: torch.device, precision: str, batches: Sequence[Batch]
) -> Claim:
    """Compare a step of the engine with a step of the plain loop that computes the same."""
    from benchmarks.contestants import EngineLoop, PlainLoop, build_objective

    config = _model_config(scale)
    ours = EngineLoop(build_objective(config, precision, device), precision, batches, device)
    peer = PlainLoop(build_objective(config, precision, device), precision, batches, device)
    turns = take_turns(ours.step, peer.step, scale.rounds, warm_up=WARM_UP)
    ours.engine.close()
    _check_losses(ours, peer, precision)
    name = f"engine at stage 1 against a plain loop, {precision}, {device.type}"
    setup = _describe_model(scale, device, precision)
    return Claim.from_turns(name, "s/step", turns, Target("<=", 1.03), setup)


def measure_llama(
    scale: Scale, device: torch.device, precision: str, batches: Sequence[Batch]
) -> Claim:
    """Compare our model and loss with LlamaForCausalLM and its own, each in a plain loop."""
    from benchmarks.contestants import LlamaLoop, PlainLoop, build_llama, build_objective

    objective = build_objective(_model_config(scale), precision, device)
    peer = LlamaLoop(build_llama(objective), precision, batches, device)
    ours = PlainLoop(objective, precision, batches, device)
    turns = take_turns(ours.rate, peer.rate, scale.rounds, warm_up=WARM_UP)
    _check_losses(ours, peer, precision)
    name = f"model and loss against LlamaForCausalLM, {precision}, {device.type}"
    target = Target(">=", 1.0 if precision == "fp32" else 1.3)
    setup = _describe_model(scale, device, precision)
    return Claim.from_turns(name, "tokens/s", turns, target, setup)


def _check_losses(ours: Contestant, peer: Contestant, precision: str) -> None:
    """Check that both learned, and learned the same."""
    tolerance = LOSS_TOLERANCES[precision]
    if not max(peer.losses) - min(peer.losses) > 10 * tolerance:
        raise WrongResultError(f"losses hardly moved, equal ones prove nothing: {peer.losses}")
    what = f"losses of {type(ours).__name__} and {type(peer).__name__}, {precision}"
    check_equal(what, ours.losses, peer.losses, tolerance)


def measure_experts(scale: Scale, device: torch.device) -> Claim:
    """Compare a layer of 8 experts, 2 active, with a dense one that multiplies as much."""
    import torch

    from benchmarks.contestants import time_layer

    precision = "fp32" if device.type == "cpu" else "bf16"  # CUDA's grouped_mm knows bf16 alone
    experts, dense, kernels = _build_layers(scale, device, precision)
    generator = torch.Generator().manual_seed(0)
    shape = (1, scale.layer_tokens, scale.layer_width)
    states, grad = (
        torch.randn(shape, generator=generator).to(device, experts.router.dtype) for _ in range(2)
    )
    states.requires_grad_()
    with torch.no_grad():
        grouped, experts.backend = experts(states)[0], "loop"
        looped, experts.backend = experts(states)[0], kernels.experts
    tolerance = 1e-5 if precision == "fp32" else 1e-2  # of outputs well below 1
    check_equal("grouped_mm and loop", grouped.float().cpu(), looped.float().cpu(), tolerance)

    def run_experts() -> float:
        experts.zero_grad()
        return time_layer(lambda x: experts(x)[0], states, grad)

    def run_dense() -> float:
        dense.zero_grad()
        return time_layer(dense, states, grad)

    turns = take_turns(run_experts, run_dense, 2 * scale.rounds, warm_up=WARM_UP)
    name = f"MoE layer (8 experts, 2 active) against dense, {precision}, {device.type}"
    setup = _describe(
        scale, device, precision, tokens=scale.layer_tokens, width=scale.layer_width
    ) | {"kernels": asdict(kernels)}
    target = Target("<=", 1.25 if device.type == "cpu" else 1.2)
    return Claim.from_turns(name, "s/step", turns, target, setup)


def _build_layers(scale: Scale, device: torch.device, precision: str) -> tuple[Any, Any, Any]:
    """Return the layers, equal in active weights but for the router, and the kernels."""
    import torch

    from benchmarks.contestants import DTYPES
    from shoal.configs.schema import KernelConfig, ModelConfig, MoEConfig
    from shoal.kernels.backend import resolve
    from shoal.trainer.model import GatedFeedForward
    from shoal.trainer.moe import MixtureOfExperts

    hidden = 8 * scale.layer_width // 3
    config = ModelConfig(width=scale.layer_width, num_heads=scale.layer_width // 64, hidden=hidden)
    moe = MoEConfig(num_experts=8, active_experts=2, hidden=hidden // 2)
    kernels = resolve(KernelConfig(experts="grouped_mm"), device, DTYPES[precision])
    layers = (
        MixtureOfExperts(config.model_copy(update={"moe": moe}), kernels),
        GatedFeedForward(config),
    )
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.02, generator=generator)
        layer.to(device, DTYPES[precision])
    return *layers, kernels


if __name__ == "__main__":
    main()
