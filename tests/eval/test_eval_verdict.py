"""The verdict: who may win, who is named for deployment, and what is said about it."""

import pytest

from shoal.eval.verdict import reach_verdict


def measured(deviation, *, within, axis="resident_bytes", rule="match"):
    return {"axis": axis, "deviation": deviation, "within": within, "rule": rule}


def verdict_arm(
    name, value, *, within=True, flops=1e6, size=1e6, seeds=2, budgets=None, own="b", teacher=None
):
    per_seed = [{"seed": seed, "value": value} for seed in range(seeds)]
    score = {
        "metric": "bits_per_byte", "higher_is_better": False, "value": value, "per_seed": per_seed,
    }  # fmt: skip
    budgets = budgets or {"b": measured(0.0 if within else 0.2, within=within)}
    return {
        "name": name, "teacher": teacher, "export": f"runs/{name}", "tasks": {"text": score},
        "matched": {"budget": own, **budgets[own]}, "budgets": budgets,
        "inference": {"flops_per_token": flops, "bytes_resident": size},
        "parameters": {"total": 1_000_000}, "training": {"tokens": 2e6},
    }  # fmt: skip


def verdict_pair(a, b, outcome, difference=-0.02, spread=0.005):
    return {
        "a": a, "b": b, "task": "text", "metric": "bits_per_byte", "difference": difference,
        "outcome": outcome, "detectable_difference": 0.01, "seed_spread": spread, "n": 100,
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
    assert "a has the best mean (1.0000" in verdict["headline"]
    off = reach_verdict([*arms, verdict_arm("d", 0.9, within=False)], pairs, UNIGRAM, "text")
    assert "a has the best mean of the arms within their budgets (1.0000" in off["headline"]


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


def two_arms(**first):
    return [verdict_arm("a", 1.0, **first), verdict_arm("b", 1.1)]


def test_headline_claims_seeds_only_where_there_are_several():
    known = reach_verdict(two_arms(), [verdict_pair("a", "b", "a")], UNIGRAM, "text")
    assert known["headline"].endswith("beyond chance and beyond the spread between seeds.")
    pairs = [verdict_pair("a", "b", "a", spread=None)]
    alone = reach_verdict(two_arms(seeds=1), pairs, UNIGRAM, "text")["headline"]
    assert "beyond the spread" not in alone
    assert "holds for these exports" in alone and "other seeds would change is unknown" in alone


def test_what_items_could_show_names_the_pairs_p_is_adjusted_over():
    arms = [verdict_arm(name, 1.0) for name in "abc"]
    pairs = [verdict_pair(a, b, "undecided") for a, b in (("a", "b"), ("a", "c"), ("b", "c"))]
    for given, adjusted in ((pairs, " and p adjusted over 3 pairs,"), (pairs[:1], ",")):
        assert (
            f"With 100 items{adjusted} a true difference of 0.0100 is told from chance over items "
            "at least four times out of five; a smaller one is missed more often."
        ) in reach_verdict(arms, given, [], "text")["sentences"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.9, "better by 0.1000"), (1.05, "not better: the student is ahead by 0.0500")],
)
def test_teacher_among_the_references_is_set_beside_its_student(value, said):
    arms = [verdict_arm("small", 1.0, teacher="big"), verdict_arm("other", 1.1)]
    big = {"name": "big", "tasks": {"text": {"metric": "bits_per_byte", "value": value}}}
    pairs = [verdict_pair("small", "other", "a")]
    sentences = reach_verdict(arms, pairs, [big], "text")["sentences"]
    assert f"big, the teacher of small, is {said} bits per byte on text (untested)." in sentences
    assert not any("the teacher" in s for s in reach_verdict(arms, pairs, [], "text")["sentences"])


def test_headline_names_only_rivals_that_could_win():
    arms = [verdict_arm("a", 1.0), verdict_arm("b", 0.9, within=False)]
    headline = reach_verdict(arms, [verdict_pair("a", "b", "b")], [], "text")["headline"]
    assert headline == "a wins: 1.0000 bits per byte on text, the only arm within its budget."
    arms.append(verdict_arm("c", 1.1))
    pairs = [verdict_pair("a", "c", "a"), verdict_pair("b", "c", "b", spread=None)]
    headline = reach_verdict(arms, pairs, [], "text")["headline"]
    assert "better than every other arm within its budget beyond chance and beyond" in headline


def test_spread_of_few_seeds_is_called_uncertain():
    verdict = reach_verdict(two_arms(), [verdict_pair("a", "b", "a")], UNIGRAM, "text")
    assert any("With 2 seeds an arm, the spread is itself uncertain" in s
               for s in verdict["sentences"])  # fmt: skip


def test_limit_that_is_exceeded_is_named_so():
    budgets = {
        "memory": measured(0.352, within=False, rule="limit"),
        "speed": measured(-0.2, within=False, axis="tokens_per_second", rule="limit"),
        "work": measured(-0.5, within=True, axis="active_flops_per_token", rule="limit"),
    }
    heavy = verdict_arm("a", 1.0, budgets=budgets, own="memory")
    verdict = reach_verdict([heavy], [], [], "text")
    assert verdict["headline"] == "No verdict: no arm keeps within every budget."
    assert (
        "a exceeds memory (resident bytes) by 35.2% and falls short of speed (tokens per second) "
        "by 20.0% and cannot win." in verdict["sentences"]
    )
    assert (
        "No arm was built to a budget: each of them is a limit for every arm."
        in (verdict["sentences"])
    )


def test_winner_far_over_another_budget_is_told_of():
    def budgets(work, memory):
        return {
            "work": measured(work, within=abs(work) < 0.03, axis="active_flops_per_token"),
            "memory": measured(memory, within=abs(memory) < 0.03),
        }

    arms = [
        verdict_arm("moe", 1.0, budgets=budgets(0.01, 1.352), own="work"),
        verdict_arm("small", 1.2, budgets=budgets(-0.3, 0.02), own="memory"),
        verdict_arm("heavy", 1.3, budgets=budgets(0.01, 2.0), own="work"),
    ]
    pairs = [
        verdict_pair("moe", "small", "a"), verdict_pair("moe", "heavy", "a"),
        verdict_pair("small", "heavy", "undecided"),
    ]  # fmt: skip
    sentences = reach_verdict(arms, pairs, UNIGRAM, "text")["sentences"]
    assert "moe, built to work alone, exceeds memory (resident bytes) by 135.2%." in sentences
    built = "There are several budgets: moe and heavy built to work; small built to memory."
    assert built in sentences
    assert not any(s.startswith(("small, built", "heavy, built")) for s in sentences)
    pairs[0] = verdict_pair("moe", "small", "undecided")  # deploys small, whose work has room
    assert any(s.startswith("moe, built to work alone")
               for s in reach_verdict(arms, pairs, UNIGRAM, "text")["sentences"])  # fmt: skip


@pytest.mark.parametrize("low", [1e6, 1.0124e6, 1.0305e6, 1.062e6])
def test_arms_of_nearly_equal_flops_are_ordered_by_bytes(low):
    """Wherever the cheapest lies: no edge of a bin may come between two close arms."""
    pairs = [
        verdict_pair(a, b, "undecided") for a, b in (("a", "b"), ("a", "c"), ("b", "c"))
    ]  # fmt: skip
    arms = [
        verdict_arm("a", 1.00, flops=low, size=3e6),
        verdict_arm("b", 1.01, flops=1.003 * low, size=2e6),
        verdict_arm("c", 1.02, flops=1.031 * low, size=1e6),
    ]
    assert reach_verdict(arms, pairs, [], "text")["deploy"] == "b"
    arms = [
        verdict_arm("z", 1.0, flops=1.02 * low, size=1e6),
        verdict_arm("y", 1.0, flops=low, size=1e6),
    ]
    for given in (arms, arms[::-1]):
        assert (
            reach_verdict(given, [verdict_pair("y", "z", "undecided")], [], "text")["deploy"] == "y"
        )
