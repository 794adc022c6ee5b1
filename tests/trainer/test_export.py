"""Exports: every family through the gate, plain `transformers` on the other side, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.schema import ModelConfig
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.kernels.backend import Kernels
from shoal.trainer import export
from shoal.trainer.export import (
    GateError,
    TokenizerProof,
    export_model,
    load_model,
    open_pretrained,
    verify_export,
)
from shoal.trainer.model import Transformer

CONTEXT = 32
TEXT = "The synapse's 3 vesicles didn't fuse; α-motor neurons — naïve — waited.\n\n  So did we."
KERNELS = Kernels(attention="sdpa", experts="loop", loss_chunk_tokens=64)
SMALL: dict[str, Any] = {"context": CONTEXT, "num_layers": 2, "width": 32, "num_heads": 4}
SHAPES = {
    "gpt2": ModelConfig(family="gpt2", tie_embeddings=True, **SMALL),
    "gpt2-untied": ModelConfig(family="gpt2", tie_embeddings=False, hidden=40, **SMALL),
    "llama": ModelConfig(num_kv_heads=2, hidden=48, **SMALL),
    "llama-wide-heads": ModelConfig(head_dim=16, tie_embeddings=False, rope_theta=5e5, **SMALL),
    "qwen3": ModelConfig(qk_norm=True, num_kv_heads=1, **SMALL),
    "mixtral": ModelConfig(moe={"num_experts": 4, "active_experts": 2, "hidden": 24}, **SMALL),
    "qwen3-moe": ModelConfig(
        qk_norm=True, moe={"num_experts": 6, "active_experts": 2, "hidden": 16}, **SMALL
    ),
    "qwen3-moe-plain-gates": ModelConfig(
        qk_norm=True,
        moe={"num_experts": 4, "active_experts": 1, "hidden": 16, "normalize_gates": False},
        **SMALL,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([TEXT * 3], 300).save(folder)
    return folder


def build(kind: str, tokenizer: Path) -> Transformer:
    """A model whose weights are all different and far from their start: nothing hides."""
    size = -(-Tokenizer.load(tokenizer).vocab_size // 64) * 64
    config = SHAPES[kind].model_copy(update={"vocab_size": size})
    model = Transformer(config, KERNELS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def write(model: Transformer, tokenizer: Path, out: Path, dtype: str = "fp32") -> Any:
    loaded = Tokenizer.load(tokenizer)
    ids = loaded.encode_batch([TEXT])[0].tolist()
    row = ([loaded.eot_id, *ids] * 3)[:CONTEXT]
    return export_model(
        model,
        model.config,
        TokenizerProof(tokenizer, TEXT, ids),
        out,
        sample_ids=[row, row[::-1]],
        facts={"name": "test", "run": {}, "step": 3, "tokens": 99, "validation": None},
        dtype=dtype,
        eot_id=loaded.eot_id,
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_every_family_passes_the_gate_and_reads_back(
    kind: str, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build(kind, tokenizer)
    report = write(model, tokenizer, tmp_path / "out")
    assert report.max_logit_difference < 1e-4
    assert report.generated_tokens > 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == model.config.export_class == report.export_class
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")
    ids = words["input_ids"][:, :CONTEXT]
    with torch.no_grad():
        # Random weights with gains of one: logits of about 1, so this is a relative error too.
        torch.testing.assert_close(theirs(ids).logits, model.logits(ids), atol=1e-5, rtol=1e-5)
    again, config = load_model(tmp_path / "out", KERNELS)
    free = {"vocab_multiple", "hidden", "num_kv_heads", "head_dim", "moe", "dropout"}
    assert config.model_dump(exclude=free) == model.config.model_dump(exclude=free)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_bf16_export_is_the_model_with_rounded_weights(tokenizer: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    report = write(build("llama", tokenizer), tokenizer, tmp_path / "out", dtype="bf16")
    assert report.max_logit_difference < 1e-4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_a_permuted_weight_fails_the_gate_and_leaves_nothing(
    kind: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.export_tensors

    def wrong(config: ModelConfig, state: Any) -> Any:
        tensors = right(config, state)
        name = "model.layers.1.self_attn.q_proj.weight"
        return tensors | {name: tensors[name].flip(0).contiguous()}

    monkeypatch.setattr(export, "export_tensors", wrong)
    with pytest.raises(GateError, match="logits of what was written differ") as caught:
        write(build(kind, tokenizer), tokenizer, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out") and caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_fails_the_gate(tokenizer: Path, tmp_path: Path) -> None:
    model = build("llama", tokenizer)
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    with pytest.raises(GateError, match="differ from the model's by nan"):
        write(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_fails_the_gate(tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Tokenizer.train(["zebra crossing " * 9], 270).save(other)
    loaded = Tokenizer.load(tokenizer)
    proof = TokenizerProof(other, TEXT, loaded.encode_batch([TEXT])[0].tolist())
    model = build("llama", tokenizer)
    with pytest.raises(GateError, match=f"does not reproduce the ids of {other}") as caught:
        export_model(
            model, model.config, proof, tmp_path / "out", sample_ids=[list(range(8))],
            facts={"name": "x", "run": {}, "step": 0, "tokens": 0}, dtype="fp32", eot_id=0,
        )  # fmt: skip
    assert caught.value.where == str(tmp_path / "out") and caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_existing_target_is_refused_untouched(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        write(build("llama", tokenizer), tokenizer, tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


def test_generation_that_leaves_the_model_fails_the_gate(tmp_path: Path) -> None:
    class Stubborn:
        def generate(self, prompt: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat([prompt, torch.full((1, 1), 7)], dim=1)

    def ours(ids: torch.Tensor) -> torch.Tensor:  # token 3 is the best everywhere
        return torch.nn.functional.one_hot(torch.full_like(ids, 3), 9).float()

    row, out = torch.zeros(1, 4, dtype=torch.long), tmp_path / "out"
    with pytest.raises(GateError, match="leaves the model's own at token 2") as caught:
        export._check_generation(Stubborn(), ours, row, out)  # type: ignore[arg-type]
    assert caught.value.where == str(out) and caught.value.fix


def test_a_rename_that_fails_is_not_taken_for_a_rival(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    with pytest.raises(FileNotFoundError):
        export._publish(tmp_path / "aside", tmp_path / "gone" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(ConfigError, match="appeared while"):
        export._publish(tmp_path / "aside", tmp_path / "out")


def test_the_card_tells_what_was_trained(tokenizer: Path, tmp_path: Path) -> None:
    write(build("qwen3-moe", tokenizer), tokenizer, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "6 experts, 2 active" in card
    assert "Qwen3MoeForCausalLM" in card
    assert "| tokens | 99 |" in card
    facts = json.loads((tmp_path / "out/shoal.json").read_text())
    assert facts["step"] == 3
    assert facts["export"]["max_logit_difference"] < 1e-4


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_export as t
from shoal.trainer import export
def hang(*_):
    print("writing", flush=True)
    time.sleep(60)
export._pass_gate = hang  # everything is written, nothing is proven
t.write(t.build("llama", Path(sys.argv[3])), Path(sys.argv[3]), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_kill_while_exporting_leaves_nothing_that_looks_complete(
    tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent), str(tokenizer)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert not out.exists()
    write(build("llama", tokenizer), tokenizer, out)
    assert (out / "shoal.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# Reading models of others.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is none of"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type 'linear' is not supported"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown model.layers.1"),
        ({"intermediate_size": 56}, "do not make up"),
        ({"num_key_value_heads": 3}, "no model of ours: num_heads 4 is not a multiple"),
        ({"head_dim": 7}, "does not load.*\n.*even rotary dimension"),
    ],
)  # fmt: skip
def test_what_ours_cannot_compute_is_refused(
    change: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    write(build("llama", tokenizer), tokenizer, tmp_path / "out")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (tmp_path / "out/shoal.json").unlink()  # as if another had made it
    with pytest.raises(DataError, match=message) as caught:
        load_model(tmp_path / "out", KERNELS)
    assert str(tmp_path / "out") in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_altered_export_is_refused_by_every_way_in(
    name: str, tokenizer: Path, tmp_path: Path
) -> None:
    write(build("llama", tokenizer), tokenizer, tmp_path / "out")
    verify_export(tmp_path / "out")
    file = tmp_path / "out" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # inside the weights it would load without a word
    file.write_bytes(data)
    for enter in (
        lambda: verify_export(tmp_path / "out"),
        lambda: load_model(tmp_path / "out", KERNELS),
        lambda: open_pretrained(tmp_path / "out", torch.float32),
    ):
        with pytest.raises(DataError, match="not what was exported") as caught:
            enter()
        assert caught.value.where == str(file)


def test_pickled_or_broken_weights_are_never_read(tokenizer: Path, tmp_path: Path) -> None:
    write(build("llama", tokenizer), tokenizer, tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    (tmp_path / "out/shoal.json").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_model(tmp_path / "out", KERNELS)
    weights.rename(tmp_path / "out/pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        load_model(tmp_path / "out", KERNELS)
