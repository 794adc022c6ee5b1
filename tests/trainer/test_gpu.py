"""The engine on CUDA: bf16 at ZeRO 1 to 3 against a plain loop, and checkpoints across devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import engine_ranks
import pytest
import torch
from rank_groups import free_port, rank_environment

from shoal.trainer import checkpoint
from shoal.trainer.engine import start_process_group, stop_process_group

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    # The suite hides CUDA from its own processes; the one that trains here sees it again.
    pytest.mark.skipif(not any(map(Path.exists, DRIVERS)), reason="needs a CUDA device"),
]

STEPS = 10
KINDS = ("dense", "gpt2", "moe")


def make_case(kind, stage, root):
    return {
        "kind": kind,
        "stage": stage,
        "precision": "bf16",
        "steps": STEPS,
        "more": 2,
        "schedule_steps": STEPS + 2,
        "device": "cuda",
        "save": str(root / f"{kind}-{stage}"),
    }


def run_all(root):
    """Train every case on the one GPU of a process of its own; return the answers."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")  # as conftest set them
    }
    command = [sys.executable, __file__, str(root)]
    settings = environment | rank_environment(0, 1, free_port())
    subprocess.run(command, env=settings, check=True, timeout=500)
    return json.loads((root / "answers.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    return root, run_all(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_as_exact_as_a_plain_bf16_loop(trained, kind, stage):
    got = trained[1][f"{kind} {stage}"]
    noisy, exact = (trained[1][f"{kind} plain {precision}"] for precision in ("bf16", "fp32"))
    assert got["losses"][-1] < got["losses"][0] - 0.3
    for key in ("losses", "norms"):
        noise = max(abs(a - b) for a, b in zip(noisy[key], exact[key], strict=True))
        error = max(abs(a - b) for a, b in zip(got[key], exact[key], strict=True))
        # Three times: two draws of the same noise differ.
        assert 0 < error <= 3 * noise, (key, error, noise)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpoints_load_at_other_stages_bit_for_bit(trained, stage):
    _, answers = trained
    for source, answer in answers[f"loads {stage}"]["loads"].items():
        assert answer["state"] == answers[source]["state"]
        # bf16 activations: see test_checkpoint.
        assert answer["more"] == pytest.approx(answers[source]["more"], abs=1e-2)


def test_files_hold_what_the_engine_held(trained):
    root, answers = trained
    found = checkpoint.newest_checkpoint(root / "moe-2")
    assert found is not None
    reader = checkpoint.TensorReader(*found)
    state = ((n, k, reader.read(n, k)) for n, kinds in found[1].tensors.items() for k in kinds)
    assert engine_ranks.fingerprints(state) == answers["moe 2"]["state"]


def main(root: Path) -> None:
    device = torch.device("cuda")
    start_process_group(device, timeout_seconds=120)
    answers = {}
    for kind in KINDS:
        for precision in ("bf16", "fp32"):
            # Two steps more than are taken: the schedule of a run that is saved on the way.
            plain = {"kind": kind, "steps": STEPS + 2, "precision": precision, "device": "cuda"}
            curves = engine_ranks.train_plain(plain)
            answers[f"{kind} plain {precision}"] = {k: v[:STEPS] for k, v in curves.items()}
        for stage in (1, 2, 3):
            answers[f"{kind} {stage}"] = engine_ranks.run_train(make_case(kind, stage, root))
    sources = {f"moe {stage}": str(root / f"moe-{stage}") for stage in (1, 2, 3)}
    for stage in (1, 2, 3):
        case = make_case("moe", stage, root) | {"sources": sources}
        answers[f"loads {stage}"] = engine_ranks.run_load(case)
    (root / "answers.json").write_text(json.dumps(answers))
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
