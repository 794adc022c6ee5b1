"""The `shoal cluster` command: clusters made, what that cost booked, and shown as two tables."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.configs.clusters import ClusterConfig
    from shoal.data_pipeline.clustering import Model
    from shoal.data_pipeline.clusters import Clusters
    from shoal.launcher.tables import Progress


def cluster(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped config.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]", help="Set one value, for example clusters=256."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the resampled stream that is described; default: the generic corpus's.",
        ),
    ] = None,
    temper: Annotated[
        float, typer.Option(min=0, help="Exponent of its weights, as sample.temper of a run.")
    ] = 1.0,
) -> None:
    """Put rows of a generic corpus and of domains in clusters, to sample the one like the other.

    What exists is not done again; after a kill the same command goes on.

    [dim]shoal cluster clusters_samples.yaml[/dim]
    [dim]shoal cluster clusters_samples.yaml clusters=256 output=data/clusters-256[/dim]
    """
    from shoal.configs.clusters import ClusterConfig
    from shoal.configs.load import load_config
    from shoal.launcher.tables import progress_bars, show

    loaded = load_config(ClusterConfig, config, overrides or ())
    with progress_bars() as progress:
        clusters = cluster_corpora(loaded, progress)
    show(corpora_table(clusters, rows or clusters.generic.rows, temper))
    for corpus in clusters.manifest.corpora[1:]:
        show(words_table(clusters, corpus.name))


def cluster_corpora(config: ClusterConfig, progress: Progress | None = None) -> Clusters:
    """Make clusters, and book what that cost beside them; nothing is done twice."""
    from shoal.data_pipeline.clustering import make_clusters
    from shoal.data_pipeline.clusters import LEDGER
    from shoal.trainer.ledger import LedgerEntry, append_entry, now

    started, begun = now(), time.monotonic()
    clusters = make_clusters(config, progress, _open_export(config))
    if clusters.built:
        entry = LedgerEntry(
            kind="cluster",
            stage=config.name,
            scope="generic",
            started=started,
            seconds=time.monotonic() - begun,
        )
        append_entry(clusters.folder / LEDGER, entry)
    return clusters


def _open_export(config: ClusterConfig) -> Model | None:
    """Return the model of the method `export`."""
    embedding = config.embedding
    if embedding.method != "export" or embedding.path is None:
        return None
    from shoal.data_pipeline.clustering import Model
    from shoal.eval.candidate import Candidate
    from shoal.launcher.embedders import ExportEmbed

    folder = Path(embedding.path).expanduser()
    return Model(ExportEmbed(folder, embedding.precision), Candidate.open(folder).hash)


def corpora_table(clusters: Clusters, rows: int, temper: float) -> Table:
    """Return a line a corpus: its histogram, and the stream that is resampled for it.

    Args:
        clusters: What was made.
        rows: Of the stream.
        temper: Exponent of its weights.
    """
    from rich.markup import escape
    from rich.table import Table

    manifest = clusters.manifest
    title = f"{clusters.folder}: {manifest.clusters:,} clusters, {manifest.empty_clusters} empty"
    caption = f"resampled: {rows:,} rows, temper {temper:g}"
    table = Table(title=escape(title), title_justify="left", caption=caption)
    for column in ("corpus", "rows", "entropy, bits", "in top cluster", "from generic (TV)",
                   "effective rows", "distinct rows", "distinct / drawn", "most repeats",
                   "lost"):  # fmt: skip
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for corpus in manifest.corpora:
        cells = [
            f"{corpus.rows:,}",
            f"{corpus.entropy_bits:.2f}",
            f"{corpus.top_share:.1%}",
            f"{corpus.total_variation:.3f}",
        ]
        if corpus != clusters.generic:
            facts = clusters.describe(corpus.name, rows, temper)
            cells += [
                f"{facts.effective_rows:,.0f}",
                f"{facts.distinct_rows:,.0f}",
                f"{facts.unique_fraction:.3f}",
                f"{facts.most_repeats:.1f}",
                f"{facts.lost_share:.2%}",
            ]
        table.add_row(escape(corpus.name), *cells)
    return table


def words_table(clusters: Clusters, name: str) -> Table:
    """Return the largest clusters of a domain: their shares, weight and words."""
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    domain = clusters.histogram(name) / clusters.facts(name).rows
    generic = clusters.histogram(clusters.generic.name) / clusters.generic.rows
    table = Table(title=escape(f"clusters of {name}"), title_justify="left")
    for column in ("cluster", "share", "generic", "weight", "words"):
        table.add_column(column, justify="left" if column == "words" else "right")
    for number in np.argsort(-domain, kind="stable").tolist():
        if domain[number] == 0 or number not in clusters.manifest.words:
            break
        weight = f"{domain[number] / generic[number]:.2f}" if generic[number] else "no generic row"
        words = " ".join(clusters.manifest.words[number])
        shares = (f"{share[number]:.1%}" for share in (domain, generic))
        table.add_row(str(number), *shares, weight, escape(words))
    return table
