"""Tiny models of every export class, with a small trained tokenizer, made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.configs.schema import ModelConfig
from shoal.configs.study import BudgetConfig, TasksConfig
from shoal.eval.compare import compare
from shoal.eval.inputs import ArmInput, ExportInput, References, TrainingTexts

CONTEXT = 64
TEXT = (
    "the cell fires when light falls on it and the rate of firing depends on contrast "
    "neurons in cortex respond to stimuli mice were trained to lick we found that inhibition "
    "increased while excitation decreased in the amygdala of animals with lesions"
)


def sentences(count: int, seed: int = 0, words: int = 12) -> list[str]:
    """Made-up sentences of real words."""
    import random

    chooser = random.Random(seed)
    return [
        " ".join(chooser.choices(TEXT.split(), k=words)).capitalize() + "." for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


CONFIGS = {
    "llama": ModelConfig(
        vocab_size=320, context=CONTEXT, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
        hidden=48,
    ),
    "gpt2": ModelConfig(
        family="gpt2", vocab_size=320, context=CONTEXT, num_layers=2, width=32, num_heads=4
    ),
    "qwen3": ModelConfig(
        vocab_size=320, context=CONTEXT, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
        head_dim=16, hidden=48, qk_norm=True, tie_embeddings=False,
    ),
    "mixtral": ModelConfig(
        vocab_size=320, context=CONTEXT, num_layers=2, width=32, num_heads=4,
        moe={"num_experts": 4, "active_experts": 2, "hidden": 24},
    ),
    "qwen3_moe": ModelConfig(
        vocab_size=320, context=CONTEXT, num_layers=2, width=32, num_heads=4, qk_norm=True,
        moe={"num_experts": 6, "active_experts": 2, "hidden": 16},
    ),
}  # fmt: skip


def hugging_face_config(kind: str, model: ModelConfig) -> Any:
    """The transformers configuration of a shape, written down independently of our export."""
    import transformers as hf

    if kind == "gpt2":
        return hf.GPT2Config(
            vocab_size=model.vocab_size, n_positions=model.context, n_embd=model.width,
            n_layer=model.num_layers, n_head=model.num_heads, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.feed_forward,
        "max_position_embeddings": model.context,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if kind == "mixtral":
        return hf.MixtralConfig(
            **common, num_local_experts=model.moe.num_experts,
            num_experts_per_tok=model.moe.active_experts, sliding_window=None,
        )  # fmt: skip
    if kind == "qwen3_moe":
        return hf.Qwen3MoeConfig(
            **common, num_experts=model.moe.num_experts, norm_topk_prob=True,
            num_experts_per_tok=model.moe.active_experts, decoder_sparse_step=1,
            moe_intermediate_size=model.moe.hidden, mlp_only_layers=[],
        )  # fmt: skip
    return (hf.Qwen3Config if kind == "qwen3" else hf.LlamaConfig)(**common)


@pytest.fixture(scope="session")
def make_export(
    tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_export(kind, seed)` writes a model folder once and returns it."""
    import shutil

    import torch
    import transformers as hf

    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            torch.manual_seed(seed)
            model = hf.AutoModelForCausalLM.from_config(hugging_face_config(kind, CONFIGS[kind]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.5 if "embed" in name or "wte" in name else 0.15)
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}") / "export"
            model.save_pretrained(folder)
            for file in tokenizer_files.iterdir():
                shutil.copy(file, folder)
            made[kind, seed] = folder
        return made[kind, seed]

    return make


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files of every task, one of them compressed."""
    import gzip

    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"id": f"d{i}", "text": " ".join(sentences(2 + 3 * (i % 3), seed=i))} for i in range(12)
    ]
    pairs = [
        {
            "case_id": f"c{i}",
            "original_abstract": " ".join(sentences(3, seed=50 + i)),
            "incorrect_abstract": " ".join(
                [*sentences(3, seed=50 + i)[:2], *sentences(1, seed=150 + i)]
            ),
        }
        for i in range(12)
    ]
    questions = [
        {"id": f"q{i}", "question": text, "choices": ["yes", "no", "in some animals"],
         "answer": (i % 3) if i % 2 else ["yes", "no", "in some animals"][i % 3]}
        for i, text in enumerate(sentences(9, seed=7))
    ]  # fmt: skip
    files = {
        "documents": folder / "documents.jsonl",
        "brainbench": folder / "brainbench.jsonl.gz",
        "questions": folder / "questions.jsonl",
    }
    for name, records in zip(files, (documents, pairs, questions), strict=True):
        text = "".join(json.dumps(record) + "\n" for record in records)
        if files[name].suffix == ".gz":
            files[name].write_bytes(gzip.compress(text.encode()))
        else:
            files[name].write_text(text, encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def shapes() -> dict[str, ModelConfig]:
    """The shapes of `make_export`, by kind."""
    return CONFIGS


def ledger_entry(kind, stage, seconds, *, scope="specialization", devices=2, flops=0.0, tokens=0):
    return {
        "kind": kind, "stage": stage, "scope": scope, "started": "2026-01-01T00:00:00+00:00",
        "seconds": seconds, "devices": devices, "device_seconds": seconds * devices,
        "device": "cpu", "tokens": tokens, "flops": flops, "note": "",
    }  # fmt: skip


SHARED = [ledger_entry("prepare", "corpus", 10.0, scope="generic", devices=1)]
TEACHER = ledger_entry("train", "teacher", 100.0, scope="generic", flops=5e9, tokens=5000)


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
    runs = [ledger_entry("train", f"{name}-{s}", 50.0, flops=2e9, tokens=3000) for s in (0, 1)]
    trials = [ledger_entry("tune", f"{name}-lr{i}", 5.0, flops=1e8, tokens=100) for i in range(3)]
    exports = [ledger_entry("export", f"{name}-{s}", 1.0, devices=1) for s in (0, 1)]
    return [*SHARED, *extra, *runs, *trials, *exports]


@pytest.fixture(scope="session")
def inputs(make_export, task_files, shapes):
    def arm(kind, extra=(), match="flops"):
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


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def report(inputs, cache):
    return compare(**inputs, cache=cache, name="small")
