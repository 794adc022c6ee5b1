"""What a benchmark prints: the arithmetic of a claim, and its one line. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "name", "ours", "peer", "unit", "ratio", "target", "met", "spread", "versions", "hardware",
}  # fmt: skip


@pytest.fixture
def claims(monkeypatch):
    """The module, which lies outside the package and is imported from the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.claims")


@pytest.fixture
def make_claim(claims):
    def make(ours, peer, target, unit="tokens/s"):
        turns = claims.Turns(tuple(ours), tuple(peer))
        return claims.Claim.from_turns("a claim", unit, turns, target, {"context": 16})

    return make


def test_ratio_is_ours_over_the_peer_within_a_round(claims, make_claim):
    # The second round was disturbed for both alike; medians of the columns would say 20 / 4.
    claim = make_claim([20, 2, 30], [4, 1, 10], claims.Target(">=", 3))
    assert claim.ratio == 3.0
    assert (claim.ours, claim.peer) == (20, 4)
    assert claim.spread == (2.5, 4.0)
    assert claim.met


@pytest.mark.parametrize(
    ("bound", "limit", "met"),
    [(">=", 2.0, True), (">=", 2.1, False), ("<=", 2.0, True), ("<=", 1.9, False)],
)
def test_target_of_the_ratio(claims, make_claim, bound, limit, met):
    claim = make_claim([4, 4], [2, 2], claims.Target(bound, limit))
    assert (claim.ratio, claim.met, claim.target) == (2.0, met, f"ratio {bound} {limit:g}")


@pytest.mark.parametrize(("limit", "met"), [(50, True), (39, False)])
def test_target_of_our_own_figure(claims, make_claim, limit, met):
    claim = make_claim([40, 40], [1, 1], claims.Target("<=", limit, of="ours"), unit="ms")
    assert (claim.met, claim.target) == (met, f"ours <= {limit}")


def test_met_is_decided_before_rounding(claims, make_claim):
    claim = make_claim([1.03004] * 2, [1.0] * 2, claims.Target("<=", 1.03))
    assert not claim.met
    assert json.loads(claim.to_json())["ratio"] == 1.03


def test_a_claim_is_one_line_with_all_keys(claims, make_claim, capsys):
    claims.print_claim(make_claim([1.23456789, 2], [1, 2], claims.Target(">=", 1)))
    printed = capsys.readouterr().out
    assert printed.endswith("\n") and printed.count("\n") == 1
    tree = json.loads(printed)
    assert tree.keys() == KEYS | {"setup"}
    assert tree["setup"] == {"rounds": 2, "context": 16}
    assert tree["versions"].keys() == set(claims.PACKAGES)
    assert {"cpu", "cores", "threads", "gpu"} <= tree["hardware"].keys()
    assert tree["ours"] == 1.617


@pytest.mark.parametrize(
    "figures",
    [([1], [1]), ([1, 0], [1, 1]), ([1, 1], [1, float("nan")]), ([1, float("inf")], [1, 1])],
)
def test_figures_that_say_nothing_are_refused(claims, make_claim, figures):
    with pytest.raises(ValueError, match="a claim"):
        make_claim(*figures, claims.Target(">=", 1))


def test_turns_alternate_and_drop_the_warm_up(claims):
    order = []

    def work(name):
        def call():
            order.append(name)
            return float(len(order))

        return call

    turns = claims.take_turns(work("ours"), work("peer"), rounds=2, warm_up=1)
    assert "".join(name[0] for name in order) == "poop" + "po"
    assert turns == claims.Turns(ours=(3.0, 6.0), peer=(4.0, 5.0))


@pytest.mark.parametrize(
    ("ours", "peer", "tolerance", "message"),
    [
        ([1.0, 2.0], [1.0, 2.2], 0.1, "differ by 0.2"),
        ([1.0], [float("nan")], 0.1, "differ by nan"),
        ([1], [1, 1], 0.0, "shapes"),
        ([3], [4], 0.0, "differ by 1"),
    ],
)
def test_wrong_results_raise(claims, ours, peer, tolerance, message):
    with pytest.raises(claims.WrongResultError, match=message):
        claims.check_equal("rows", ours, peer, tolerance)


def test_equal_results_pass(claims):
    claims.check_equal("rows", [1.0, 2.0], [1.0, 2.05], 0.1)
    claims.check_equal("nothing", [], [])


def test_make_bench_runs_every_benchmark():
    found = re.search(r"^BENCHMARKS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    files = (ROOT / "benchmarks").glob("*.py")
    runnable = {file.stem for file in files if '__name__ == "__main__"' in file.read_text()}
    assert set(found[1].split()) == runnable


def test_a_restart_is_judged_by_our_own_seconds(claims):
    restart = importlib.import_module("benchmarks.restart")
    figures = {
        "training again after SIGKILL of a rank": [(31.0, 10.0), (32.0, 10.0)],
        "training on after the loss of a host": [(31.0, 10.0), (32.0, 10.0)],
        "saved and ended after SIGTERM to a guard": [(2.0, 10.0), (3.0, 10.0)],
        "no process left after SIGTERM to a guard": [(11.0, 10.0), (12.0, 10.0)],
    }
    judged = list(restart.judge(figures, "two hosts"))
    assert [(claim.target, claim.met) for claim in judged] == [
        ("ours <= 30", False),
        ("ours <= 90", True),
        ("ours <= 20", True),
        ("ours <= 10", False),
    ]
    assert judged[0].name == "training again after SIGKILL of a rank, two hosts"
    assert (judged[0].ours, judged[0].peer) == (31.5, 10.0)
