"""The `shoal shards` commands: look at shards, prove them, join them, take some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoal.data_pipeline.manifest import Manifest
    from shoal.data_pipeline.packing import RowBatch
    from shoal.data_pipeline.tokenizer import Tokenizer

shards_app = typer.Typer(
    help="Look at shards, check them, and make others of them.", no_args_is_help=True
)

Split = Annotated[Path, typer.Argument(help="Shards of one split, e.g. data/samples/train.")]
Out = Annotated[Path, typer.Argument(help="Folder to make; the tokenizer comes beside it.")]


@shards_app.command()
def verify(folder: Split) -> None:
    """Compare every byte of shards, and the tokenizer, with what was recorded; name what is broken.

    [dim]shoal shards verify data/samples/train[/dim]
    """
    from shoal.data_pipeline.proof import verify as verify_shards

    print(f"{folder}: {len(verify_shards(folder).shards)} shards, all as written")


@shards_app.command(name="show")
def show_shards(
    folder: Split,
    rows: Annotated[
        int, typer.Option("--rows", min=0, metavar="N", help="Print the text of so many rows.")
    ] = 0,
    first: Annotated[
        int, typer.Option("--first", min=0, metavar="ROW", help="Begin with this row.")
    ] = 0,
) -> None:
    """Show a manifest: counts, packing, sources, domains, what was left out and why; and rows.

    [dim]shoal shards show data/samples/train[/dim]
    [dim]shoal shards show data/samples/train --rows 3[/dim]
    """
    from shoal.launcher.tables import shards_table, show

    if not rows:
        show(shards_table(folder))
        return
    for line in describe_rows(folder, first, rows):
        print(line)


@shards_app.command()
def merge(
    out: Out,
    folders: Annotated[list[Path], typer.Argument(help="Shards to join, in this order.")],
) -> None:
    """Make one set of shards out of several of one tokenizer, context and packing.

    Their files are linked, so that this takes no room; on another disk they are copied.

    [dim]shoal shards merge data/all/train data/old/train data/new/train[/dim]
    """
    from shoal.data_pipeline.derived import merge as merge_shards

    _tell(out, merge_shards(out, folders))


@shards_app.command()
def sample(
    out: Out,
    folder: Split,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="How many.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which; the same takes the same.")] = 0,
) -> None:
    """Take rows of shards at random into shards of their own.

    [dim]shoal shards sample data/tenth/train data/samples/train --rows 500 --seed 1[/dim]
    """
    from shoal.data_pipeline.derived import sample as sample_rows

    _tell(out, sample_rows(out, folder, rows, seed))


def _tell(out: Path, manifest: Manifest) -> None:
    print(
        f"{out}: {manifest.rows:,} rows, {manifest.tokens:,} tokens "
        f"in {len(manifest.shards)} shards, verified"
    )


def describe_rows(folder: Path, first: int, count: int) -> Iterator[str]:
    """Yield rows as text, a line where each document begins and one for the padding.

    Raises:
        ConfigError: there is no row `first`.
        DataError: no shards there, or a shard is damaged.
    """
    import numpy as np

    from shoal.configs.errors import ConfigError
    from shoal.data_pipeline.rows import Rows
    from shoal.data_pipeline.tokenizer import Tokenizer

    rows = Rows.open(folder)
    if first >= len(rows):
        raise ConfigError(f"there are {len(rows)} rows, numbered from 0", where="--first")
    tokenizer = Tokenizer.load(rows.tokenizer_folder)
    for number in range(first, min(first + count, len(rows))):
        yield from _describe_row(number, rows.gather(np.asarray([number])), tokenizer)


def _describe_row(number: int, row: RowBatch, tokenizer: Tokenizer) -> Iterator[str]:
    import numpy as np

    from shoal.data_pipeline.packing import IGNORE

    tokens, segments = row.tokens[0], row.segments[0]
    text = int(np.count_nonzero(row.targets[0] != IGNORE)) + 1
    padding = max(0, len(segments) - text)
    # The last token is a target only: it ends the row, whatever it begins.
    inputs = min(text, len(segments))
    starts = [0, *(np.flatnonzero(np.diff(segments[:inputs])) + 1).tolist()]
    parts = [tokens[low:high] for low, high in zip(starts, [*starts[1:], text], strict=True)]
    if len(parts) > 1 and len(parts[-1]) == 1 and parts[-1][0] == tokenizer.eot_id:
        parts.pop()  # it only ends what stands before it
    yield f"row {number}: {text:,} tokens, {len(parts)} documents, {padding:,} of padding"
    for place, part in enumerate(parts, 1):
        words = tokenizer.decode(part[part != tokenizer.eot_id])
        yield f"  document {place}, {len(part):,} tokens"
        yield "    " + _make_printable(words).replace("\n", "\n    ")


def _make_printable(text: str) -> str:
    """Replace what could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
