"""The `shoal tokenizer` commands: train one, import one, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoal.data_pipeline.tokenizer import Tokenizer

tokenizer_app = typer.Typer(help="Train, import and compare tokenizers.", no_args_is_help=True)

Given = Annotated[Path, typer.Argument(help="Folder of a tokenizer, or a tokenizer.json.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")]
Field = Annotated[str, typer.Option(help="Field that holds the text.")]


@tokenizer_app.command()
def train(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Files, folders, globs or URLs, as in a corpus."),
    ],
    out: Out,
    vocab_size: Annotated[int, typer.Option(min=257, help="Entries, exactly.")],
    field: Field = "text",
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of each TEXT, from its start; default: all.")
    ] = None,
) -> None:
    """Learn a byte-level BPE tokenizer from texts; the same texts give the same bytes.

    [dim]shoal tokenizer train my/*.jsonl.gz data/tokenizer --vocab-size 16384[/dim]
    """
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.launcher.vocabularies import read_texts

    _check_free(out)
    chain = (text for path in texts for text in read_texts(path, field, max_bytes))
    _publish(Tokenizer.train(chain, vocab_size), out)


@tokenizer_app.command(name="import")
def import_(path: Given, out: Out) -> None:
    """Write a tokenizer as a folder of ours: GPT-2's two files, or any byte-level tokenizer.json.

    [dim]shoal tokenizer import downloads/gpt2 data/tokenizer[/dim]
    """
    from shoal.data_pipeline.tokenizer import Tokenizer

    _check_free(out)
    _publish(Tokenizer.load(path), out)


@tokenizer_app.command()
def compare(
    first: Given,
    second: Given,
    texts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Text to measure them on; may be repeated."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Which texts are the domain; the others are general. Default: the first.",
        ),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Domain words, one a line, instead of finding them."),
    ] = None,
    brainbench: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="BrainBench cases. Default: those shipped."),
    ] = None,
    field: Field = "text",
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Of each text, from its start.")
    ] = 20_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell what two vocabularies share, and what each is worth on a domain.

    Fertility, bytes per token, overlap, domain words, tokens of a BrainBench item: the analysis of
    arXiv:2405.09395.

    [dim]shoal tokenizer compare gpt2 data/tokenizer --texts neuro=n.jsonl --texts web=w.jsonl[/dim]
    """
    from shoal.launcher.vocabularies import Question, compare_tokenizers, comparison_tables, to_json

    asked = Question.parse(texts or (), domain or (), words, brainbench or None, field, max_bytes)
    comparison = compare_tokenizers(first, second, asked)
    if as_json:
        print(to_json(comparison))
        return
    from shoal.launcher.tables import show

    for table in comparison_tables(comparison):
        show(table)


def _check_free(out: Path) -> None:
    from shoal.configs.errors import ConfigError

    if out.exists():
        raise ConfigError("exists already", where=out, fix="choose another folder, or remove it")


def _publish(tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder aside, prove that it loads as the same, and give it its name."""
    import shutil

    from shoal.configs.errors import DataError
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.trainer.storage import sync

    aside = out.absolute().with_name(f".partial-{out.absolute().name}")
    if aside.exists():  # of a killed command
        shutil.rmtree(aside)
    tokenizer.save(aside)
    fingerprint = Tokenizer.load(aside).fingerprint
    if fingerprint != tokenizer.fingerprint:
        raise DataError("reads back as another tokenizer than was written", where=aside)
    for path in (*aside.iterdir(), aside):
        sync(path)
    aside.rename(out)
    sync(out.absolute().parent)
    speed = "" if tokenizer.is_fast else "; tiktoken cannot follow it, so encoding will be slow"
    print(f"{out}: {tokenizer.vocab_size:,} entries, fingerprint {fingerprint[:12]}{speed}")
