"""The comparison from arms to report: fair, cached, and refused where it does not fit."""

import json

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.eval import compare as comparison
from shoal.eval import evaluation
from shoal.eval.compare import compare
from shoal.eval.inputs import ArmInput, ExportInput, References, TrainingTexts
from shoal.eval.preconditions import check_conditions, check_reference_names
from shoal.eval.report import write_report
from shoal.eval.spending import cost_curve, describe_training, total_ledger


def test_every_axis_is_measured_for_every_arm(report, inputs):
    for row, arm in zip(report["arms"], inputs["arms"], strict=True):
        assert set(row["budgets"]) == {"flops", "bytes", "speed"}
        for name in ("flops", "bytes"):
            found = row["budgets"][name]
            assert found["measured"] == pytest.approx(found["formula"], rel=1e-6)
            expected = found["measured"] / inputs["budgets"][name].target - 1
            assert found["deviation"] == pytest.approx(expected)
            assert found["within"] == (abs(expected) <= 0.5)
        assert row["budgets"]["speed"]["formula"] is None
        assert row["matched"]["budget"] == (arm.match or "flops")
        assert row["inference"]["latency_ms"]["decode"]["repeats"] >= 20


def test_every_pair_on_every_task(report):
    listed = [(p["task"], p["a"], p["b"]) for p in report["pairs"]]
    assert len(listed) == len(set(listed)) == 9
    for pair in report["pairs"]:
        assert pair["ci95"][0] <= pair["difference"] <= pair["ci95"][1]
        assert pair["p_value"] <= pair["p_holm"] <= 1
        arms = {row["name"]: row for row in report["arms"]}
        values = [arms[pair[side]]["tasks"][pair["task"]]["value"] for side in "ab"]
        assert pair["difference"] == pytest.approx(values[0] - values[1])


def test_seeds_are_averaged_and_kept(report):
    for row in report["arms"]:
        for score in row["tasks"].values():
            values = [one["value"] for one in score["per_seed"]]
            assert len(values) == 2
            assert score["value"] == pytest.approx(np.mean(values))
            assert score["spread"] == pytest.approx(max(values) - min(values))


def test_reference_rows_are_scored(report):
    unigram, untrained = report["references"]
    assert (unigram["name"], untrained["name"]) == ("unigram", "untrained")
    assert unigram["tasks"]["text"]["extra"]["perplexity"] == pytest.approx(320)  # even counts
    assert set(untrained["tasks"]) == {"text", "brainbench", "quiz"}


def test_contaminated_items_are_named_and_left_out(report):
    found = report["contamination"]
    assert found["searched"] and found["documents"] == 2
    assert found["tasks"]["text"]["ids"][0] == "d0"
    for row in report["arms"]:
        score = row["tasks"]["text"]
        assert score["without_contaminated"] != score["value"]


def test_cost_is_split_and_projected(report):
    dense, _, distilled = report["arms"]
    training = dense["training"]
    assert training["tokens"] == 3000 and training["flops"] == 2e9
    assert training["device_seconds"] == 100
    assert training["tuning"]["trials"] == 3 and training["tuning"]["device_seconds"] == 30
    assert training["ledger"]["generic"]["device_seconds"] == 10
    assert training["ledger"]["specialization"]["device_seconds"] == 200 + 30 + 2
    assert training["one_domain"]["device_seconds"] == 100 + 30 + 1
    assert distilled["training"]["ledger"]["generic"]["device_seconds"] == 210
    assert report["ledger"]["generic"]["device_seconds"] == 210  # the shared corpus once
    curve = report["cost_curve"]
    place = curve["domains"].index(8)
    assert curve["by_domains"]["llama"]["device_seconds"][place] == 10 + 8 * 131
    served = curve["by_deployed_tokens"]["llama"]["flops"]
    slope = (served[1] - served[0]) / (curve["deployed_tokens"][1] - curve["deployed_tokens"][0])
    assert slope == pytest.approx(dense["inference"]["flops_per_token"])


def test_curves_are_thinned_to_what_can_be_seen(report):
    curve = report["arms"][0]["training"]["curves"][0]
    assert len(curve["tokens"]) == 200
    assert curve["tokens"][-1] == 300_000
    assert curve["validation"]["bits_per_byte"] == [2.0] * 3


def test_second_comparison_computes_nothing(report, inputs, cache, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("computed again")

    for name in ("score_texts", "measure_latencies", "find_overlap", "unigram_scores"):
        monkeypatch.setattr(evaluation, name, refuse)
    monkeypatch.setattr(evaluation.Candidate, "rounded_model", refuse)
    again = compare(**inputs, cache=cache, name="small")
    assert json.dumps(again) == json.dumps(report)


def test_killed_comparison_goes_on(inputs, tmp_path, monkeypatch):
    scored = []
    real = evaluation.score_texts

    def score(candidate, *args, **kwargs):
        if len(scored) == 7:
            raise KeyboardInterrupt
        scored.append(candidate.name)
        return real(candidate, *args, **kwargs)

    monkeypatch.setattr(evaluation, "score_texts", score)
    with pytest.raises(KeyboardInterrupt):
        compare(**inputs, cache=tmp_path)
    before, scored[:] = len(scored), []
    monkeypatch.setattr(
        evaluation, "score_texts", lambda c, *a, **k: scored.append(c.name) or real(c, *a, **k)
    )
    compare(**inputs, cache=tmp_path)
    assert len(scored) == 7 * 3 - before  # six exports and the untrained one, three tasks each


def test_damaged_cache_entry_is_computed_again(report, inputs, cache, tmp_path):
    import shutil

    shutil.copytree(cache, tmp_path / "cache")
    for file in (tmp_path / "cache").glob("scores-*"):
        file.write_text(file.read_text()[:50])
    again = compare(**inputs, cache=tmp_path / "cache", name="small")
    assert again["arms"][0]["tasks"] == report["arms"][0]["tasks"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"primary_task": "texd"}, "no task named 'texd'; there are text, brainbench, quiz"),
        ({"arms": []}, "at least one arm"),
        ({"budgets": {}}, "at least one arm and one budget"),
    ],
)
def test_names_that_do_not_fit_are_refused(inputs, change, cause):
    with pytest.raises(ConfigError, match=cause):
        compare(**{**inputs, **change})


def test_arms_that_do_not_fit_are_refused(inputs, make_export):
    one = ArmInput("a", "dense", [ExportInput(make_export("llama"))])
    with pytest.raises(ConfigError, match="two arms are called 'a'"):
        compare(**{**inputs, "arms": [one, one]})
    with pytest.raises(ConfigError, match="no budget named 'x'"):
        compare(**{**inputs, "arms": [ArmInput("a", "dense", one.exports, match="x")]})
    with pytest.raises(ConfigError, match="at least one export"):
        compare(**{**inputs, "arms": [ArmInput("a", "dense", [])]})
    mixed = [ExportInput(make_export("llama")), ExportInput(make_export("gpt2"))]
    with pytest.raises(ConfigError, match="differ in shape"):
        compare(**{**inputs, "arms": [ArmInput("a", "dense", mixed)]})
    long = {"b": BudgetConfig(axis="resident_bytes", target=1, context=65)}
    with pytest.raises(ConfigError, match="longer than the 64 of a"):
        compare(**{**inputs, "arms": [one], "budgets": long})
    with pytest.raises(DataError, match="no such task file"):
        compare(**{**inputs, "tasks": TasksConfig(perplexity={"t": "absent.jsonl"})})


def test_budget_without_context_is_measured_at_the_shortest(inputs, make_export, cache):
    quick = TasksConfig(perplexity=inputs["tasks"].perplexity)
    arm = ArmInput("only", "dense", [ExportInput(make_export("llama"))])
    budgets = {"bytes": BudgetConfig(axis="resident_bytes", target=90_000)}
    found = compare([arm], budgets, quick, cache=cache)
    assert found["budgets"][0]["context"] == 64
    assert found["arms"][0]["inference"]["conditions"]["context"] == 64


TASKS = TasksConfig(perplexity={"text": "absent.jsonl"})


@pytest.mark.parametrize(
    ("budgets", "tasks", "cause", "where", "fix"),
    [
        (
            {"work": {"axis": "active_flops_per_token", "context": 65}}, {},
            "a context of 65 tokens is longer than the 64 of b", "budgets.work.context",
            "budgets.work.context=64 in a study, --budget AXIS=TARGET,context=64 on the command",
        ),
        (
            {"work": {"axis": "active_flops_per_token"}}, {"context": 100},
            "longer than the 64 of b", "tasks.context", "`context: 64` in the file of --tasks",
        ),
        (
            {"work": {"axis": "active_flops_per_token", "precision": "int8"}}, {},
            "cannot be run at int8", "budgets.work.precision", "work.precision=fp32 or bf16",
        ),
        (
            {"work": {"axis": "active_flops_per_token"},
             "memory": {"axis": "resident_bytes", "precision": "int4"}}, {},
            "cannot be run at int4", "budgets.memory.precision", "--budget AXIS=TARGET,precision=",
        ),
        (
            {"work": {"axis": "active_flops_per_token"},
             "speed": {"axis": "latency_ms", "precision": "int8"}}, {},
            "cannot be run at int8", "budgets.speed.precision", "fp32 or bf16",
        ),
        (
            {"memory": {"axis": "resident_bytes"},
             "more": {"axis": "resident_bytes", "precision": "fp32"}}, {},
            "different precisions", "budgets", "one precision",
        ),
    ],
)  # fmt: skip
def test_conditions_are_checked_before_there_are_models(budgets, tasks, cause, where, fix):
    given = {key: BudgetConfig(target=1, **budget) for key, budget in budgets.items()}
    with pytest.raises(ConfigError, match=cause) as caught:
        check_conditions({"a": 128, "b": 64}, given, TASKS.model_copy(update=tasks))
    assert caught.value.where == where
    assert fix in caught.value.fix


def test_conditions_that_can_be_met_pass():
    budgets = {
        "work": BudgetConfig(axis="active_flops_per_token", target=1, context=64),
        "open": BudgetConfig(axis="resident_bytes", target=1),
        "cache": BudgetConfig(axis="kv_bytes_per_token", target=1, precision="int8"),  # not run
    }
    check_conditions({"a": 128, "b": 64}, budgets, TASKS.model_copy(update={"context": 64}))


@pytest.mark.parametrize("name", ["a", "unigram", "untrained"])
def test_reference_of_a_taken_name_is_refused(name):
    check_reference_names(["a", "b"], ["teacher"])
    with pytest.raises(ConfigError, match=f"cannot be called '{name}'"):
        check_reference_names(["a", "b"], ["teacher", name])


def test_models_are_let_go_and_the_corpus_is_read_once(inputs, make_export, monkeypatch):
    opened, read = [], []
    real = comparison.Contestant
    monkeypatch.setattr(
        comparison, "Contestant", lambda arm: opened.append(real(arm)) or opened[-1]
    )
    arms = [ArmInput(kind, "dense", [ExportInput(make_export(kind))]) for kind in ("llama", "gpt2")]
    budgets = {"bytes": inputs["budgets"]["bytes"]}
    texts = TrainingTexts(lambda: read.append(1) or inputs["training_texts"].read(), "key")
    found = compare(arms, budgets, inputs["tasks"], training_texts=texts)
    assert [len(c._models) for one in opened for c in one.candidates] == [0, 0]
    assert len(found["contamination"]["tasks"]) == 3 and read == [1]


def test_lone_foreign_export_is_reported(inputs, make_export, tmp_path):
    """`shoal compare` of one model: no formula, no ledger, no seed, no references."""
    arm = ArmInput("only", "dense", [ExportInput(make_export("gpt2"))])
    budget = BudgetConfig(axis="resident_bytes", target=90_000, context=64)
    found = compare([arm], {"bytes": budget}, inputs["tasks"])
    assert found["verdict"]["outcome"] == "single"
    assert found["cost_curve"] is None
    assert not found["contamination"]["searched"]
    assert found["arms"][0]["matched"]["formula"] is None
    write_report(found, tmp_path / "report")


def test_model_built_to_no_budget_is_held_to_all_as_limits(inputs, make_export, cache, tmp_path):
    quick = TasksConfig(perplexity=inputs["tasks"].perplexity)
    arms = [ArmInput(kind, "dense", [ExportInput(make_export(kind))]) for kind in ("llama", "gpt2")]
    costs = compare(arms, {"b": inputs["budgets"]["bytes"]}, quick, cache=cache)["arms"]
    small, large = (row["budgets"]["b"]["measured"] for row in costs)
    assert small < large
    budgets = {
        "roomy": BudgetConfig(axis="resident_bytes", target=10 * large, context=64),
        "tight": BudgetConfig(axis="resident_bytes", target=large - 1, context=64),
    }
    found = compare(arms, budgets, quick, cache=cache)
    light, heavy = found["arms"]
    assert light["matched"]["within"] and light["budgets"]["roomy"]["within"]
    assert light["budgets"]["roomy"]["rule"] == light["matched"]["rule"] == "limit"
    assert (heavy["matched"]["budget"], heavy["matched"]["within"]) == ("tight", False)
    assert found["verdict"]["off_budget"] == ["gpt2"]
    assert any(s.startswith("gpt2 exceeds tight") for s in found["verdict"]["sentences"])
    folder = write_report(found, tmp_path / "report")
    assert "| limit | no |" in (folder / "report.md").read_text()
    assert "<td>limit</td>" in (folder / "report.html").read_text()


def test_other_exports_stand_among_the_references(inputs, make_export, cache):
    quick = TasksConfig(perplexity=inputs["tasks"].perplexity)
    arm = ArmInput("only", "distilled", [ExportInput(make_export("llama"))], teacher="teacher")
    given = References(untrained=make_export("llama", 9), others={"teacher": make_export("qwen3")})
    budgets = {"bytes": inputs["budgets"]["bytes"]}
    found = compare([arm], budgets, quick, references=given, cache=cache)
    rows = found["references"]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("untrained", "reference"), ("teacher", "reference"),
    ]  # fmt: skip
    assert rows[0]["tasks"]["text"]["value"] != rows[1]["tasks"]["text"]["value"]
    assert found["arms"][0]["teacher"] == "teacher"
    assert any(s.startswith("teacher, the teacher of only, is") and "bits per byte on text" in s
               for s in found["verdict"]["sentences"])  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be called 'only'"):
        compare(
            [arm], budgets, quick, references=References(others={"only": arm.exports[0].folder})
        )


def test_arm_without_ledger_has_no_cost_curve():
    arm = ArmInput("a", "dense", [ExportInput("x")])
    training = describe_training(arm)
    assert training["device_seconds"] == 0
    row = {"name": "a", "training": training, "inference": {"flops_per_token": 1.0}}
    assert cost_curve([row]) is None
    assert total_ledger([arm])["generic"]["seconds"] == 0
