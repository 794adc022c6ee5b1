"""Groups of ranks for the trainer's tests: forked from one server that has imported everything."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import socket
from pathlib import Path
from typing import Any

import engine_ranks

# Imported once, in the server that ranks are forked from: 5 s of the 6 s that a rank's start takes.
PRELOADED = [
    "deepspeed",
    "torch._dynamo",
    "shoal.data_pipeline.loader",
    "shoal.trainer.loop",
    "shoal.trainer.objective",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what a launcher would tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


class Ranks:
    """Processes of one group that run cases until they are closed."""

    def __init__(self, number: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.logs = [folder / f"rank-{rank}.log" for rank in range(number)]
        self.pipes, self.processes = [], []
        for rank, log in enumerate(self.logs):
            ours, theirs = context.Pipe()
            arguments = (rank_environment(rank, number, port), theirs, str(log))
            process = context.Process(target=engine_ranks.serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Run the cases in order on all ranks; return the answers of rank 0."""
        for pipe in self.pipes:
            pipe.send(cases)
        answers = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            multiprocessing.connection.wait([pipe, process.sentinel])
            try:
                answers.append(pipe.recv())
            except EOFError:
                words = [log.read_text()[-3000:] for log in self.logs]
                raise AssertionError("\n".join(["a rank has died", *words])) from None
        return answers[0]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()
