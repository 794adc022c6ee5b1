"""`shoal plan` of a corpus."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from shoal.launcher.cli import main
from shoal.launcher.forecasts import format_seconds

TEXT = "the cell fires when light falls on it and its rate depends on contrast"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    chooser = random.Random(0)
    with (tmp_path / "text.jsonl").open("w") as lines:
        for number in range(300):
            text = " ".join(chooser.choices(TEXT.split(), k=40))
            lines.write(json.dumps({"id": str(number), "text": text}) + "\n")
    file = tmp_path / "corpus.yaml"
    file.write_text(
        f"name: small\noutput: {tmp_path}/out\ntrain: [{{path: {tmp_path}/text.jsonl}}]\n"
        "tokenizer: {vocab_size: 300}\ncontext: 32\n"
    )
    return file


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_a_corpus_is_forecast_and_nothing_is_left(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    feed = ("--gpus", 4, "--hosts", 2, "--tokens-per-second", "1G", "--bandwidth", "1kB")
    assert run("plan", config, *feed) == 0
    shown = capsys.readouterr().out
    for text in ("to prepare small", "rows of 32", "to feed 4 GPUs on 2 hosts", "for downloads",
                 "trained on the sample"):  # fmt: skip
        assert text in shown
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--bandwidth", "much"), 2, "no quantity"),
        (("--gpus", 1, "--hosts", 2), 2, "2 hosts for 1 GPUs"),
        (("train.0.path=nowhere.jsonl",), 3, "nowhere.jsonl"),
        (("contxt=3",), 2, "did you mean context?"),
    ],
)
def test_what_cannot_be_forecast_is_said(
    words: tuple[object, ...], code: int, said: str, config: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("plan", config, *words) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (42, "42 s"), (600, "10 min"), (36_000, "10.0 h")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
