"""The model card: README.md of an export, filled from the run and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.configs.schema import ModelConfig
from shoal.trainer.cost import count_parameters, flops_per_token, kv_bytes_per_token

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [shoal]
---

# {name}

A {kind} language model ({export_class}) pretrained with Shoal. It loads with plain `transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

## Shape

| | |
|---|---|
{shape}

## Training

| | |
|---|---|
{training}

## Proof

Before this folder existed, its weights were loaded by `transformers` and compared with those of the
model that was trained{rounding}, on real text and computed in fp32: the largest difference between
logits was {max_logit_difference:.1e} over {compared_tokens} tokens; greedy generation through the
key-value cache and a tokenizer round trip agreed too. Weights are stored in {dtype}.

## Limits

A base model: it continues text as its corpus would, is not tuned to follow instructions, may state
falsehoods and repeat what its corpus contains. It reads at most {context} tokens. What it is fit
for has to be measured on the task at hand.
"""


def render_card(config: ModelConfig, report: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the text of the card.

    Args:
        config: The shape.
        report: What the gate found, as `ExportReport`'s fields.
        facts: name, run (its config as a tree), step, tokens, validation (a metrics record).
    """
    moe = config.moe
    kind = f"mixture-of-experts ({moe.num_experts} experts, {moe.active_experts} active)" if moe \
        else "dense"  # fmt: skip
    return TEMPLATE.format(
        kind=kind,
        name=facts["name"],
        context=config.context,
        shape=_table(_shape(config)),
        training=_table(_training(facts)),
        rounding="" if report["dtype"] == "fp32" else f", rounded to {report['dtype']}",
        **report,
    )


def _shape(config: ModelConfig) -> dict[str, str]:
    counts = count_parameters(config)
    heads = f"{config.num_heads} ({config.kv_heads} for keys and values), {config.head_size} wide"
    return {
        "parameters": f"{counts.total:,} ({counts.active:,} active per token)",
        "layers": str(config.num_layers),
        "width": str(config.width),
        "heads": heads,
        "feed-forward width": f"{config.feed_forward}" + (" per expert" if config.moe else ""),
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.context:,} tokens",
        "FLOPs per token": f"{flops_per_token(config, config.context).total:,} at full context",
        "cache": f"{kv_bytes_per_token(config, 'bf16'):,} bytes per token in bf16",
    }


def _training(facts: Mapping[str, Any]) -> dict[str, str]:
    run = facts.get("run") or {}
    rows = {"steps": f"{facts['step']:,}", "tokens": f"{facts['tokens']:,}"}
    if facts.get("validation"):
        found = facts["validation"]
        rows["validation loss"] = f"{found['loss']:.4f} nats per token"
        rows["validation bits per byte"] = f"{found['bits_per_byte']:.4f}"
    if run.get("teacher"):
        teacher = run["teacher"]
        rows["distilled"] = f"weight {teacher['weight']}, temperature {teacher['temperature']}"
    for label, key in (("optimiser", "optim"), ("training", "train")):
        if key in run:
            rows[label] = ", ".join(f"{k} {v}" for k, v in run[key].items())
    if "seed" in run:
        rows["seed"] = str(run["seed"])
    for label, value in (facts.get("provenance") or {}).items():
        rows[label.replace("_", " ")] = f"`{value}`"
    return rows


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {label} | {value} |" for label, value in rows.items())
