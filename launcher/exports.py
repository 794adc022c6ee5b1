"""From a run to an export, and what an export says: the launcher's way to `trainer.export`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError, ShoalError
from shoal.configs.load import build_config, config_hash
from shoal.configs.schema import KernelConfig, ModelConfig, RunConfig
from shoal.launcher.corpus import Corpus, open_corpus
from shoal.launcher.runs import CONFIG_FILE, read_run

if TYPE_CHECKING:
    from shoal.data_pipeline.shards import Rows
    from shoal.trainer.checkpoint import Manifest
    from shoal.trainer.export import ExportReport
    from shoal.trainer.model import Transformer

GATE_ROWS = 2
GATE_TEXT_TOKENS = 256


def export_run(
    run: Path,
    out: Path,
    dtype: str = "fp32",
    *,
    complete: bool = False,
    warn: Callable[[str], None] = print,
) -> ExportReport:
    """Export the newest whole checkpoint of a run as a Hugging Face folder; book the cost.

    Args:
        run: Folder of the run.
        out: Folder to make.
        dtype: fp32 or bf16: precision of the stored weights.
        complete: Whether only the last step of the run will do.
        warn: Told of damaged checkpoints that are passed over.

    Raises:
        ConfigError: `run` is no run, or `out` exists.
        DataError: no checkpoint, none that verifies, or the shards are not those of the run.
        GateError: what was written does not agree with the model.
    """
    from shoal.trainer.identity import check_same_inputs
    from shoal.trainer.ledger import LedgerEntry, append_entry, now

    if out.exists():
        raise ConfigError("exists already", where=out, fix="choose another folder, or remove it")
    started, begun = now(), time.monotonic()
    data = read_run(run).data
    folder, manifest, config = _find_trained(run, complete, warn)
    # What was trained is what the checkpoint says; config.yaml tells where the shards are now.
    corpus = open_corpus(config.model_copy(update={"data": data}))
    check_same_inputs(manifest.position, corpus.identity(), where=folder)
    model = _load_trained(folder, manifest, config.model)
    facts = _describe_run(run, config, manifest, corpus)
    report = _export(model, config.model, corpus, out, facts, dtype)
    entry = LedgerEntry(
        kind="export",
        stage=config.name,
        scope=config.ledger.scope,
        started=started,
        seconds=time.monotonic() - begun,
    )
    append_entry(run / "ledger.jsonl", entry)
    return report


def _find_trained(
    run: Path, complete: bool, warn: Callable[[str], None]
) -> tuple[Path, Manifest, RunConfig]:
    """Return a run's newest whole checkpoint, its manifest and the config it was trained with."""
    from shoal.trainer.checkpoint import newest_checkpoint

    _bring_newest(run / "checkpoints", warn)
    found = newest_checkpoint(run / "checkpoints", warn=warn)
    if found is None:
        raise DataError("has no checkpoint yet", where=run, fix=f"shoal train {run / CONFIG_FILE}")
    folder, manifest = found
    config = build_config(RunConfig, manifest.run, where=folder)
    if complete and manifest.step != config.steps:
        raise DataError(
            f"the newest whole checkpoint is step {manifest.step} of {config.steps}",
            where=run,
            fix=f"train the rest: shoal train {run / CONFIG_FILE}",
        )
    return folder, manifest, config


def _load_trained(folder: Path, manifest: Manifest, shape: ModelConfig) -> Transformer:
    """Return the model of a checkpoint, fp32 on the CPU."""
    from shoal.trainer.checkpoint import TensorReader
    from shoal.trainer.model import Transformer

    reader = TensorReader(folder, manifest)
    model = Transformer(shape, _cpu_kernels())
    model.load_state_dict({name: reader.read(name) for name in manifest.tensors})
    return model


def _bring_newest(root: Path, warn: Callable[[str], None]) -> None:
    """Fetch the newest checkpoint of a run that has stopped, if it is elsewhere.

    Raises:
        DataError: it is on another host, or cannot be had.
    """
    from shoal.trainer.aside import ELSEWHERE
    from shoal.trainer.checkpoint import list_checkpoints
    from shoal.trainer.objects import Objects

    note = root / ELSEWHERE
    newest = note.read_text(encoding="utf-8") if note.is_file() else ""
    place, _, name = newest.rpartition("/")
    if name <= max((folder.name for folder in list_checkpoints(root)), default=""):
        return
    fix = f"copy it to {root}; or remove {note} to take what is there"
    if "://" not in newest:
        raise DataError(f"the newest checkpoint is {newest}", where=root, fix=fix)
    warn(f"fetching {newest}")
    try:
        Objects(place).fetch(name, root)
    except ShoalError:
        raise
    except Exception as error:  # every driver has its own
        cause = f"the newest checkpoint cannot be fetched: {type(error).__name__}: {error}"
        raise DataError(cause, where=newest, fix=fix) from None


def _describe_run(
    run: Path, config: RunConfig, manifest: Manifest, corpus: Corpus
) -> dict[str, Any]:
    """Return what an export says of the run it comes from."""
    from shoal.trainer.checkpoint import checkpoint_name

    step, passed_over = manifest.step, manifest.position.get("passed_over", 0)
    return {
        "name": config.name,
        "run": config.model_dump(mode="json"),
        "step": step,
        "tokens": step * config.step_tokens,
        "validation": _last_validation(run, step),
        "provenance": {
            "config_hash": config_hash(config, without=("output", "world")),
            "shards_hash": corpus.manifest.shards_hash,
            "data": corpus.identity()
            | {"validation": {n: r.manifest.shards_hash for n, r in corpus.validations.items()}},
            "streams_total": corpus.count_rows(config, step + passed_over),
            "checkpoint": checkpoint_name(step),
            "seed": config.seed,
            "command": f"shoal train {run / CONFIG_FILE}",
        },
    }


def export_untrained(shape: ModelConfig, seed: int, corpus: Corpus, out: Path) -> None:
    """Export a freshly initialised model: the untrained reference row of a report."""
    from shoal.trainer.model import Transformer

    model = Transformer(shape, _cpu_kernels())
    model.initialize(seed)
    facts = {"name": "untrained", "run": {}, "step": 0, "tokens": 0, "validation": None}
    _export(model, shape, corpus, out, facts, "fp32")


def generate(
    export: Path, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Let a model on disk continue `prompt`; return prompt and continuation.

    Args:
        export: An export of ours, or any Hugging Face folder.
        prompt: Text; the end of it where it and the new tokens do not fit into the context, but
            never less than half a context of it.
        max_new_tokens: Most tokens added; fewer where the model ends or its context is full.
        temperature: 0 takes the likeliest token each time.
        top_k: Only this many likeliest tokens are drawn from; 0: all.
        seed: Of the drawing.
    """
    import torch

    from shoal.eval.candidate import Candidate

    candidate = Candidate.open(export)
    kept = max(candidate.context - max_new_tokens, candidate.context // 2)
    ids = [candidate.start_id, *candidate.encode([prompt])[0]][-kept:]
    count = min(max_new_tokens, candidate.context - len(ids))
    model = candidate.model("fp32")
    torch.manual_seed(seed)
    drawing = {"temperature": temperature, "top_k": top_k} if temperature else {}
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        longer = model.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=bool(temperature),
            pad_token_id=candidate.start_id,
            **drawing,
        )
    added = longer[0, len(ids) :].tolist()
    return prompt + str(candidate.tokenizer.decode(added, skip_special_tokens=True))


def _export(
    model: Transformer,
    shape: ModelConfig,
    corpus: Corpus,
    out: Path,
    facts: dict[str, Any],
    dtype: str,
) -> ExportReport:
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.trainer.export import TokenizerProof, export_model

    rows = corpus.validation or corpus.train[0][0]
    tokenizer = Tokenizer.load(rows.tokenizer_folder)
    samples = _sample_rows(rows, shape.context)
    inner = [token for token in samples[0] if token != tokenizer.eot_id][:GATE_TEXT_TOKENS]
    # Decoded and encoded again: a row may begin inside a character or a word.
    text = tokenizer.decode(inner).strip("\ufffd")
    proof = TokenizerProof(rows.tokenizer_folder, text, tokenizer.encode_batch([text])[0].tolist())
    return export_model(
        model,
        shape,
        proof,
        out,
        sample_ids=samples,
        facts=facts,
        dtype=dtype,
        eot_id=tokenizer.eot_id,
    )


def _sample_rows(rows: Rows, context: int) -> list[list[int]]:
    """Return token ids of real text, for the gate of an export."""
    import numpy as np

    tokens = rows.gather(np.arange(min(GATE_ROWS, len(rows)))).tokens
    return [row[:context].tolist() for row in tokens]


def _last_validation(run: Path, step: int) -> dict[str, Any] | None:
    from shoal.trainer.metrics import read_metrics

    records = read_metrics(run / "metrics.jsonl")
    found = [r for r in records if r["kind"] == "validation" and r["step"] <= step]
    if not found or not math.isfinite(found[-1]["loss"]):
        return None
    return found[-1]


def _cpu_kernels() -> Any:
    import torch

    from shoal.kernels.backend import resolve

    return resolve(KernelConfig(), torch.device("cpu"), torch.float32)
