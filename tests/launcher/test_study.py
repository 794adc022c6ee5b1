"""Studies: shapes and stages planned, waves trained, killed and continued, a report at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError
from shoal.configs.load import build_config, find_config, load_config
from shoal.configs.schema import RunConfig
from shoal.configs.study import StudyConfig
from shoal.eval.compare import check_report
from shoal.launcher.arms import CorpusFacts, RunPlanner, best_rate, settle_arms
from shoal.trainer.cost import flops_per_token, resident_bytes, training_flops_per_token

SHOAL = str(Path(sys.executable).with_name("shoal"))
CORPUS = CorpusFacts(Path("data/c/train"), Path("data/c/validation"), "abc", "def", 500, 64)
MOE = {"hidden": None, "moe": {"num_experts": 4, "active_experts": 2, "hidden": 24}}
STUDY: dict[str, Any] = {
    "name": "small",
    "prepare": "corpus.yaml",
    "run": {
        "model": {"context": 64, "num_layers": 2, "width": 32, "num_heads": 2, "hidden": 48,
                  "qk_norm": True},
        "train": {"tokens": 6144, "batch_rows": 4, "micro_batch_rows": 2, "precision": "fp32"},
        "validation": {"every_steps": 8, "max_rows": 16},
        "checkpoint": {"every_steps": 4, "keep": 1},
    },
    "budgets": {
        "work": {"axis": "active_flops_per_token", "target": 85_000, "context": 64},
        "memory": {"axis": "resident_bytes", "target": 87_000, "context": 64},
    },
    "support": {"teacher": {"run": {"model": {"width": 48, "hidden": 96}}}},
    "arms": {
        "dense": {"match": {"budget": "work", "hidden_multiple": 4}},
        "moe": {"run": {"model": MOE},
                "match": {"budget": "memory"}},
        "distilled": {"teacher": "teacher",
                      "match": {"budget": "work", "hidden_multiple": 4}},
    },
    "seeds": [0, 1],
    "tuning": {"lrs": [2e-3, 1e-2], "tokens": 1024},
    "tasks": {
        "perplexity": {"domain": "{samples}/domain_validation.jsonl.gz"},
        "brainbench": ["{samples}/brainbench_human.jsonl.gz"],
        "multiple_choice": {"topic": "{samples}/medical_abstracts.jsonl.gz"},
        "max_items": 4,
    },
    "primary_task": "domain",
}  # fmt: skip
SMALL_CORPUS = {
    "name": "small",
    "output": "data/small",
    "train": [{"path": "{samples}/domain_train.jsonl.gz", "max_bytes": 300_000}],
    "validation": [{"path": "{samples}/domain_validation.jsonl.gz", "max_bytes": 60_000}],
    "tokenizer": {"vocab_size": 500},
    "context": 64,
}


def load(**changes: Any) -> StudyConfig:
    return build_config(StudyConfig, STUDY | changes, where="test")


def plan(config: StudyConfig) -> RunPlanner:
    return RunPlanner(config, CORPUS, settle_arms(config, CORPUS))


# Planning.


def test_shapes_meet_their_budgets_on_their_axis() -> None:
    config = load()
    arms = {arm.name: arm for arm in settle_arms(config, CORPUS)}
    work = flops_per_token(arms["dense"].model, 64).total
    memory = resident_bytes(arms["moe"].model, "bf16")
    assert work == pytest.approx(85_000, rel=0.03)
    assert memory == pytest.approx(87_000, rel=0.03)
    assert arms["dense"].model.vocab_size == 512, "the tokenizer's 500, rounded up"
    assert arms["teacher"].shared
    assert not arms["dense"].shared


def test_the_demo_meets_its_budgets_and_gives_every_arm_the_same() -> None:
    config = load_config(StudyConfig, find_config("studies/demo.yaml"))
    prepare = load_config(PrepareConfig, find_config(config.prepare))
    corpus = CorpusFacts(
        Path("t"), Path("v"), "abc", "def", prepare.tokenizer.vocab_size, prepare.context
    )
    planner = RunPlanner(config, corpus, settle_arms(config, corpus))
    arms = [planner.arms[name] for name in config.arms]
    for arm in arms:
        budget = config.budgets[arm.config.match.budget]
        if budget.axis == "resident_bytes":
            value = resident_bytes(arm.model, budget.precision)
        else:
            value = flops_per_token(arm.model, budget.context).total
        assert value == pytest.approx(budget.target, rel=budget.tolerance)
    runs = [planner.run(arm, 1e-3, 0) for arm in arms]
    assert len({run.train.tokens for run in runs}) == 1
    assert len(config.seeds) >= 2
    assert len(config.tuning.lrs) >= 2


def test_a_budget_nobody_can_meet_names_arm_budget_and_nearest() -> None:
    budgets = STUDY["budgets"] | {"memory": {"axis": "resident_bytes", "target": 9000}}
    with pytest.raises(ConfigError, match="the nearest is") as caught:
        settle_arms(load(budgets=budgets), CORPUS)
    assert caught.value.where == "arm moe, budget memory"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ({"train": {"tokens": 99_000}}, "train.tokens"),
        ({"train": {"batch_rows": 8}}, "train.batch_rows"),
        ({"optim": {"schedule": "constant"}}, "optim.schedule"),
        ({"data": {"document_mask": False}}, "data.document_mask"),
        ({"seed": 5}, "seed"),
    ],
)
def test_an_arm_trained_otherwise_is_refused(run: dict[str, Any], key: str) -> None:
    arms = STUDY["arms"] | {"dense": {"run": run}}
    with pytest.raises(ConfigError, match=f"trained otherwise than the rest: {key}"):
        settle_arms(load(arms=arms), CORPUS)
    support = {"teacher": {"run": run}}
    settle_arms(load(support=support), CORPUS)  # a teacher is no contestant


def test_an_arm_may_cut_its_passes_as_it_likes() -> None:
    own = {"train": {"micro_batch_rows": 1, "zero_stage": 2}, "kernels": {"experts": "loop"}}
    settle_arms(load(arms=STUDY["arms"] | {"dense": {"run": own}}), CORPUS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, "given twice"),
        ({"arms": STUDY["arms"] | {"teacher": {}}}, "an arm and a support run of one name"),
        ({"arms": STUDY["arms"] | {"../x y": {}}}, r"arms\.\.\./x y.*should match pattern"),
        ({"support": {"": {}}}, "support.*should match pattern"),
        ({"seeds": [0, -1]}, r"seeds\.1: Input should be greater than or equal to 0"),
        ({"seeds": [2**31]}, r"seeds\.0: Input should be less than 2147483648"),
        ({"support": {"teacher": {"teacher": "teacher"}}}, "teacher of a teacher"),
        ({"tuning": {"lrs": [-1], "tokens": 9}}, "greater than 0"),
        ({"arms": {"a": {"teacher": "nobody"}}}, "no support run named 'nobody'"),
        ({"arms": {"a": {"match": {"budget": "x"}}}}, "no budget named 'x'"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_an_unknown_key_of_an_arm_is_refused() -> None:
    arms = STUDY["arms"] | {"odd": {"run": {"optim": {"leaning_rate": 1}}}}
    with pytest.raises(ConfigError, match="unknown key"):
        settle_arms(load(arms=arms), CORPUS)


def test_a_stage_is_named_after_what_determines_it() -> None:
    planner = plan(load())
    dense = planner.arms["dense"]
    name = planner.run(dense, 1e-3, 0).name
    assert planner.run(dense, 1e-3, 0).name == name
    assert planner.run(dense, 2e-3, 0).name != name
    assert planner.run(dense, 1e-3, 1).name != name
    for free in (
        {"checkpoint": {"every_steps": 2}},
        {"validation": {"max_rows": 3}},
        {"train": STUDY["run"]["train"] | {"compile": True, "zero_stage": 2}},
        {"kernels": {"attention": "reference"}},
    ):
        other = plan(load(run=STUDY["run"] | free))
        assert other.run(dense, 1e-3, 0).name == name, f"{free} changes no result"
    judged = plan(load(run=STUDY["run"] | {"validation": {"max_rows": 3}}))
    assert judged.trial(dense, 1e-3).name != planner.trial(dense, 1e-3).name, "on other rows"
    longer = STUDY["run"] | {"train": STUDY["run"]["train"] | {"tokens": 9000}}
    assert plan(load(run=longer)).run(dense, 1e-3, 0).name != name
    other = CorpusFacts(CORPUS.train, CORPUS.validation, "xyz", "def", 500, 64)
    moved = RunPlanner(load(), other, settle_arms(load(), other))
    assert moved.run(moved.arms["dense"], 1e-3, 0).name != name


def test_support_runs_are_generic_cost_and_trials_are_tuning() -> None:
    planner = plan(load())
    assert planner.run(planner.arms["teacher"], None, 0).ledger.scope == "generic"
    trial = planner.trial(planner.arms["dense"], 1e-2)
    assert (trial.ledger.kind, trial.ledger.scope) == ("tune", "specialization")
    assert trial.train.tokens == 1024


def test_equal_flops_gives_cheap_arms_more_tokens() -> None:
    planner = plan(load(equal_on="flops"))
    teacher = planner.arms["teacher"].model
    spent = {
        name: planner.run(planner.arms[name], 1e-3, 0).train.tokens
        * training_flops_per_token(
            planner.arms[name].model, 64, teacher if name == "distilled" else None
        )
        for name in ("dense", "moe", "distilled")
    }
    assert spent["moe"] == pytest.approx(spent["dense"], rel=1e-3)
    assert spent["distilled"] == pytest.approx(spent["dense"], rel=1e-3), "its teacher counts"


def test_best_rate_prefers_the_smaller_of_two_equals() -> None:
    assert best_rate({4e-3: 2.0, 2e-3: 2.0, 1e-3: 2.5}) == 2e-3


def test_shipped_studies_are_valid() -> None:
    for file in find_config("studies/demo.yaml").parent.glob("*.yaml"):
        tree = yaml.safe_load(file.read_text())
        if "arms" in tree:
            build_config(RunConfig, {**load_config(StudyConfig, file).run, "data": {
                "train": [{"path": "x"}]}}, where=file)  # fmt: skip


# The whole way, on the shipped samples.


def make_folder(folder: Path, **changes: Any) -> Path:
    (folder / "corpus.yaml").write_text(yaml.safe_dump(SMALL_CORPUS))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return folder


def shoal(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [SHOAL, *words], cwd=folder, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study, and what it printed."""
    folder = make_folder(tmp_path_factory.mktemp("study"))
    return folder, shoal(folder, "study", "study.yaml")


def read_report(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "reports/small/report.json").read_text())
    return tree


@pytest.mark.slow
def test_a_study_ends_in_a_report_of_all_arms(done: tuple[Path, str]) -> None:
    folder, printed = done
    report = read_report(folder)
    check_report(report)
    assert [arm["name"] for arm in report["arms"]] == ["dense", "moe", "distilled"]
    assert all(arm["matched"]["within"] for arm in report["arms"])
    assert {row["name"] for row in report["references"]} == {
        "unigram",
        "untrained",
        "teacher",
    }
    assert set(report["arms"][0]["tasks"]) == {"domain", "brainbench", "topic"}
    assert len(report["pairs"]) == 9
    for arm in report["arms"]:
        assert len(arm["exports"]) == 2
        assert arm["provenance"]["shards_hash"]
        assert arm["training"]["tuning"]["trials"] == 2
        assert arm["training"]["ledger"]["generic"]["seconds"] > 0, "the corpus"
    distilled, dense = report["arms"][2], report["arms"][0]
    assert distilled["training"]["ledger"]["generic"]["flops"] > 0, "the teacher"
    assert dense["training"]["ledger"]["generic"]["flops"] == 0
    assert distilled["training"]["flops"] > dense["training"]["flops"], "its forward passes"
    assert report["verdict"]["headline"] in " ".join(printed.split())
    assert "report.html" in printed


@pytest.mark.slow
def test_a_second_call_reports_from_what_exists(done: tuple[Path, str]) -> None:
    folder, _ = done
    before = {f: f.stat().st_mtime_ns for f in folder.glob("runs/**/*") if f.is_file()}
    first = read_report(folder)
    begun = time.monotonic()
    printed = shoal(folder, "study", "study.yaml")
    assert time.monotonic() - begun < 60
    assert "trials (" not in printed
    after = {f: f.stat().st_mtime_ns for f in folder.glob("runs/**/*") if f.is_file()}
    assert after == before
    assert read_report(folder) == first


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_end(done: tuple[Path, str], tmp_path: Path) -> None:
    make_folder(tmp_path)
    with subprocess.Popen(
        [SHOAL, "study", "study.yaml"], cwd=tmp_path, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("runs/small/dense-seed1-*/checkpoints/step-00000008")):
            assert time.monotonic() < deadline, "the second run was not reached"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    time.sleep(1)
    shoal(tmp_path, "study", "study.yaml")
    ours, theirs = read_report(tmp_path), read_report(done[0])
    for arm, other in zip(ours["arms"], theirs["arms"], strict=True):
        for name, task in arm["tasks"].items():
            tolerance = 1e-3 if task["metric"] == "bits_per_byte" else 0
            assert task["value"] == pytest.approx(other["tasks"][name]["value"], abs=tolerance)
        for curve, undisturbed in zip(
            arm["training"]["curves"], other["training"]["curves"], strict=True
        ):
            assert curve["tokens"] == undisturbed["tokens"]
            assert curve["loss"] == pytest.approx(undisturbed["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"tasks": {"perplexity": {"domain": "nowhere.jsonl"}}}, 3, "no such task file"),
        ({"primary_task": "nothing"}, 2, "no task named 'nothing'"),
        ({"prepare": "absent.yaml"}, 2, "no such config file"),
        ({"budgets": STUDY["budgets"] | {"memory": {"axis": "resident_bytes", "target": 10}}},
         2, "no shape meets resident_bytes"),
        ({"budgets": {name: budget | {"context": 65} for name, budget in STUDY["budgets"].items()}},
         2, "65"),
        ({"budgets": STUDY["budgets"] | {"memory": {
            "axis": "resident_bytes", "target": 1e5, "precision": "int4"}}}, 2, "int4"),
        ({"support": STUDY["support"] | {"unigram": {}}}, 2, "cannot be called 'unigram'"),
        ({"output": ".", "name": "corpus.yaml"}, 2, "is not a report"),
    ],
)  # fmt: skip
def test_faults_are_found_before_anything_is_trained(
    changes: dict[str, Any], code: int, message: str, tmp_path: Path
) -> None:
    printed = shoal(make_folder(tmp_path, **changes), "study", "study.yaml", code=code)
    assert message in printed
    assert not (tmp_path / "runs").exists()
