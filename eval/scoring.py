"""Log-likelihoods: texts as requests, requests as windows, windows in batches of like length.

Rows are padded on the right: under causal attention padding cannot reach a scored token, so no
mask is needed. Logits are computed from the first scored position of a batch on, never before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from shoal.configs.errors import DataError
from shoal.eval.candidate import Candidate
from shoal.eval.inputs import Progress

BATCH_TOKENS = 4096
BATCH_LOGITS = 12_000_000  # numbers; 48 MB in fp32 stays friendly to small machines


@dataclass(frozen=True)
class Request:
    """Score `target_ids` after `prefix_ids`; the prefix holds at least one token."""

    prefix_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a request are fed; tokens [first, end] are scored."""

    request: int
    begin: int
    end: int
    first: int

    @property
    def length(self) -> int:
        """Tokens fed to the model."""
        return self.end - self.begin


def score_texts(
    candidate: Candidate,
    requests: Sequence[Request],
    *,
    precision: str = "fp32",
    context: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return the negative log-likelihood of every request's targets, summed, in nats.

    Args:
        candidate: The model.
        requests: Any order; batched here by length.
        precision: What weights are rounded to; arithmetic is fp32.
        context: Window in tokens; None: the model's own.
        progress: Called with (label, windows done, windows in all).

    Raises:
        ConfigError: `context` is longer than the model's own.
        DataError: a request has no prefix, or a score is not finite.
    """
    width = context or candidate.context
    candidate.check_context(width)
    model = candidate.rounded_model(precision)
    sequences = [request.prefix_ids + request.target_ids for request in requests]
    windows = _cut_windows(requests, width)
    totals = np.zeros(len(requests), dtype=np.float64)
    done = 0
    for batch in _batches(windows, candidate.vocab_size):
        for window, value in zip(batch, _score_batch(model, sequences, batch), strict=True):
            totals[window.request] += value
        done += len(batch)
        if progress:
            progress(f"scoring {candidate.name}", done, len(windows))
    if not np.isfinite(totals).all():
        raise DataError("the model gives scores that are not finite", where=candidate.folder)
    return totals.tolist()


def _cut_windows(requests: Sequence[Request], context: int) -> list[Window]:
    """Return the windows of all requests, longest first, those scored from like places together."""
    windows = [
        window
        for number, request in enumerate(requests)
        for window in split_windows(
            number,
            len(request.prefix_ids),
            len(request.prefix_ids) + len(request.target_ids),
            context,
        )
    ]
    return sorted(
        windows, key=lambda window: (-window.length, window.first - window.begin, window.request)
    )


def split_windows(request: int, prefix: int, length: int, context: int) -> Iterator[Window]:
    """Cut a sequence so that every target is scored once, with at least half a window before it.

    A sequence that fits is one window. Otherwise windows of full `context` follow each other by
    half of it, and each scores only what the one before did not.

    Args:
        request: Number to carry along.
        prefix: Tokens at the start that are not scored, at least one.
        length: Tokens in all.
        context: Most tokens a window may feed.
    """
    if prefix < 1:
        raise DataError("a request needs at least one token before its targets")
    last = length - 1  # the last token is predicted, never fed
    scored = prefix - 1
    while scored < last:
        if last <= context:
            end = last
        elif scored < context // 2:
            end = context
        else:
            end = min(last, scored + max(1, context // 2))
        yield Window(request, max(0, end - context), end, scored + 1)
        scored = end


def unigram_scores(requests: Sequence[Request], counts: np.ndarray) -> list[float]:
    """Score targets by add-one smoothed token counts of the training shards, in nats.

    Args:
        requests: Their prefixes are ignored.
        counts: Occurrences of each token id.  # (vocab,)
    """
    smoothed = counts.astype(np.float64) + 1.0
    costs = np.log(smoothed.sum()) - np.log(smoothed)
    return [float(costs[request.target_ids].sum()) for request in requests]


def _batches(windows: Sequence[Window], vocab_size: int) -> Iterator[list[Window]]:
    """Group neighbours while they fit; `windows` come longest first."""
    batch: list[Window] = []
    for window in windows:
        grown = [*batch, window]
        longest = grown[0].length
        kept = longest - min(w.first - w.begin for w in grown) + 1
        rows = len(grown)
        if batch and (rows * longest > BATCH_TOKENS or rows * kept * vocab_size > BATCH_LOGITS):
            yield batch
            grown = [window]
        batch = grown
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(
    model: torch.nn.Module, sequences: Sequence[list[int]], batch: Sequence[Window]
) -> list[float]:
    """Return the summed loss of every window."""
    longest = batch[0].length
    kept_from = min(window.first - window.begin for window in batch) - 1
    inputs = np.zeros((len(batch), longest), dtype=np.int64)  # (rows, tokens)
    targets = np.full((len(batch), longest), -100, dtype=np.int64)  # (rows, tokens)
    for row, window in enumerate(batch):
        tokens = sequences[window.request]
        inputs[row, : window.length] = tokens[window.begin : window.end]
        start = window.first - window.begin - 1
        targets[row, start : window.length] = tokens[window.first : window.end + 1]
    device = next(model.parameters()).device
    logits = model(
        input_ids=torch.from_numpy(inputs).to(device),
        use_cache=False,
        logits_to_keep=longest - kept_from,
    ).logits.float()  # (rows, kept, vocab)
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        torch.from_numpy(targets[:, kept_from:]).to(device).flatten(),
        ignore_index=-100,
        reduction="none",
    ).view(len(batch), -1)
    return losses.double().sum(dim=1).tolist()
