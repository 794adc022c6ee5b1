"""Whether a run may go on from a checkpoint, or ranks with each other: the same, on the same."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.configs.errors import ConfigError, DataError, ReplicaError
from shoal.configs.load import build_config
from shoal.configs.schema import RunConfig
from shoal.trainer.teamwork import gather

_OTHERWISE = {"teacher": "by another teacher", "order": "on rows in another order"}


def check_same_run(stored: dict[str, Any], config: RunConfig, where: Path) -> None:
    """Refuse to continue a run whose config would give another result.

    Raises:
        ConfigError: naming the keys that differ.
    """
    # Read as a config of today: keys that are new since then have their defaults in both.
    theirs = build_config(RunConfig, stored, where=where).determinants()
    ours = config.determinants()
    differing = {
        key: f"{theirs.get(key)}, now {ours.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in config.checkpoint.allow_changes
    }
    if stored.get("name") != config.name and config.checkpoint.resume in ("auto", "never"):
        differing["name"] = f"{stored.get('name')}, now {config.name}"
    if differing:
        changes = "; ".join(f"{key} (was {change})" for key, change in differing.items())
        raise ConfigError(
            f"this run was started with another {changes}",
            where=where,
            fix="give the changed run another name=, restore the old values, or allow the change: "
            f"'checkpoint.allow_changes=[{', '.join(key for key in differing if key != 'name')}]'",
        )


def check_same_inputs(
    stored: Mapping[str, Any],
    position: Mapping[str, Any],
    where: Path,
    allowed: Collection[str] = (),
) -> None:
    """Refuse a checkpoint of other shards, or of another teacher, than those at hand.

    Args:
        stored: `position` of the checkpoint.
        position: Hashes and weights of the shards, hash of the teacher, as now opened.
        where: The checkpoint.
        allowed: Of `streams` and `teacher` those that may be others.

    Raises:
        DataError: they are not the same.
    """
    for key, now_there in position.items():
        if key in allowed:
            continue
        if key == "teacher" and key not in stored:
            continue  # saved before teachers were remembered
        if stored.get(key) != now_there:
            what = _OTHERWISE.get(key, "on other rows")
            raise DataError(
                f"was trained {what}: {stored.get(key)}, now {now_there}",
                where=where,
                fix="point data.train and teacher.path at what the run was started with, or allow "
                f"the change: 'checkpoint.allow_changes=[{key}]'",
            )


def check_same_on_ranks(config: RunConfig, position: Mapping[str, Any]) -> None:
    """Refuse ranks that would train something else than rank 0; collective, and raised on all.

    A host whose folder or packages are not those of the others has such ranks: each updates its own
    part of the weights, and no later comparison would tell.

    Args:
        config: As this rank has read it.
        position: Hashes and weights of the shards, hash of the teacher, as this rank has opened
            them.

    Raises:
        ConfigError: names the ranks and the keys.
    """
    own = config.determinants() | dict(position)
    found = gather(own)
    first = found[0]
    for rank, theirs in enumerate(found):
        differing = [
            f"{key} ({theirs.get(key)}, on rank 0 {first.get(key)})"
            for key in sorted(theirs.keys() | first.keys())
            if theirs.get(key) != first.get(key)
        ]
        if differing:
            raise ConfigError(
                f"rank {rank} was given another {'; '.join(differing)}",
                fix="all hosts must share this folder, the shards and the same packages: "
                "`shoal check --hostfile hosts` says what differs",
            )


def name_odd_replicas(odd: Sequence[int], step: int, where: object) -> ReplicaError:
    """Return the error for ranks whose weights are not those of the others; collective."""
    hosts = gather(socket.gethostname())
    ranks = ", ".join(f"{rank} on {hosts[rank]}" for rank in odd)
    error = ReplicaError(
        f"the weights of rank {ranks} are not those of the others after step {step}",
        where=where,
        fix="if it happens again, leave out that device: its memory is not sound",
    )
    error.origin = f"rank {odd[0]} on {hosts[odd[0]]}"
    return error
