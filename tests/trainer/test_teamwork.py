"""Waiting for the work of other ranks: seen to move, and told of errors."""

import pytest

pytestmark = pytest.mark.slow


def test_ranks_that_wait_see_that_the_others_get_further(ranks):
    answer = ranks(2).run({"a": {"run": "teamwork", "ticks": 6}})["a"]
    assert answer["result"] == 0, "rank 0 has its own"
    assert set(answer["told"]) == {"working"} and len(answer["told"]) >= 6


def test_ranks_that_wait_see_that_the_others_hang(ranks):
    answer = ranks(2).run({"a": {"run": "teamwork", "ticks": 0, "silent": 1.0}})["a"]
    assert answer["told"] == ["working"]


def test_what_befalls_one_rank_is_raised_on_all(ranks):
    answer = ranks(2).run({"a": {"run": "teamwork", "ticks": 1, "error": "broken"}})["a"]
    assert answer["error"] == "there: broken"
