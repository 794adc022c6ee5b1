"""Multiple choice: the continuation a model finds likeliest per byte is its answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from shoal.configs.errors import DataError
from shoal.eval.candidate import Candidate
from shoal.eval.scoring import Request
from shoal.eval.tasks.items import locate, read_items
from shoal.eval.tasks.task import ItemScores, accuracy_scores, hash_files


class MultipleChoiceTask:
    """Questions with choices; one item a question.

    A choice continues the question after one space. `accuracy` compares log-likelihoods per byte
    of the choice, so that long choices have no handicap; `accuracy_raw` compares plain sums. A tie
    for the best counts as wrong.
    """

    kind = "multiple_choice"
    version = 1
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, name: str, path: str, max_items: int | None = None) -> None:
        self.name = name
        file = locate(path)
        fields: dict[str, type | tuple[type, ...]] = {
            "question": str,
            "choices": list,
            "answer": (int, str),
        }
        records = read_items(file, fields, max_items)
        self._questions = [record["question"] for _, record in records]
        self._choices = [_choices(record, place) for place, record in records]
        self._answers = [_answer(record, place) for place, record in records]
        self._ids = [str(record.get("id", place)) for place, record in records]
        self.file_hash = hash_files([file], max_items)

    def item_ids(self) -> list[str]:
        """Name every question."""
        return self._ids

    def texts(self) -> list[str]:
        """Return every question with its right answer."""
        answers = zip(self._questions, self._choices, self._answers, strict=True)
        return [_continue(question, choices[right]) for question, choices, right in answers]

    def requests(self, candidate: Candidate) -> list[Request]:
        """One request a choice; the question's own tokens are what its choices share."""
        texts = [
            _continue(question, choice)
            for question, choices in zip(self._questions, self._choices, strict=True)
            for choice in choices
        ]
        wholes = iter(candidate.encode(texts))
        questions = candidate.encode([question.rstrip(" ") for question in self._questions])
        start = candidate.start_id
        return [
            Request([start, *whole[: len(question)]], whole[len(question) :])
            for question, choices in zip(questions, self._choices, strict=True)
            for whole in islice(wholes, len(choices))
        ]

    def scores(self, requests: Sequence[Request], nats: Sequence[float]) -> ItemScores:
        """Right where the answer is the single best choice."""
        correct, raw, margins = [], [], []
        position = 0
        for choices, answer in zip(self._choices, self._answers, strict=True):
            costs = nats[position : position + len(choices)]
            position += len(choices)
            rates = [cost / len(c.encode()) for cost, c in zip(costs, choices, strict=True)]
            correct.append(_is_best(rates, answer))
            raw.append(_is_best(costs, answer))
            lowest, second = sorted(rates)[:2]
            margins.append(second - lowest)
        scores = accuracy_scores(correct, confidence=margins)
        scores.extra["accuracy_raw"] = sum(raw) / len(raw)
        scores.extra["chance"] = sum(1 / len(c) for c in self._choices) / len(self._choices)
        return scores


def _continue(question: str, choice: str) -> str:
    """Return a question and a choice with one space between them, which is the choice's."""
    return question.rstrip(" ") + " " + choice.lstrip(" ")


def _choices(record: dict[str, Any], place: str) -> list[str]:
    choices = record["choices"]
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError("choices must be at least two texts", where=place)
    if len(set(choices)) < len(choices):
        raise DataError("a choice is given twice", where=place)
    return choices


def _answer(record: dict[str, Any], place: str) -> int:
    """Return the index of the right choice, given as index or as text."""
    answer, choices = record["answer"], record["choices"]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    raise DataError(f"answer {answer!r} is none of the {len(choices)} choices", where=place)


def _is_best(costs: Sequence[float], answer: int) -> bool:
    return all(costs[answer] < cost for i, cost in enumerate(costs) if i != answer)
