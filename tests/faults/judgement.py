"""Whether anything was lost: a job that was disturbed against one that was not."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

from tests.faults.job import STEPS, Job

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
"""For other rank counts, which sum in another order."""


class LostError(AssertionError):
    """Something was."""


def count_lost(job: Job, reference: Job) -> tuple[int, int]:
    """Return how many rows a job has missed that the reference has trained on, and the opposite."""
    had, should = (
        Counter((step, row) for step, rows in one.rows().items() for row in rows)
        for one in (job, reference)
    )
    return (should - had).total(), (had - should).total()


def check_same(job: Job, reference: Job) -> None:
    """Compare steps, losses and the last checkpoint: bit for bit where the ranks stayed the same.

    Raises:
        LostError: they differ.
    """
    losses, expected = _losses(job), _losses(reference)
    if _ranks(job) == _ranks(reference):
        if losses != expected:
            raise LostError("other losses than undisturbed")
        if _manifest(job)["files"] != _manifest(reference)["files"]:
            raise LostError("other weights or moments than undisturbed")
        return
    worst = max(abs(losses[step] - expected[step]) for step in losses)
    if worst > LOSS_TOLERANCE:
        raise LostError(f"losses differ by {worst:.3g}, more than {LOSS_TOLERANCE:g}")
    worst = compare_weights(job, reference)
    if worst > WEIGHT_TOLERANCE:
        raise LostError(f"weights differ by {worst:.3g}, more than {WEIGHT_TOLERANCE:g}")


def compare_weights(job: Job, reference: Job) -> float:
    """Return by how much the weights of the last checkpoints differ at most."""
    from shoal.trainer.checkpoint import TensorReader, verify_checkpoint

    one, other = (
        TensorReader(folder, verify_checkpoint(folder))
        for folder in (job.checkpoints()[-1], reference.checkpoints()[-1])
    )
    names = one.manifest.tensors.keys()
    if names != other.manifest.tensors.keys():
        raise LostError("other parameters than undisturbed")
    return max(float(torch.abs(one.read(name) - other.read(name)).max()) for name in names)


def _losses(job: Job) -> dict[int, float]:
    records = job.records("train")
    done = {r["step"] for r in records} | {r["step"] for r in job.records("skipped")}
    if len({r["step"] for r in records}) != len(records) or done != set(range(1, STEPS + 1)):
        raise LostError("the metrics have steps twice, or not at all")
    return {r["step"]: r["loss"] for r in records}


def _ranks(job: Job) -> set[int]:
    """Return with how many ranks the steps were taken that led to the end."""
    return {record["ranks"] for record in job.records("start")}


def _manifest(job: Job) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((job.checkpoints()[-1] / "manifest.json").read_text())
    if manifest["step"] != STEPS:
        raise LostError(f"the last checkpoint is step {manifest['step']}")
    return manifest
