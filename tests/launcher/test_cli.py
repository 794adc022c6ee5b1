"""The shoal command: every verb explains itself, every failure is one screen and a code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.launcher import cli, data_cli
from shoal.launcher.budgets import parse_budgets, parse_quantity
from shoal.launcher.screen import guard, newest_checkpoint_note

REGISTERED = [*cli.app.registered_commands, *data_cli.data_app.registered_commands]
COMMANDS = [command.callback.__name__ for command in REGISTERED]  # type: ignore[union-attr]


def shoal(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shoal(command, "--help", capsys=capsys)
    assert code == 0
    assert f"shoal {command}" in out.split("Usage:", 1)[1].split("\n", 1)[1]


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_help_offers_only_precisions_that_can_be_scored(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = shoal(command, "--help", capsys=capsys)
    assert "fp32" in out
    assert "int8" not in out
    assert "int4" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command"),
        (["plan"], "Missing"),
        (["plan", "nope.yaml"], "no such config file"),
        (["plan", "default.yaml", "optim.leanr=1"], "unknown key"),
        (["train", "a.yaml", "b.yaml"], "one config at a time"),
        (["export", "runs/absent", "out"], "not a run"),
        (["runs", "absent"], "absent"),
        (["export", "runs/x", "out", "--dtype", "fp8"], "'fp8' is not one of 'fp32', 'bf16'"),
        (["plan", "default.yaml", "--precision", "fp4"], "'fp4' is not one of"),
        (["evaluate", "x", "--tasks", "y", "--precision", "int8"], "one of 'fp32', 'bf16'"),
        (["generate", "x", "--seed", "minus"], "--seed"),
        (["train", "--hostfile", "/nonexistent/hosts"], "no such hostfile"),
    ],
)
def test_usage_errors_exit_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = shoal(*words, capsys=capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_inspect_names_what_it_cannot_recognise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = shoal("inspect", str(tmp_path), capsys=capsys)
    assert code == 3
    assert "is no run, checkpoint, shards, report or model" in err
    code, _, err = shoal("inspect", str(tmp_path / "absent"), capsys=capsys)
    assert code == 3
    assert "does not exist" in err


def test_inspect_describes_a_foreign_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1234)
    code, out, _ = shoal("inspect", str(tmp_path), capsys=capsys)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "1,234" in out


@pytest.mark.parametrize("command", ["inspect", "report"])
@pytest.mark.parametrize("text", ["{}", '{"arms": 3}', "[]", "{"])
def test_a_foreign_report_is_refused(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(text)
    code, _, err = shoal(command, str(tmp_path), capsys=capsys)
    assert code == 3
    assert err.startswith(f"error: {tmp_path / 'report.json'}: ")
    assert "Traceback" not in err


def test_runs_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shoal("runs", str(tmp_path), capsys=capsys)
    assert code == 0
    assert "checkpoint" in out


def test_train_dry_run_is_that_of_the_documented_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from shoal.launcher.run import main

    code, ours, _ = shoal("train", "--dry-run", "name=same", capsys=capsys)
    assert code == 0
    assert main(["--dry-run", "name=same"]) == 0
    assert capsys.readouterr().out == ours


def test_plan_shows_what_the_model_costs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain_dense.yaml", "model.vocab_size=50304", "--context", "512"]
    code, out, _ = shoal("plan", *words, capsys=capsys)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "123,587,328" in out  # 38.6 M embedding, 85 M in 12 layers
    assert "at context 512" in out


def test_plan_counts_the_teacher_or_says_that_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shoal.configs.schema import ModelConfig
    from shoal.trainer.cost import flops_per_token
    from shoal.trainer.formats import export_config

    def training_flops(*words: str) -> tuple[str, int]:
        code, out, _ = shoal("plan", "default.yaml", *small, *words, capsys=capsys)
        assert code == 0
        row = next(line for line in out.splitlines() if "training FLOPs per token" in line)
        name, value = (cell.strip() for cell in row.strip("│").split("│"))
        return name, int(value.replace(",", ""))

    small = ["model.vocab_size=512", "model.context=256"]
    _, alone = training_flops()
    folder = tmp_path / "teacher"
    name, value = training_flops(f"teacher.path={folder}")
    assert (name, value) == ("training FLOPs per token, without the teacher", alone)
    shape = ModelConfig(vocab_size=512, context=256, num_layers=2, width=64, num_heads=4)
    folder.mkdir()
    tree = export_config(shape, eot_id=0, dtype="fp32")
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    name, value = training_flops(f"teacher.path={folder}")
    assert name == "training FLOPs per token"
    assert value == alone + flops_per_token(shape, 256).total


class Echo:
    """A model with a context of 16 that remembers what it was given."""

    context, start_id, device = 16, 0, "cpu"
    tokenizer = SimpleNamespace(decode=lambda ids, **_: f"+{len(ids)}")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(range(1, len(texts[0]) + 1))]

    def model(self, _: str) -> Echo:
        return self

    def generate(self, tokens: Any, max_new_tokens: int, **_: Any) -> Any:
        self.given = tokens[0].tolist()
        return tokens.new_zeros(1, tokens.shape[1] + max_new_tokens)


@pytest.mark.parametrize(
    ("letters", "asked", "given", "added"),
    [
        (5, 100, 6, 10),  # all of a prompt that fits, and what is then left of the context
        (5, 4, 6, 4),
        (30, 4, 12, 4),  # the end of a long one, with room for what is asked for
        (30, 100, 8, 8),  # but half a context of it
    ],
)
def test_generate_keeps_of_the_prompt_what_fits(
    letters: int, asked: int, given: int, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.eval.candidate import Candidate
    from shoal.launcher.exports import generate

    echo = Echo()
    monkeypatch.setattr(Candidate, "open", lambda _: echo)
    prompt = "x" * letters
    assert generate(Path("export"), prompt, asked, 0, 0, 0) == f"{prompt}+{added}"
    assert echo.given == list(range(letters + 1))[-given:]


def test_plan_takes_the_vocabulary_from_the_corpus_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no shards here
    code, out, _ = shoal("plan", "default.yaml", capsys=capsys)
    assert code == 0
    assert "4,096" in out
    code, _, err = shoal("plan", "default.yaml", "prepare=null", capsys=capsys)
    assert code == 2
    assert "vocabulary size is not known" in err


# Screens and codes.


def test_guard_turns_endings_into_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert guard(lambda: None) == 0
    assert guard(lambda: fail(DataError("broken", where="a[0].mds", fix="mend [it]"))) == 3
    err = capsys.readouterr().err
    assert err.splitlines() == ["error: a[0].mds: broken", "  fix: mend [it]"]
    assert guard(lambda: fail(KeyboardInterrupt())) == 130
    capsys.readouterr()
    assert guard(lambda: fail(ZeroDivisionError("x"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: ZeroDivisionError: x" in err.splitlines()[-2]


def test_notes_are_part_of_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        error = ConfigError("wrong")
        error.add_note("failed first: rank 1 on host")
        raise error

    assert guard(fail) == 2
    assert "  failed first: rank 1 on host" in capsys.readouterr().err


def test_newest_checkpoint_is_named(tmp_path: Path) -> None:
    assert "none yet" in newest_checkpoint_note(tmp_path)
    for name in ("step-00000050", "step-00000100", ".partial-step-00000150"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert "step-00000100 " in newest_checkpoint_note(tmp_path)
    (tmp_path / "checkpoints/.elsewhere").write_text("s3://bucket/run/step-00000090")
    assert "step-00000100 " in newest_checkpoint_note(tmp_path)
    (tmp_path / "checkpoints/.elsewhere").write_text("s3://bucket/run/step-00000200")
    assert "s3://bucket/run/step-00000200 " in newest_checkpoint_note(tmp_path)


def test_a_closed_pipe_is_no_bug() -> None:
    command = f"{Path(sys.executable).with_name('shoal')} train --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


# Budgets.


@pytest.mark.parametrize(
    ("text", "value"),
    [("250MB", 250e6), ("24kB", 24e3), ("2e8", 2e8), ("1.5G", 1.5e9), ("12", 12.0), ("3 T", 3e12)],
)
def test_quantities(text: str, value: float) -> None:
    assert parse_quantity(text, "test") == value


@pytest.mark.parametrize("text", ["", "MB", "12X", "1,5", "-3", "nan"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ConfigError, match="is no quantity"):
        parse_quantity(text, "test")


def test_budgets_with_conditions() -> None:
    budgets = parse_budgets(
        ["resident_bytes=250MB,precision=int8,context=2048", "latency_ms=20,batch=4"]
    )
    assert list(budgets) == ["resident_bytes", "latency_ms"]
    first = budgets["resident_bytes"]
    assert (first.target, first.precision, first.context) == (250e6, "int8", 2048)
    assert budgets["latency_ms"].batch == 4


@pytest.mark.parametrize(
    "texts",
    [
        ["bytes=1MB"],
        ["resident_bytes"],
        ["resident_bytes=1,speed=3"],
        ["latency_ms=1", "latency_ms=2"],
        ["resident_bytes=1,context=1.5"],
    ],
)
def test_budgets_that_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_budgets(texts)
