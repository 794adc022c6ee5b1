"""Claims about a cluster: they hold where all is well, and each fails for what it is to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.configs.schema import KernelConfig
from shoal.trainer import plain, probe, qualification
from shoal.trainer.plain import Case, count_targets, make_batches, train_plain
from shoal.trainer.qualification import (
    LIMITS,
    Claim,
    prove_checkpoints,
    prove_links,
    prove_stages,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages and a size stand for all: the whole is one test of the command."""
    monkeypatch.setattr(qualification, "STAGES", {"fp32": (3,), "bf16": (2,)})
    monkeypatch.setattr(qualification, "SIZES", {"cpu": (1 << 16,)})
    small = qualification.SHAPES["cpu"].model_copy(update={"vocab_size": 512, "width": 64})
    monkeypatch.setattr(qualification, "SHAPES", {"cpu": small})


def by_name(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.claim: claim for claim in claims}


def test_stages_hold_with_figures() -> None:
    claims = by_name(list(prove_stages(CPU, KernelConfig())))
    kinds = ("dense", "moe")
    assert list(claims) == [
        f"ZeRO {stage}, {precision}, {kind}"
        for kind in kinds
        for precision, stage in (("fp32", 3), ("bf16", 2))
    ]
    for name, claim in claims.items():
        assert claim.holds, claim
        assert claim.limit == LIMITS["bf16" if "bf16" in name else "fp32", "cpu"]
        assert 0 <= claim.figure <= claim.limit


def test_another_learning_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_faster(case: Case, device: torch.device) -> list[float]:
        faster = plain.OPTIM.model_copy(update={"lr": plain.OPTIM.lr * 1.3})
        with monkeypatch.context() as patch:
            patch.setattr(plain, "OPTIM", faster)
            return train_plain(case, device)

    monkeypatch.setattr(qualification, "train_plain", train_faster)
    claims = list(prove_stages(CPU, KernelConfig()))
    assert len(claims) == 4
    assert not any(claim.holds for claim in claims), claims
    assert all("instead of" in claim.text for claim in claims)


def test_losses_that_are_no_numbers_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        qualification, "train_sharded", lambda case, *_: [float("nan")] * case.steps
    )
    monkeypatch.setattr(qualification, "train_plain", lambda case, _: [float("nan")] * case.steps)
    claims = list(prove_stages(CPU, KernelConfig()))
    assert claims
    assert not any(claim.holds for claim in claims)
    assert "worst on rank 0" in claims[0].text


def test_the_plain_loop_learns_and_weighs_tokens_alike() -> None:
    case = Case("dense", "fp32", rows=5, steps=6)
    losses = train_plain(case, CPU)
    assert losses[-1] < losses[0] - 0.1
    parts = [make_batches(case, 2, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    real = [batch.real_tokens for part in parts for batch in part]
    assert sum(real) == count_targets(case, 2)
    assert real[-1] == 0, "a padded row"
    assert len(set(real)) > 3, "ragged: a mean over ranks is not the mean over tokens"


def test_sums_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    (claim,) = prove_links(CPU)
    assert claim.holds
    assert (claim.claim, claim.unit) == ("all-reduce of 64 KiB", "GB/s bus bandwidth")
    right = probe.dist.all_reduce

    def reduce_wrongly(tensor: torch.Tensor, *rest: Any) -> None:
        right(tensor, *rest)
        if tensor.dtype == torch.float32:
            tensor[7] += 1

    monkeypatch.setattr(probe.dist, "all_reduce", reduce_wrongly)
    (claim,) = prove_links(CPU)
    assert not claim.holds
    assert "WRONG SUMS" in claim.text


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    written, read = prove_checkpoints(CPU, KernelConfig(), tmp_path)
    assert written.holds and read.holds, read.text
    assert written.figure > 0 and read.figure > 0


def alter_file(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_an_altered_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save: Callable[..., Path] = qualification.save_checkpoint

    def save_and_alter(*arguments: Any, **more: Any) -> Path:
        folder = save(*arguments, **more)
        alter_file(folder)
        return folder

    monkeypatch.setattr(qualification, "save_checkpoint", save_and_alter)
    _, read = prove_checkpoints(CPU, KernelConfig(), tmp_path)
    assert not read.holds
    assert "SHA-256" in read.text


def test_a_tensor_that_comes_back_changed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Callable[..., None] = qualification.load_checkpoint

    def load_and_change(engine: Any, *rest: Any) -> None:
        load(engine, *rest)
        parameter = next(engine.objective.parameters())
        with torch.no_grad():
            parameter.view(-1)[3] += 1e-3

    monkeypatch.setattr(qualification, "load_checkpoint", load_and_change)
    _, read = prove_checkpoints(CPU, KernelConfig(), tmp_path)
    assert not read.holds
    assert "weight of embedding.weight is not what was written" in read.text
