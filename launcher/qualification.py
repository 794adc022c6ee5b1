"""`shoal check --qualify`: what the user's own cluster is proven to do, a line a claim.

Two starts of the ranks: in the first they prove what needs no more than being there, train one run
to its end, and lose a rank in the middle of another one like it; the second goes on with that on
fewer ranks.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import PreflightError, ShoalError, StoppedOnRequest
from shoal.configs.load import dump_config
from shoal.configs.schema import RunConfig
from shoal.launcher.check import check_cluster, plan_check, show_findings, start_ranks
from shoal.launcher.endings import Interrupted
from shoal.launcher.hosts import Host
from shoal.launcher.rehearsal import Doom, Rehearsal, read_claims
from shoal.launcher.runs import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.launcher.run import Order
    from shoal.trainer.qualification import Claim

PREFIX = ".qualify-"
STEPS, EVERY_STEPS = 40, 5
CONTEXT, VOCAB = 64, 320
DOCUMENTS, WORDS = 400, 60
LIMITS = {True: 1e-5, False: 1e-4}
"""On CPU, and on GPUs, whose sums are not always in the same order; nats a token."""
RESUMED = "kill and resume"


def qualify_order(order: Order, *, as_json: bool) -> int:
    """Check the hosts of a command line, then prove the claims; show it, return the exit code."""
    config, hosts = plan_check(order)
    findings = check_cluster(config, hosts, probe=False)
    if not all(finding.is_good for finding in findings):
        show_findings(findings, as_json=as_json)
        return PreflightError.exit_code
    claims = qualify(config, hosts, random.SystemRandom().randrange(1 << 32))
    if as_json:
        for claim in claims:
            print(json.dumps(asdict(claim)))
    else:
        from shoal.launcher.tables import show

        show(claims_table(claims))
    return 0 if all(claim.holds for claim in claims) else PreflightError.exit_code


def qualify(config: RunConfig, hosts: Sequence[Host], seed: int) -> list[Claim]:
    """Prove what can be proven over all ranks of these hosts; some minutes.

    Args:
        config: Where runs live, the kernels, and how ranks are started.
        hosts: Machines of the job.
        seed: Draws the rank that is killed, and the moment.

    Raises:
        StoppedOnRequest, Interrupted: somebody has ended it.
    """
    parent = Path(config.output).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    ranks = sum(host.slots for host in hosts)
    print(f"qualifying {ranks} ranks on {len(hosts)} hosts (seed {seed})", file=sys.stderr)
    with TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name:
        trial = _Trial(Path(name), config, list(hosts), random.Random(seed))
        return trial.run()


@dataclass
class _Trial:
    """A temporary folder, the runs in it, and what they show."""

    folder: Path
    config: RunConfig
    hosts: list[Host]
    draw: random.Random

    def run(self) -> list[Claim]:
        _write_corpus(self.folder)
        whole, killed = (self._make_run(name) for name in ("whole", "killed"))
        answers, marker = self.folder / "claims.jsonl", self.folder / "killed.json"
        doom = Doom(
            rank=self.draw.randrange(sum(host.slots for host in self.hosts)),
            polls=STEPS + self.draw.randrange(EVERY_STEPS + 2, STEPS - 2 * EVERY_STEPS),
            seconds=self.draw.uniform(0.0, 0.05),
            checkpoints=str(run_folder(killed) / "checkpoints"),
            marker=str(marker),
        )
        order = Rehearsal(
            configs=[str(self._file(whole)), str(self._file(killed))],
            claims=str(answers),
            folder=str(self.folder / "rates"),
            kernels=self.config.kernels.model_dump(mode="json"),
            doom=asdict(doom),
        )
        problem = self._start(order, self.hosts)
        claims = list(read_claims(answers))
        if not marker.exists():
            return [*claims, _fail("all ranks end their work", problem or "no rank was killed")]
        fewer = drop_rank(self.hosts)
        problem = self._start(Rehearsal(configs=[str(self._file(killed))]), fewer)
        if problem:
            return [*claims, _fail(RESUMED, f"does not go on: {problem}")]
        death = json.loads(marker.read_text(encoding="utf-8"))
        return [*claims, compare_runs(run_folder(whole), run_folder(killed), death)]

    def _start(self, order: Rehearsal, hosts: Sequence[Host]) -> str | None:
        """Start the ranks; return what ended them, None if they ended by themselves."""
        file = self.folder / f"order-{len(list(self.folder.glob('order-*')))}.json"
        file.write_text(json.dumps(asdict(order)), encoding="utf-8")
        logs = file.with_suffix(".logs")
        logs.mkdir()
        try:
            start_ranks(hosts, ["--probe", str(file)], self.config, logs)
        except (StoppedOnRequest, Interrupted):
            raise
        except ShoalError as error:
            return str(error).splitlines()[0]
        return None

    def _file(self, config: RunConfig) -> Path:
        return self.folder / f"{config.name}.yaml"

    def _make_run(self, name: str) -> RunConfig:
        """Return a small run in the folder, and write it down."""
        ranks = sum(host.slots for host in self.hosts)
        tree: dict[str, Any] = {
            "name": name,
            "output": str(self.folder),
            "model": {
                "vocab_size": VOCAB, "context": CONTEXT, "num_layers": 2, "width": 64,
                "num_heads": 4,
            },
            "data": {"train": [{"path": str(self.folder / "corpus" / "train")}]},
            "optim": {"lr": 5e-3},
            "train": {
                "tokens": STEPS * max(4, ranks) * CONTEXT, "batch_rows": max(4, ranks),
                "micro_batch_rows": 4, "precision": "fp32",
            },
            "kernels": self.config.kernels.model_dump(mode="json"),
            "checkpoint": {"every_steps": EVERY_STEPS},
            "world": self.config.world.model_dump(mode="json"),
        }  # fmt: skip
        config = RunConfig.model_validate(tree)
        self._file(config).write_text(dump_config(config), encoding="utf-8")
        return config


def _write_corpus(folder: Path) -> None:
    """Make shards of sentences that nobody has written; the same ones every time."""
    from shoal.data_pipeline.shards import prepare

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=WORDS)) for _ in range(DOCUMENTS)]
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    tree = {
        "output": str(folder / "corpus"),
        "train": [{"path": str(source)}],
        "tokenizer": {"vocab_size": VOCAB},
        "context": CONTEXT,
        "processes": 1,
    }
    prepare(PrepareConfig.model_validate(tree))


def drop_rank(hosts: Sequence[Host]) -> list[Host]:
    """Return the machines of a job with a rank less; a job of one rank stays as it is."""
    *others, last = hosts
    if last.slots > 1:
        chosen = last.devices and last.devices[:-1]
        return [*others, replace(last, slots=last.slots - 1, devices=chosen)]
    return others or [last]


def compare_runs(whole: Path, killed: Path, death: dict[str, Any]) -> Claim:
    """Return the claim that a run that lost a rank has the losses of one that did not.

    Args:
        whole: Folder of the run that was left alone.
        killed: Of the one that went on with fewer ranks.
        death: Rank and host that were killed.
    """
    from shoal.trainer.metrics import read_metrics
    from shoal.trainer.qualification import Claim, find_gap

    records = read_metrics(killed / "metrics.jsonl")
    losses = [
        [(r["step"], r["loss"]) for r in of_run if r["kind"] == "train"]
        for of_run in (read_metrics(whole / "metrics.jsonl"), records)
    ]
    starts = [record for record in records if record["kind"] == "start"]
    first, last = starts[0], starts[-1]
    how = f"rank {death['rank']} of {first['ranks']} killed on {death['host']}"
    limit = LIMITS[last["device"] == "cpu"]
    if [step for step, _ in losses[1]] != list(range(1, STEPS + 1)):
        return _fail(RESUMED, f"{how}: steps were lost or repeated")
    if len(starts) < 2 or not last["step"]:
        return _fail(RESUMED, f"{how}: it did not go on from a checkpoint")
    gap = find_gap(*([loss for _, loss in of_run] for of_run in losses))
    text = f"{how}, resumed after step {last['step']} on {last['ranks']}: "
    text += f"losses of all {STEPS} steps are those of a run left alone"
    if not gap <= limit:
        text = text.replace(" are ", " are not ")
    return Claim(RESUMED, gap <= limit, text, gap, "nats off at most", limit)


def _fail(claim: str, text: str) -> Claim:
    from shoal.trainer.qualification import Claim

    return Claim(claim, False, text)


def claims_table(claims: Sequence[Claim]) -> Table:
    """Return a line for each: its figure and limit, whether it holds, and what that rests on."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column("claim")
    table.add_column("")
    table.add_column("figure", justify="right")
    table.add_column("what was found")
    for claim in claims:
        mark = "[green]holds[/green]" if claim.holds else "[bold red]FAILS[/bold red]"
        table.add_row(claim.claim, mark, _describe_figure(claim), escape(claim.text))
    return table


def _describe_figure(claim: Claim) -> str:
    if not claim.unit:
        return ""
    if claim.limit is None:
        return f"{claim.figure:.2f} {claim.unit}"
    return f"{claim.figure:.1e} of {claim.limit:.0e} {claim.unit.removesuffix(' at most')}"
