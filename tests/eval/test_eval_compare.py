"""The comparison from arms to report: fair, cached, decided by rule, and valid by schema."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.eval import evaluation
from shoal.eval.compare import check_report, compare
from shoal.eval.inputs import ArmInput, ExportInput, References, TrainingTexts
from shoal.eval.report import render_html, render_markdown, write_report
from shoal.eval.spending import cost_curve, describe_training, total_ledger
from shoal.eval.verdict import reach_verdict

SECTIONS = (
    "verdict", "arms", "budgets", "quality", "pairs", "training", "cost", "calibration",
    "contamination", "provenance",
)  # fmt: skip


def entry(kind, stage, seconds, *, scope="specialization", devices=2, flops=0.0, tokens=0):
    return {
        "kind": kind, "stage": stage, "scope": scope, "started": "2026-01-01T00:00:00+00:00",
        "seconds": seconds, "devices": devices, "device_seconds": seconds * devices,
        "device": "cpu", "tokens": tokens, "flops": flops, "note": "",
    }  # fmt: skip


SHARED = [entry("prepare", "corpus", 10.0, scope="generic", devices=1)]
TEACHER = entry("train", "teacher", 100.0, scope="generic", flops=5e9, tokens=5000)


def records(seed):
    train = [
        {"kind": "train", "step": i, "tokens": 1000 * i, "loss": 6 - 0.01 * i + seed}
        for i in range(1, 301)
    ]
    checks = [
        {"kind": "validation", "step": i, "tokens": 1000 * i, "loss": 5.0, "bits_per_byte": 2.0}
        for i in (100, 200, 300)
    ]
    return train + checks


def ledger(name, extra=()):
    runs = [entry("train", f"{name}-{s}", 50.0, flops=2e9, tokens=3000) for s in (0, 1)]
    trials = [entry("tune", f"{name}-lr{i}", 5.0, flops=1e8, tokens=100) for i in range(3)]
    exports = [entry("export", f"{name}-{s}", 1.0, devices=1) for s in (0, 1)]
    return [*SHARED, *extra, *runs, *trials, *exports]


@pytest.fixture(scope="module")
def inputs(make_export, task_files, shapes):
    def arm(kind, extra=(), match=None):
        exports = [
            ExportInput(make_export(kind, s), s, records(s), {"config_hash": "abc", "seed": s})
            for s in (0, 1)
        ]
        group = "moe" if shapes[kind].moe else "dense"
        return ArmInput(
            kind, group, exports, match=match, model=shapes[kind], equal_on="tokens",
            ledger=ledger(kind, extra),
        )  # fmt: skip

    arms = [arm("llama"), arm("mixtral", match="bytes"), arm("qwen3", extra=[TEACHER])]
    budgets = {
        "flops": BudgetConfig(
            axis="active_flops_per_token", target=50_000, tolerance=0.5, context=64
        ),
        "bytes": BudgetConfig(axis="resident_bytes", target=60_000, tolerance=0.5, context=64),
        "speed": BudgetConfig(axis="latency_ms", target=5.0, tolerance=0.9, context=64),
    }
    tasks = TasksConfig(
        perplexity={"text": str(task_files["documents"])},
        brainbench=(str(task_files["brainbench"]),),
        multiple_choice={"quiz": str(task_files["questions"])},
    )
    first = json.loads(task_files["documents"].read_text().splitlines()[0])["text"]
    return {
        "arms": arms,
        "budgets": budgets,
        "tasks": tasks,
        "references": References(np.full(320, 7), make_export("llama", 9)),
        "training_texts": TrainingTexts(lambda: ["unrelated", first], "key"),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(inputs, cache):
    return compare(**inputs, cache=cache, name="small")


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


def test_lone_foreign_export_is_reported(inputs, make_export, tmp_path):
    """`shoal compare` of one model: no formula, no ledger, no seed, no references."""
    arm = ArmInput("only", "dense", [ExportInput(make_export("gpt2"))])
    found = compare([arm], {"bytes": inputs["budgets"]["bytes"]}, inputs["tasks"])
    assert found["verdict"]["outcome"] == "single"
    assert found["cost_curve"] is None
    assert not found["contamination"]["searched"]
    assert found["arms"][0]["matched"]["formula"] is None
    write_report(found, tmp_path / "report")


def verdict_arm(name, value, *, within=True, flops=1e6, size=1e6):
    score = {"metric": "bits_per_byte", "higher_is_better": False, "value": value}
    return {
        "name": name, "export": f"runs/{name}", "tasks": {"text": score},
        "matched": {"within": within, "deviation": 0.2, "axis": "resident_bytes", "budget": "b"},
        "inference": {"flops_per_token": flops, "bytes_resident": size},
        "parameters": {"total": 1_000_000}, "training": {"tokens": 2e6},
    }  # fmt: skip


def verdict_pair(a, b, outcome, difference=-0.02):
    return {
        "a": a, "b": b, "task": "text", "metric": "bits_per_byte", "difference": difference,
        "outcome": outcome, "detectable_difference": 0.01, "seed_spread": 0.005, "n": 100,
    }  # fmt: skip


UNIGRAM = [{"name": "unigram", "tasks": {"text": {"metric": "bits_per_byte", "value": 2.0}}}]


def test_winner_must_beat_all_others():
    arms = [verdict_arm("a", 1.0), verdict_arm("b", 1.1), verdict_arm("c", 1.2)]
    pairs = [
        verdict_pair("a", "b", "a"),
        verdict_pair("a", "c", "a"),
        verdict_pair("b", "c", "undecided"),
    ]
    verdict = reach_verdict(arms, pairs, UNIGRAM, "text")
    assert (verdict["outcome"], verdict["winner"], verdict["deploy"]) == ("winner", "a", "a")
    assert verdict["headline"].startswith("a wins: 1.0000 bits per byte")
    assert any("40% below the unigram" in sentence for sentence in verdict["sentences"])
    pairs[0] = verdict_pair("a", "b", "undecided")
    verdict = reach_verdict(arms, pairs, UNIGRAM, "text")
    assert (verdict["outcome"], verdict["winner"], verdict["leader"]) == ("undecided", None, "a")
    assert verdict["unbeaten"] == ["a", "b"]
    assert "does not separate it from b" in verdict["headline"]


def test_undecided_deploys_the_cheapest_unbeaten():
    arms = [verdict_arm("a", 1.0, flops=2e6), verdict_arm("b", 1.01), verdict_arm("c", 1.02)]
    pairs = [
        verdict_pair("a", "b", "undecided"),
        verdict_pair("a", "c", "a"),
        verdict_pair("b", "c", "undecided"),
    ]
    verdict = reach_verdict(arms, pairs, UNIGRAM, "text")
    assert verdict["deploy"] == "b"
    assert verdict["export"] == "runs/b"
    assert "Deploy b" in verdict["sentences"][0]


def test_arm_off_its_budget_cannot_win():
    arms = [verdict_arm("a", 1.0, within=False), verdict_arm("b", 1.1), verdict_arm("c", 1.2)]
    pairs = [
        verdict_pair("a", "b", "a"), verdict_pair("a", "c", "a"), verdict_pair("b", "c", "a"),
    ]  # fmt: skip
    verdict = reach_verdict(arms, pairs, UNIGRAM, "text")
    assert (verdict["winner"], verdict["off_budget"]) == ("b", ["a"])
    assert any("cannot win" in sentence for sentence in verdict["sentences"])
    lost = [verdict_arm("a", 1.0, within=False)]
    assert reach_verdict(lost, [], [], "text")["outcome"] == "none"


def test_weak_arm_is_called_weak():
    arms = [verdict_arm("a", 1.0), verdict_arm("b", 1.9)]
    verdict = reach_verdict(arms, [verdict_pair("a", "b", "a")], UNIGRAM, "text")
    assert any(s.startswith("b learned little") for s in verdict["sentences"])


class Page(HTMLParser):
    """Collects what a page holds and refers to."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.ids, self.tags, self.open, self.urls = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href"):
                self.urls.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


def test_html_is_whole_and_alone(page, report):
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(SECTIONS) <= set(parsed.ids)
    assert all(url.startswith("#") and url[1:] in parsed.ids for url in parsed.urls)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 4
    assert "prefers-color-scheme: dark" in page
    assert page.index('id="verdict"') < page.index('id="arms"')
    for row in report["arms"]:
        assert row["name"] in page


def test_svg_takes_the_colour_of_the_page(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert "currentColor" in drawn
    assert "#000000" not in drawn and "#010203" not in drawn and "#ffffff" not in drawn


def test_names_are_escaped(report):
    changed = copy.deepcopy(report)
    changed["arms"][0]["provenance"]["command"] = "<script>alert(1)</script>"
    assert "<script>" not in render_html(changed)


def test_rendering_is_deterministic(page, report):
    assert render_html(json.loads(json.dumps(report))) == page


def test_markdown_has_every_section_and_whole_tables(report):
    text = render_markdown(report)
    for heading in ("Verdict", "Arms", "Budgets", "Quality", "Every pair", "Cost", "Provenance"):
        assert f"\n## {heading}\n" in text
    width = None
    for line in text.splitlines():
        if line.startswith("|"):
            columns = line.count("|")
            assert width in (None, columns), line
            width = columns
        else:
            width = None
    assert report["verdict"]["headline"] in text


def test_report_is_written_whole_and_replaced(report, tmp_path):
    folder = write_report(report, tmp_path / "reports" / "small")
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    check_report(json.loads((folder / "report.json").read_text()))
    assert [f.name for f in folder.parent.iterdir()] == ["small"]
    write_report(report, folder)
    assert [f.name for f in folder.parent.iterdir()] == ["small"]


def test_folder_of_somebody_else_is_not_touched(report, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a report"):
        write_report(report, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("verdict"),
        lambda r: r.update(extra=1),
        lambda r: r["arms"][0]["parameters"].update(total="many"),
        lambda r: r["pairs"][0].update(outcome="maybe"),
    ],
)
def test_schema_refuses_what_breaks_the_contract(report, spoil, tmp_path):
    broken = copy.deepcopy(report)
    spoil(broken)
    with pytest.raises(ConfigError, match="not a valid report"):
        write_report(broken, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_arm_without_ledger_has_no_cost_curve():
    arm = ArmInput("a", "dense", [ExportInput("x")])
    training = describe_training(arm)
    assert training["device_seconds"] == 0
    row = {"name": "a", "training": training, "inference": {"flops_per_token": 1.0}}
    assert cost_curve([row]) is None
    assert total_ledger([arm])["generic"]["seconds"] == 0
