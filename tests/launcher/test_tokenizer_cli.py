"""`shoal tokenizer`: trained, imported and compared, from files to the screen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.launcher import cli

COMMON = [
    "the",
    "a",
    "of",
    "in",
    "and",
    "we",
    "show",
    "find",
    "that",
    "this",
    "test",
    "line",
    "word",
]


def shoal(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tokenizer", *map(str, words)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def write_texts(file: Path, special: list[str], seed: int) -> Path:
    chooser = random.Random(seed)
    lines = (" ".join(chooser.choices(COMMON + special * 2, k=40)) for _ in range(60))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    neuro = write_texts(folder / "neuro.jsonl", ["gyrus", "axon", "hippocampus"], 0)
    return neuro, write_texts(folder / "general.jsonl", ["recipe", "butter"], 1)


@pytest.fixture(scope="module")
def trained(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for file in files:
        with pytest.raises(SystemExit) as caught:
            cli.main(["tokenizer", "train", str(file), str(folder / file.stem),
                      "--vocab-size", "290"])  # fmt: skip
        assert not caught.value.code
    return [folder / file.stem for file in files]


@pytest.mark.parametrize("command", ["train", "import", "compare"])
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shoal(command, "--help", capsys=capsys)
    assert code == 0
    assert f"shoal tokenizer {command}" in out.split("Usage:", 1)[1].split("\n", 1)[1]


def test_train_is_exact_and_the_same_again(
    files: tuple[Path, Path], trained: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert Tokenizer.load(trained[0]).vocab_size == 290
    code, out, _ = shoal("train", files[0], tmp_path / "again", "--vocab-size", 290, capsys=capsys)
    assert code == 0
    assert "290 entries" in out
    for file in trained[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_several_texts_train_one(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shoal("train", *files, tmp_path / "both", "--vocab-size", 320, capsys=capsys)
    tokenizer = Tokenizer.load(tmp_path / "both")
    assert {len(ids) for ids in tokenizer.encode_batch([" gyrus", " butter"])} == {1}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{neuro}", "{out}", "--vocab-size", "9000"], 3, "lower the vocabulary to"),
        (["{neuro}", "{out}", "--vocab-size", "200"], 2, "257"),
        (["{neuro}", "{neuro}", "--vocab-size", "290"], 2, "exists already"),
        (["{out}/absent", "{out}", "--vocab-size", "290"], 3, "absent"),
        (["{neuro}", "{out}", "--vocab-size", "290", "--field", "body"], 3, "--field"),
    ],
)
def test_train_refuses(
    words: list[str], code: int, message: str, files: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [word.format(neuro=files[0], out=tmp_path / "out") for word in words]
    found, _, err = shoal("train", *words, capsys=capsys)
    assert (found, message in err) == (code, True), err
    assert list(tmp_path.iterdir()) == []


def test_import_of_gpt2s_files(
    trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    tree = json.loads((trained[0] / "tokenizer.json").read_text())["model"]
    (given / "encoder.json").write_text(json.dumps(tree["vocab"] | {"<|endoftext|>": 289}))
    pairs = "".join(f"{left} {right}\n" for left, right in tree["merges"])
    (given / "vocab.bpe").write_text("#version: 0.2\n" + pairs)
    code, out, _ = shoal("import", given, tmp_path / "ours", capsys=capsys)
    assert code == 0
    ours = Tokenizer.load(tmp_path / "ours")
    texts = ["the gyrus, naïve", "axon"]
    expected = Tokenizer.load(trained[0]).encode_batch(texts)
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == [e.tolist() for e in expected]
    assert ours.fingerprint[:12] in out
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


def test_import_refuses_what_is_no_byte_level_bpe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    file = tmp_path / "tokenizer.json"
    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(file))
    code, _, err = shoal("import", file, tmp_path / "out", capsys=capsys)
    assert code == 3
    assert "not byte-level BPE" in err
    assert not (tmp_path / "out").exists()


def test_compare_as_json(
    files: tuple[Path, Path], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--texts", f"general={files[1]}", "--texts", f"neuro={files[0]}", "--domain", "neuro"]
    code, out, _ = shoal("compare", *trained, *texts, "--json", capsys=capsys)
    assert code == 0
    tree = json.loads(out)
    assert tree["overlap"]["entries"] == [290, 290]
    assert 257 < tree["overlap"]["shared"] < 290
    assert set(tree["texts"]) == {"general", "neuro", "BrainBench"}
    first, second = tree["texts"]["neuro"]["fertility"]
    assert first < second  # its own text
    assert tree["texts"]["neuro"]["compression"] == pytest.approx(first / second)
    assert tree["texts"]["general"]["compression"] > 1
    assert set(tree["domain"]["top"]) == {"gyrus", "axon", "hippocampus"}
    assert tree["domain"]["shares"][0]["entries"] > tree["domain"]["shares"][1]["entries"]
    assert {one["word"] for one in tree["domain"]["only_first"]} <= set(tree["domain"]["top"])
    assert tree["domain"]["only_first"]


def test_compare_as_tables(
    files: tuple[Path, Path], trained: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "words.txt").write_text("Axon\n\ngyrus\naxon\n")
    code, out, _ = shoal(
        "compare", *trained, "--texts", f"neuro={files[0]}",
        "--words", tmp_path / "words.txt", capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert "of 2 domain words one token" in out
    assert "BrainBench" in out


def test_compare_without_general_text_says_nothing_of_domain_words(
    files: tuple[Path, Path], trained: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = shoal("compare", *trained, "--texts", f"neuro={files[0]}", capsys=capsys)
    assert code == 0
    assert "neuro" in out
    assert "domain words" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--texts", "neuro.jsonl"], 2, "write NAME=PATH"),
        (["--texts", "a={neuro}", "--texts", "a={neuro}"], 2, "a name of its own"),
        (["--texts", "a={neuro}", "--domain", "b"], 2, "b names no text"),
        (["--words", "{neuro}.absent"], 2, "cannot be read"),
        (["--brainbench", "{neuro}"], 3, "holds no text"),
    ],
)
def test_compare_refuses(
    words: list[str], code: int, message: str, files: tuple[Path, Path], trained: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [word.format(neuro=files[0]) for word in words]
    found, _, err = shoal("compare", *trained, *words, capsys=capsys)
    assert (found, message in err) == (code, True), err
