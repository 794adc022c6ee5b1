"""Configs: what is shipped loads, what is wrong is refused with the key and the nearest name."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.configs.clusters import ClusterConfig
from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import (
    ConfigError,
    DataError,
    PreflightError,
    RetriesExhausted,
    ShoalError,
    StoppedOnRequest,
    explain_machine_error,
)
from shoal.configs.load import (
    SHIPPED,
    build_config,
    config_hash,
    dump_config,
    find_config,
    load_config,
    merge,
    read_tree,
)
from shoal.configs.schema import ModelConfig, MoEConfig, RunConfig
from shoal.configs.study import BudgetConfig, StudyConfig, TasksConfig

YAML_FILES = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
MINIMAL = {"data": {"train": [{"path": "shards"}]}, "train": {"tokens": 1000}}


def write(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


def build(**sections: object) -> RunConfig:
    return build_config(RunConfig, merge(MINIMAL, sections), where="test")


def kind_of(name: str) -> type:
    if name.startswith("models/"):
        return ModelConfig
    if name.startswith("studies/"):
        return StudyConfig
    if name.startswith("tasks"):
        return TasksConfig
    if name.startswith("clusters"):
        return ClusterConfig
    return PrepareConfig if name.startswith("corpus") else RunConfig


@pytest.mark.parametrize("name", YAML_FILES)
def test_shipped_config_loads_and_dumps_back(name: str, tmp_path: Path) -> None:
    tree = read_tree(SHIPPED / name)
    kind = kind_of(name)
    if kind is ModelConfig:
        assert set(tree) == {"model"}
        tree = tree["model"]
    config = build_config(kind, tree, where=name)
    again = load_config(kind, write(tmp_path, dump_config(config)))
    assert again == config


@pytest.mark.parametrize("name", [n for n in YAML_FILES if kind_of(n) is RunConfig])
def test_what_a_shipped_run_refers_to_is_shipped(name: str) -> None:
    config = load_config(RunConfig, name)
    assert config.prepare is not None
    corpus = load_config(PrepareConfig, config.prepare)
    assert [s.path for s in config.data.train] == [f"{corpus.output}/train"]
    assert config.data.validation == f"{corpus.output}/validation"
    assert config.model.context <= corpus.context


@pytest.mark.parametrize(
    ("name", "millions", "vocab"),
    [
        ("models/gpt2_124m.yaml", 124, 50257),
        ("models/llama_124m.yaml", 124, 50304),
        ("models/llama_350m.yaml", 350, 50304),
        ("models/moe_8x2_124m.yaml", 294, 50304),
        ("models/moe_64x8_124m.yaml", 521, 50304),
    ],
)
def test_models_have_the_size_they_say(name: str, millions: int, vocab: int) -> None:
    from shoal.trainer.cost import count_parameters

    tree = read_tree(SHIPPED / name)["model"]
    counts = count_parameters(build_config(ModelConfig, tree | {"vocab_size": vocab}, where=name))
    assert counts.total == pytest.approx(millions * 1e6, rel=0.01)
    assert counts.active == pytest.approx(124e6, rel=0.02) or millions == 350


def test_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {train: [{path: a}]}\ntrain: {tokens: 5}\noptim: {leanr: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, file, ["optim.schedul=wsd"])
    assert "optim.schedul: unknown key; did you mean schedule?" in str(caught.value)
    assert "optim.leanr: unknown key" in str(caught.value)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.tokens=-3"], "train.tokens: Input should be greater than or equal to 1"),
        (["train.tokens=many"], "train.tokens"),
        (["name=../up"], "name"),
        (["model.dropout=1.5"], "model.dropout"),
        (["model.dropout=1"], "model.dropout: Input should be less than 1"),
        (["optim.betas=[1.0,0.95]"], "optim.betas.0: Input should be less than 1"),
        (["optim.betas=[0.9,1]"], "optim.betas.1: Input should be less than 1"),
        (["optim.betas=[0.9,.nan]"], "optim.betas.1"),
        (["optim.lr=.inf"], "optim.lr: Input should be a finite number"),
        (["optim.lr=1e999"], "optim.lr: Input should be a finite number"),
        (["optim.clip_norm=.inf"], "optim.clip_norm: Input should be a finite number"),
        (["train.zero_stage=0", "train.precision=bf16"], "phantom optimiser step"),
        (["model.family=gpt2", "model.qk_norm=true"], "gpt2 cannot hold qk_norm"),
        (["model.num_heads=7"], "not a multiple"),
        (["data.train.3.path=x"], "no item of a list"),
        (["tokens"], "not key=value"),
        (["optim.lr=[1"], "value not readable"),
        (["model={{x}}"], "value not readable"),
    ],
)
def test_bad_values_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message.replace(".", r"\.")):
        load_config(RunConfig, "default.yaml", overrides)


def test_overrides_reach_every_depth() -> None:
    config = load_config(
        RunConfig,
        "default.yaml",
        ["optim.lr=2e-4", "data.train.0.weight=2", "model.moe.num_experts=4", "prepare=null"],
    )
    assert config.optim.lr == 2e-4
    assert config.data.train[0].weight == 2.0
    assert config.model.moe == MoEConfig(num_experts=4)
    assert config.prepare is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `key: value`"),
        ("- a\n- b\n", "expected `key: value`"),
        ("a: [1,\n", "not readable as YAML"),
        ("name: a\nname: b\n", "given twice"),
        ("train:\n  tokens: {{ tokens }}\n", "cannot be a mapping or a list"),
        ("? [a, b]\n: c\n", "cannot be a mapping or a list"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_broken_yaml_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(RunConfig, file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("context", [0, 3])
def test_a_context_too_short_to_time_is_refused(context: int) -> None:
    budget = {"axis": "latency_ms", "target": 5, "context": context}
    with pytest.raises(ConfigError, match="context: Input should be greater than or equal to 4"):
        build_config(BudgetConfig, budget, where="test")


def test_yaml_merges_may_be_overridden(tmp_path: Path) -> None:
    text = "optim: &a {lr: 1e-3, eps: 1e-6}\nteacher: {<<: *a, lr: 2e-3}\n"
    assert read_tree(write(tmp_path, text))["teacher"] == {"lr": 2e-3, "eps": 1e-6}


def test_the_corpus_of_a_run_is_looked_for_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is shipped too must not lead to the sample corpus."""
    named = "prepare: corpus_samples.yaml\n"
    for folder in ("base", "child"):
        (tmp_path / folder).mkdir()
    base = write(tmp_path, "extends: default.yaml\n" + named, "base/run.yaml")
    child = write(tmp_path, "extends: ../base/run.yaml\n", "child/run.yaml")

    def found(file: Path, *overrides: str) -> str | None:
        return load_config(RunConfig, file, overrides).prepare

    assert found(child) == found(base) == "corpus_samples.yaml", "nothing is beside them"
    write(tmp_path, "name: theirs\n", "child/corpus_samples.yaml")
    assert found(child) == "corpus_samples.yaml", "the child does not name it"
    mine = write(tmp_path, "name: mine\n", "base/corpus_samples.yaml")
    assert found(base) == str(mine)
    assert Path(found(child) or "").samefile(mine), "beside the file that names it"
    assert found(base, "prepare=corpus_samples.yaml") == "corpus_samples.yaml", "from where I am"
    study = write(tmp_path, "extends: studies/demo.yaml\n" + named, "base/study.yaml")
    assert load_config(StudyConfig, study).prepare == str(mine)
    write(tmp_path, "extends: default.yaml\n", "base/plain.yaml")
    assert found(tmp_path / "base/plain.yaml") == "corpus_samples.yaml", (
        "shipped files mean shipped"
    )


@pytest.mark.parametrize(("given", "size"), [(None, 1024), (1000, 1000), (1100, 1100)])
def test_the_vocabulary_is_the_one_given_or_the_next_multiple(given: int | None, size: int) -> None:
    model = ModelConfig(vocab_size=given, vocab_multiple=128)
    assert model.with_vocab(1000).vocab_size == size
    if given:
        with pytest.raises(ConfigError, match=f"vocab_size {given} is smaller"):
            model.with_vocab(given + 1)


def test_a_full_disk_is_no_bug() -> None:
    plain = OSError(errno.ENOSPC, "No space left on device", "runs/x/file")
    found = explain_machine_error(plain)
    assert found is not None
    assert (found.exit_code, found.where) == (4, "runs/x/file")
    assert "free some space" in (found.fix or "")
    other = RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors' words
    assert isinstance(explain_machine_error(other), PreflightError)
    assert explain_machine_error(FileNotFoundError(errno.ENOENT, "x", "y")) is None
    assert "No space" in (explain_machine_error(other) or other).cause
    assert explain_machine_error(ValueError("errors 28")) is None
    assert explain_machine_error(DataError("x (os error 13)", where="/a")) is None


def test_wrong_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(RunConfig, file)


def test_extends_merges_and_replaces(tmp_path: Path) -> None:
    write(tmp_path, "data: {train: [{path: a}]}\ntrain: {tokens: 5, batch_rows: 2}\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ntrain: {tokens: 7}\ndata: {train: [{path: b}]}\n")
    config = load_config(RunConfig, child)
    assert (config.train.tokens, config.train.batch_rows) == (7, 2)
    assert [s.path for s in config.data.train] == ["b"]


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(RunConfig, tmp_path / "a.yaml")


def test_missing_config_names_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean pretrain_dense\.yaml"):
        find_config("pretrain_dence.yaml")


def test_steps_cover_the_tokens() -> None:
    config = build(model={"context": 10}, train={"tokens": 101, "batch_rows": 2})
    assert (config.step_tokens, config.steps) == (20, 6)


def test_hash_follows_what_counts() -> None:
    one, other = build(name="a"), build(name="b")
    assert config_hash(one) != config_hash(other)
    assert config_hash(one, without=["name"]) == config_hash(other, without=["name"])
    assert config_hash(one) == config_hash(build(name="a"))


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ShoalError, 1),
        (ConfigError, 2),
        (DataError, 3),
        (PreflightError, 4),
        (StoppedOnRequest, 5),
        (RetriesExhausted, 6),
    ],
)
def test_errors_keep_their_fields_across_processes(kind: type[ShoalError], code: int) -> None:
    error = pickle.loads(pickle.dumps(kind("broken", where="file:3", fix="mend it")))
    assert type(error) is kind
    assert (error.cause, error.where, error.fix, error.exit_code) == (
        "broken",
        "file:3",
        "mend it",
        code,
    )
    assert str(error) == "file:3: broken\n  fix: mend it"


def test_configs_import_without_torch_and_numpy() -> None:
    code = (
        "import sys, shoal.configs.load, shoal.configs.study, shoal.configs.corpus;"
        "print(sorted({'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("change", [{"width": 68}, {"moe": {"num_experts": 4, "hidden": 20}}])
def test_experts_that_grouped_mm_cannot_multiply_are_refused(change: dict) -> None:
    shape = {"width": 64, "num_heads": 2, "moe": {"num_experts": 4, "hidden": 24}}
    ModelConfig.model_validate(shape)
    with pytest.raises(ValueError, match="must be multiples of 8"):
        ModelConfig.model_validate(shape | change)
