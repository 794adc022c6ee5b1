"""The `shoal` commands on corpora: prepare one, cluster several, forecast."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shoal.launcher.clusters_cli import cluster

data_app = typer.Typer()
"""Its commands stand beside the others, without a name before them."""

data_app.command(rich_help_panel="Do")(cluster)

Precision = Literal["fp32", "bf16", "int8", "int4"]
Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]", help="Set one value, for example optim.lr=6e-4."),
]


@data_app.command(rich_help_panel="Do")
def prepare(
    config: Config,
    overrides: Overrides = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Write OUTPUT/report.html: read, removed, packed."),
    ] = False,
) -> None:
    """Turn a corpus into a tokenizer and shards.

    What exists is not done again; after a kill the same command goes on.

    [dim]shoal prepare corpus.yaml --report[/dim]
    [dim]shoal prepare corpus.yaml output=data/mine train.0.path=my/*.jsonl.gz context=512[/dim]
    """
    from shoal.configs.corpus import PrepareConfig
    from shoal.configs.load import load_config
    from shoal.launcher.corpus import prepare_corpus
    from shoal.launcher.tables import progress_bars, shards_table, show

    loaded = load_config(PrepareConfig, config, overrides or ())
    with progress_bars() as progress:
        prepared = prepare_corpus(loaded, progress)
    for folder in (prepared.train, prepared.validation):
        if folder is not None:
            show(shards_table(folder))
    if report:
        from shoal.launcher.corpus_report import write_corpus_report

        print(f"report: {write_corpus_report(prepared.output, loaded.name)}")


@data_app.command(rich_help_panel="Look")
def plan(
    config: Config,
    overrides: Overrides = None,
    precision: Annotated[Precision, typer.Option(help="Of weights and cache.")] = "bf16",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens; default: the row's.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="That read the shards.")] = 8,
    hosts: Annotated[int, typer.Option(min=1, help="They are in.")] = 1,
    tokens_per_second: Annotated[
        str, typer.Option(metavar="RATE", help="That one GPU trains on.")
    ] = "500k",
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Per second to one host; default: its own disk."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Tasks at once; default: the corpus's.")
    ] = None,
) -> None:
    """Show what a config comes to before anything is started.

    Of a run: shape, memory and FLOPs of its model. Of a corpus: from a sample that is prepared, its
    tokens, the time and disk that preparing takes, and whether GPUs would wait for rows.

    [dim]shoal plan pretrain_dense.yaml model.vocab_size=50304[/dim]
    [dim]shoal plan pretrain_moe.yaml --precision int8 --context 4096[/dim]
    [dim]shoal plan corpus.yaml --gpus 16 --hosts 2 --tokens-per-second 520k --bandwidth 1GB[/dim]
    """
    from shoal.configs.load import load_config
    from shoal.configs.schema import RunConfig
    from shoal.launcher.forecasts import is_corpus, parse_feed, plan_corpus
    from shoal.launcher.plan import shape_table
    from shoal.launcher.tables import show

    if is_corpus(config):
        feed = parse_feed(gpus, tokens_per_second, hosts, bandwidth)
        for table in plan_corpus(config, overrides or (), feed, processes):
            show(table)
        return
    loaded = load_config(RunConfig, config, overrides or ())
    show(shape_table(loaded, context or loaded.model.context, precision))
