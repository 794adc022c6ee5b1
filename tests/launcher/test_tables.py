"""Tables: what a command shows is all that the files say, and what is not there is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.launcher.tables import facts_table, runs_table, shards_table, show

BROKEN = ["{", "no JSON", '{"text": 5}']


def rows_of(text: str) -> dict[str, str]:
    """Name and value of every row of a printed table of facts."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources, of which the second has broken records; paths are relative."""
    monkeypatch.chdir(tmp_path)
    texts = [json.dumps({"text": f"words {i}", "domain": "[bio]"}) for i in range(40)]
    Path("[a].jsonl").write_text("\n".join(texts), encoding="utf-8")
    Path("b.jsonl").write_text("\n".join([*BROKEN, *texts[:9]]), encoding="utf-8")
    return tmp_path


def make_shards(*sources: str) -> Path:
    """Prepare sources; return the training split."""
    from shoal.data_pipeline.shards import prepare

    tree = {
        "output": "c",
        "train": [{"path": source} for source in sources],
        "validation_share": 0.0,
        "tokenizer": {"vocab_size": 280},
        "context": 16,
        "max_dropped_share": 0.5,
    }
    return prepare(PrepareConfig.model_validate(tree)).train


def test_shards_name_their_sources_and_what_was_dropped(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards("[a].jsonl", "b.jsonl")
    show(shards_table(folder))
    rows = rows_of(capsys.readouterr().out)
    size = {n: sum(len(f"words {i}") for i in range(n)) for n in (40, 9)}
    assert rows["source 1"] == f"[a].jsonl: 40 documents, {size[40]} bytes"
    assert rows["source 2"] == f"b.jsonl: 9 documents, {size[9]} bytes"
    assert rows["domain [bio]"] == "49"
    assert rows["dropped"] == "3"
    assert rows["dropped: not JSON"] == "2"
    assert rows["dropped: no text under key 'text'"] == "1"
    assert rows["list of dropped"] == "c/train/dropped.jsonl"
    assert len(Path(rows["list of dropped"]).read_text(encoding="utf-8").splitlines()) == 3


def test_shards_of_which_nothing_was_dropped_name_no_list(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(shards_table(make_shards("[a].jsonl")))
    rows = rows_of(capsys.readouterr().out)
    assert rows["dropped"] == "0"
    assert "list of dropped" not in rows
    assert "source 2" not in rows


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards there"):
        shards_table(tmp_path)


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show(facts_table("run [a]", {"[b]": "[c]/[/d]"}))
    out = capsys.readouterr().out
    assert "run [a]" in out
    assert rows_of(out) == {"[b]": "[c]/[/d]"}


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_runs_of_no_folder_is_an_error(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / kind).write_text("")
    with pytest.raises(ConfigError, match="no such folder") as caught:
        runs_table(tmp_path / kind)
    assert caught.value.where == str(tmp_path / kind)
