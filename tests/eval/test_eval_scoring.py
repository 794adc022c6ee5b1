"""Scores equal a plain transformers loop, whatever the batching, windowing and model class."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.configs.errors import ConfigError, DataError
from shoal.eval import scoring
from shoal.eval.candidate import Candidate
from shoal.eval.scoring import Request, score_texts, split_windows, unigram_scores
from shoal.eval.tasks.brainbench import PROMPT, BrainBenchTask
from shoal.eval.tasks.multiple_choice import MultipleChoiceTask
from shoal.eval.tasks.perplexity import PerplexityTask

KINDS = ("llama", "gpt2", "qwen3", "mixtral", "qwen3_moe")


def plain_nats(folder, ids, first):
    """Sum of -log p of tokens from `first` on, one sequence at a time, whole logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logs = logits.log_softmax(-1)
    return -sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_plain_loop(make_export, kind):
    candidate = Candidate.open(make_export(kind))
    rng = np.random.default_rng(0)
    requests = []
    for length in (2, 40, 17, 60, 5, 33, 64):
        ids = rng.integers(1, 320, length).tolist()
        prefix = int(rng.integers(1, length))
        requests.append(Request(ids[:prefix], ids[prefix:]))
    scores = score_texts(candidate, requests)
    for request, score in zip(requests, scores, strict=True):
        ids = request.prefix_ids + request.target_ids
        expected = plain_nats(candidate.folder, ids, len(request.prefix_ids))
        assert score == pytest.approx(expected, abs=1e-4)


def test_small_batches_change_nothing(make_export, monkeypatch):
    candidate = Candidate.open(make_export("mixtral"))
    requests = [Request([0], list(range(1, n))) for n in (9, 30, 12, 50)]
    together = score_texts(candidate, requests)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 1)
    assert score_texts(candidate, requests) == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("prefix", [1, 3, 20, 41])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 42, 100])
@pytest.mark.parametrize("context", [1, 2, 8, 9])
def test_windows_score_each_target_once(prefix, length, context):
    if length < prefix:
        return
    windows = list(split_windows(0, prefix, length, context))
    scored = [p for w in windows for p in range(w.first, w.end + 1)]
    assert scored == list(range(prefix, length))
    for window in windows:
        assert window.length <= context
        assert 0 <= window.begin < window.first <= window.end < length
    if length - 1 > context:
        for window in windows:  # half a window of context, or everything there is
            assert window.begin == 0 or window.first - window.begin >= context - context // 2


def test_long_document_equals_plain_strided_loop(make_export):
    candidate = Candidate.open(make_export("llama"))
    ids = np.random.default_rng(1).integers(1, 320, 150).tolist()
    expected = plain_nats(candidate.folder, [0, *ids[:64]], 1)
    ids_with_start = [0, *ids]
    scored = 64
    while scored < 150:
        end = min(150, scored + 32)
        begin = end - 64
        expected += plain_nats(
            candidate.folder, ids_with_start[begin : end + 1], scored + 1 - begin
        )
        scored = end
    assert score_texts(candidate, [Request([0], ids)])[0] == pytest.approx(expected, abs=1e-4)


def test_window_longer_than_model_is_refused(make_export):
    candidate = Candidate.open(make_export("llama"))
    with pytest.raises(ConfigError, match="longer than the model's 64"):
        score_texts(candidate, [Request([0], [1])], context=65)


def test_request_without_prefix_is_refused(make_export):
    with pytest.raises(DataError):
        score_texts(Candidate.open(make_export("llama")), [Request([], [1, 2])])


def test_bf16_means_rounded_weights_and_fp32_arithmetic(make_export):
    candidate = Candidate.open(make_export("llama"))
    ids = list(range(1, 60))
    model = AutoModelForCausalLM.from_pretrained(candidate.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logs = model.float().eval()(torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
    expected = -sum(float(logs[i, token]) for i, token in enumerate(ids))
    rounded = score_texts(candidate, [Request([0], ids)], precision="bf16")[0]
    assert rounded == pytest.approx(expected, abs=1e-3)
    assert rounded != score_texts(candidate, [Request([0], ids)])[0]


def test_perplexity_and_bits_per_byte_by_hand(make_export, task_files):
    candidate = Candidate.open(make_export("gpt2"))
    task = PerplexityTask("text", str(task_files["documents"]), max_items=4)
    requests = task.requests(candidate)
    short = [i for i, r in enumerate(requests) if len(r.target_ids) <= 64]
    assert short
    scores = task.scores(requests, score_texts(candidate, requests))
    for i in short:
        ids = [0, *requests[i].target_ids]
        nats = plain_nats(candidate.folder, ids, 1)
        assert scores.numerator[i] == pytest.approx(nats / math.log(2), abs=1e-4)
        assert scores.denominator[i] == len(task.texts()[i].encode())
    tokens = sum(len(r.target_ids) for r in requests)
    nats = sum(scores.numerator) * math.log(2)
    assert scores.extra["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert scores.value == pytest.approx(sum(scores.numerator) / sum(scores.denominator))


def test_brainbench_reproduces_hand_computed_choices(make_export, task_files):
    candidate = Candidate.open(make_export("llama"))
    task = BrainBenchTask("brainbench", [str(task_files["brainbench"])])
    requests = task.requests(candidate)
    # Protocol: prompt included, the first token not scored, no start token before it.
    text = candidate.tokenizer.decode(requests[0].prefix_ids + requests[0].target_ids)
    assert text == PROMPT + task.texts()[0]
    assert len(requests[0].prefix_ids) == 1 and requests[0].prefix_ids != [candidate.start_id]
    nats = score_texts(candidate, requests, context=64)
    scores = task.scores(requests, nats)
    for i in range(12):
        original, altered = (
            math.exp(nats[2 * i + j] / len(requests[2 * i + j].target_ids)) for j in (0, 1)
        )
        assert scores.numerator[i] == float(original < altered)
        assert scores.detail["confidence"][i] == pytest.approx(abs(original - altered))
    assert 0 < sum(scores.numerator) < 12  # an untrained model is right about half the time


def test_brainbench_tie_is_wrong(make_export, task_files):
    candidate = Candidate.open(make_export("llama"))
    task = BrainBenchTask("brainbench", [str(task_files["brainbench"])])
    requests = [Request([1], [2, 3])] * 24
    assert task.scores(requests, [5.0] * 24).value == 0.0
    assert candidate.kind == "dense"


def test_brainbench_prompt_is_the_published_one():
    """Luo et al. 2024, Methods; one letter changed and accuracies compare with no paper."""
    assert PROMPT == (
        "You are a neuroscientist with deep knowledge in neuroscience. Here is an abstract from a "
        "neuroscience publication: "
    )


def test_multiple_choice_scores_per_byte(make_export, task_files):
    candidate = Candidate.open(make_export("llama"))
    task = MultipleChoiceTask("quiz", str(task_files["questions"]))
    requests = task.requests(candidate)
    assert len(requests) == 27
    shown = candidate.tokenizer.decode(requests[2].target_ids)
    assert shown == " in some animals"
    nats = score_texts(candidate, requests)
    lengths = [len(c) for c in ("yes", "no", "in some animals")]
    expected, raw = [], []
    for i in range(9):
        costs = nats[3 * i : 3 * i + 3]
        expected.append(float(int(np.argmin(np.divide(costs, lengths))) == i % 3))
        raw.append(float(int(np.argmin(costs)) == i % 3))
    scores = task.scores(requests, nats)
    assert scores.numerator == expected
    assert scores.extra["accuracy_raw"] == pytest.approx(np.mean(raw))
    assert scores.extra["chance"] == pytest.approx(1 / 3)


def test_choices_of_unlike_numbers_stay_with_their_question(make_export, tmp_path):
    file = tmp_path / "questions.jsonl"
    asked = {"the cell ": ["a", "b", "c"], "mice were": ["yes", "  no"]}
    file.write_text("".join(
        json.dumps({"question": q, "choices": c, "answer": 0}) + "\n" for q, c in asked.items()
    ))  # fmt: skip
    candidate = Candidate.open(make_export("llama"))
    shown = [
        [candidate.tokenizer.decode(ids) for ids in (r.prefix_ids[1:], r.target_ids)]
        for r in MultipleChoiceTask("quiz", str(file)).requests(candidate)
    ]
    assert shown == [["the cell", f" {c}"] for c in "abc"] + [["mice were", f" {c}"]
                                                             for c in ("yes", "no")]  # fmt: skip


def test_unigram_is_add_one():
    counts = np.array([3, 0, 1])
    scores = unigram_scores([Request([0], [0, 1]), Request([0], [2])], counts)
    assert scores == pytest.approx([-math.log(4 / 7) - math.log(1 / 7), -math.log(2 / 7)])


def test_special_token_in_text_stays_text(make_export):
    candidate = Candidate.open(make_export("llama"))
    ids = candidate.encode(["a<|endoftext|>b"])[0]
    assert candidate.start_id == 0
    assert 0 not in ids
    assert candidate.tokenizer.decode(ids) == "a<|endoftext|>b"
