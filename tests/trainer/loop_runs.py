"""Runs of the training loop with a real engine, in this process."""

import engine_ranks

from shoal.trainer.metrics import read_metrics

STEPS = 6


def make_case(folder, **more):
    return {"kind": "dense", "stage": 0, "steps": STEPS, "folder": str(folder), **more}


def run(folder, **more):
    """Run the loop here; raise what it raised."""
    keys = ("source", "engine", "validation", "position", "progress")
    extra = {key: more.pop(key) for key in keys if key in more}
    return engine_ranks.run_loop(make_case(folder, **more), **extra)


def curve(folder, kind="train", key="loss"):
    return {r["step"]: r[key] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == kind}


def steps_on_disk(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
