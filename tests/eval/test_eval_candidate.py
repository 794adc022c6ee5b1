"""Candidates: what is refused, and what is measured on a built model."""

import json
import pickle
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.configs.errors import ConfigError, DataError
from shoal.eval.candidate import Candidate
from shoal.eval.latency import Latency, Timing, measure_latencies
from shoal.trainer.cost import count_parameters, flops_per_token, kv_bytes_per_token, resident_bytes

KINDS = ("llama", "gpt2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture
def copy(make_export, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(make_export("llama"), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [16, 64])
def test_measured_costs_agree_with_formula(make_export, shapes, kind, context):
    facts = Candidate.open(make_export(kind)).shape_facts(context)
    model = shapes[kind]
    parameters = count_parameters(model)
    assert facts.total == parameters.total
    assert facts.active == parameters.active
    assert facts.embedding == parameters.embedding
    # Routing can leave a padding-free pass at exactly top-k experts a token, so the match is exact.
    assert facts.flops_per_token == pytest.approx(flops_per_token(model, context).total, rel=1e-6)
    for precision in ("fp32", "bf16", "int8", "int4"):
        assert facts.resident_bytes(precision) == resident_bytes(model, precision)
        assert facts.kv_bytes_per_token(precision) == kv_bytes_per_token(model, precision)


def test_counter_counts_experts_that_run(make_export):
    """Sent to all experts instead of two, a token costs as much more as the experts do."""
    folder = make_export("mixtral")
    few = Candidate.open(folder)
    many = Candidate.open(folder)
    many.rounded_model("fp32").model.layers[0].mlp.gate.top_k = 4
    expert = 2 * 3 * 32 * 24
    assert many.shape_facts(16).flops_per_token - few.shape_facts(16).flops_per_token == 2 * expert


def test_kind_is_read_from_config(make_export):
    assert Candidate.open(make_export("mixtral")).kind == "moe"
    assert Candidate.open(make_export("llama")).kind == "dense"


def test_hash_follows_weights(copy, make_export):
    original = Candidate.open(make_export("llama")).hash
    assert Candidate.open(copy).hash == original
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert Candidate.open(copy).hash != original


def test_nothing_is_asked_of_a_network(make_export, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    candidate = Candidate.open(make_export("gpt2"))
    assert candidate.encode(["text"])
    assert candidate.rounded_model("fp32") is candidate.rounded_model("fp32")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        Candidate.open(tmp_path / "nowhere")


def test_config_that_is_no_model_is_refused(copy):
    (copy / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(DataError, match="no model_type"):
        Candidate.open(copy)
    (copy / "config.json").write_text("{broken")
    with pytest.raises(DataError, match="not readable as JSON"):
        Candidate.open(copy)


def test_pickled_weights_are_refused_unread(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    mark = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (mark.touch, ())

    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="pickled"):
        Candidate.open(copy)
    assert not mark.exists()


def test_custom_code_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="code of its own"):
        Candidate.open(copy)


def test_missing_tensor_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"up_proj"):
        Candidate.open(copy).rounded_model("fp32")


def test_corrupt_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="does not load"):
        Candidate.open(copy).rounded_model("fp32")


def test_foreign_tokenizer_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="tokenizer has 320 entries"):
        Candidate.open(copy).encode(["a"])


def test_context_beyond_the_model_is_refused(make_export):
    candidate = Candidate.open(make_export("llama"), "a")
    candidate.check_context(64)
    with pytest.raises(ConfigError, match="longer than the model's 64") as caught:
        candidate.shape_facts(65)
    assert caught.value.where == "a"
    with pytest.raises(ConfigError, match="longer than the model's 64"):
        measure_latencies({"a": candidate}, precision="fp32", context=65, batch=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latency_takes_turns_and_counts(make_export, precision):
    members = {kind: Candidate.open(make_export(kind)) for kind in ("llama", "mixtral")}
    found = measure_latencies(members, precision=precision, context=32, batch=2)
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, latency in found.items():
        assert members[name].model(precision).dtype == expected
        assert latency.prefill_ms.repeats == latency.decode_ms.repeats == 20
        for timing in (latency.prefill_ms, latency.decode_ms):
            assert 0 < timing.low <= timing.median <= timing.high
        assert latency.decode_tokens_per_second == pytest.approx(2000 / latency.decode_ms.median)
        assert latency.from_tree(latency.as_tree()) == latency


@pytest.mark.parametrize("part", ["prefill_ms", "decode_ms"])
def test_latency_is_unstable_where_either_timing_is(part):
    """Quartiles a quarter of the median apart are steady, more are not."""
    steady, shaky = Timing(10.0, 8.5, 11.0, 20), Timing(10.0, 8.4, 11.0, 20)
    timings = {"prefill_ms": steady, "decode_ms": steady}
    assert not Latency(**timings, prefill_tokens=8, batch=1).unstable
    latency = Latency(**timings | {part: shaky}, prefill_tokens=8, batch=1)
    assert latency.unstable
    assert shaky.as_tree()["unstable"] and not steady.as_tree()["unstable"]
