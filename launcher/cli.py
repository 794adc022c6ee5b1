"""The `shoal` command; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from shoal.configs.errors import ShoalError
from shoal.launcher.clusters_cli import cluster
from shoal.launcher.commands import Shown
from shoal.launcher.shards_cli import shards_app

app = typer.Typer(
    help="Give Shoal a corpus and an inference budget; it trains every candidate that fits and "
    "tells, with evidence, which one to deploy.",
    epilog="First steps:  shoal demo  |  shoal prepare CONFIG  |  shoal train CONFIG  |  "
    "shoal COMMAND --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards_app, name="shards", rich_help_panel="Look")

Precision = Literal["fp32", "bf16", "int8", "int4"]
Trained = Literal["fp32", "bf16"]
Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]", help="Set one value, for example optim.lr=6e-4."),
]
Hostfile = Annotated[
    str | None, typer.Option("-H", "--hostfile", metavar="FILE", help="Lines `NAME slots=RANKS`.")
]
Include = Annotated[
    str,
    typer.Option("-i", "--include", metavar="SELECTION", help="Only these: NAME[:SLOT,...]@..."),
]
Exclude = Annotated[
    str, typer.Option("-e", "--exclude", metavar="SELECTION", help="All but these.")
]
Export = Annotated[Path, typer.Argument(help="Folder of an export or a Hugging Face model.")]


@app.command(rich_help_panel="Do")
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Turn a corpus into a tokenizer and shards.

    What exists is not done again; after a kill the same command goes on.

    [dim]shoal prepare corpus.yaml[/dim]
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


app.command(rich_help_panel="Do")(cluster)


@app.command(rich_help_panel="Do")
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [key=value]...",
            help="Without a config: default.yaml.",
            show_default=False,
        ),
    ] = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")] = False,
    show: Annotated[
        Shown | None, typer.Option(help="The plan for this way of starting; sbatch: a script.")
    ] = None,
) -> None:
    """Train one model on this machine, one rank a GPU or 2 CPU ranks, or on those of a hostfile.

    The same command again continues from the newest checkpoint. Ctrl-C saves and stops.

    [dim]shoal train[/dim]
    [dim]shoal train pretrain_dense.yaml name=wide model.width=1024 model.num_heads=16[/dim]
    [dim]shoal train pretrain_moe.yaml --hostfile hosts --include n1@n2:0,2 --dry-run[/dim]
    """
    from shoal.launcher.run import execute, make_order

    order = make_order(words or (), hostfile=hostfile, include=include, exclude=exclude,
                       dry_run=dry_run, show=show)  # fmt: skip
    execute(order)


@app.command(rich_help_panel="Do")
def check(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [key=value]...",
            help="Of the run that is planned. Without a config: default.yaml.",
            show_default=False,
        ),
    ] = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    full: Annotated[bool, typer.Option("--full", help="Read every byte of the shards.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Start the ranks for a short all-reduce.")
    ] = True,
    qualify: Annotated[
        bool, typer.Option("--qualify", help="Prove what the cluster does; some minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON lines.")] = False,
) -> None:
    """Look at every host of a job before it is started: one line a host and check.

    Exits with 4 if anything is bad; each bad line says what to do. With --qualify small models are
    trained on all ranks: every ZeRO stage against a plain loop, a run that loses a rank and goes on
    with fewer, all-reduces of several sizes, checkpoints written and read.

    [dim]shoal check pretrain_dense.yaml --hostfile hosts --full[/dim]
    [dim]shoal check pretrain_dense.yaml --hostfile hosts --qualify[/dim]
    """
    from shoal.launcher.check import check_order
    from shoal.launcher.qualification import qualify_order
    from shoal.launcher.run import make_order

    order = make_order(words or (), hostfile=hostfile, include=include, exclude=exclude)
    if qualify:
        raise typer.Exit(qualify_order(order, as_json=as_json))
    raise typer.Exit(check_order(order, full=full, probe=probe, as_json=as_json))


@app.command(rich_help_panel="Do")
def study(config: Config, overrides: Overrides = None) -> None:
    """Train all arms of a study alike, compare them at its budgets, write the report.

    Stages that exist are kept; after a kill the same command goes on.

    [dim]shoal study studies/demo.yaml[/dim]
    [dim]shoal study my_study.yaml 'seeds=[0,1,2]'[/dim]
    """
    from shoal.launcher.study import run_study

    run_study(config, overrides or ())


@app.command(rich_help_panel="Do")
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Of the study.")
    ] = None,
) -> None:
    """Go the whole way on the shipped sample corpus: dense, MoE and distilled models, one report.

    [dim]shoal demo[/dim]
    """
    from shoal.launcher.study import DEMO, run_study

    run_study(DEMO, overrides or ())


@app.command(rich_help_panel="Do")
def compare(
    exports: Annotated[list[Path], typer.Argument(help="Folders of exports, two or more.")],
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="AXIS=TARGET",
            help="resident_bytes=250MB, active_flops_per_token=2e8, kv_bytes_per_token=24kB, ...; "
            "conditions after commas: resident_bytes=250MB,precision=fp32,context=2048",
        ),
    ],
    tasks: Annotated[
        Path, typer.Option(metavar="YAML", help="What to score, as in a study's `tasks`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/compare"),
) -> None:
    """Compare models that exist at inference budgets: ours, or any Hugging Face folder.

    [dim]shoal compare export/* --budget resident_bytes=5MB --tasks tasks_samples.yaml[/dim]
    """
    from shoal.configs.load import load_config
    from shoal.configs.study import TasksConfig
    from shoal.launcher.budgets import parse_budgets
    from shoal.launcher.verdict import compare_exports

    compare_exports(exports, parse_budgets(budget), load_config(TasksConfig, tasks), out)


@app.command(rich_help_panel="Do")
def evaluate(
    export: Export,
    tasks: Annotated[
        Path, typer.Option(metavar="YAML", help="What to score, as in a study's `tasks`.")
    ],
    precision: Annotated[Trained, typer.Option(help="Weights are rounded to it.")] = "bf16",
) -> None:
    """Score one model on tasks: an export of ours, or any Hugging Face folder.

    [dim]shoal evaluate export/default --tasks tasks_samples.yaml[/dim]
    """
    from shoal.configs.load import load_config
    from shoal.configs.study import TasksConfig
    from shoal.launcher.tables import show
    from shoal.launcher.verdict import score_export

    show(score_export(export, load_config(TasksConfig, tasks), precision))


@app.command(rich_help_panel="Do")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/default.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[Trained, typer.Option(help="Precision of the weights.")] = "fp32",
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder, proven equal before it exists.

    [dim]shoal export runs/default export/default --dtype bf16[/dim]
    """
    from shoal.launcher.exports import export_run

    report = export_run(run, out, dtype)
    print(f"exported {out}: logits equal to {report.max_logit_difference:.1e}")


@app.command(rich_help_panel="Do")
def generate(
    export: Export,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: all tokens.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Let an export continue a text.

    [dim]shoal generate export/default "The results suggest" --temperature 0[/dim]
    """
    from shoal.launcher.exports import generate as generate_text

    print(generate_text(export, prompt, max_new_tokens, temperature, top_k, seed))


@app.command(rich_help_panel="Look")
def plan(
    config: Config,
    overrides: Overrides = None,
    precision: Annotated[Precision, typer.Option(help="Of weights and cache.")] = "bf16",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens; default: the row's.")] = None,
) -> None:
    """Show shape, memory and FLOPs of the model a config describes; nothing is started.

    [dim]shoal plan pretrain_dense.yaml model.vocab_size=50304[/dim]
    [dim]shoal plan pretrain_moe.yaml --precision int8 --context 4096[/dim]
    """
    from shoal.configs.load import load_config
    from shoal.configs.schema import RunConfig
    from shoal.launcher.plan import shape_table
    from shoal.launcher.tables import show

    loaded = load_config(RunConfig, config, overrides or ())
    show(shape_table(loaded, context or loaded.model.context, precision))


@app.command(rich_help_panel="Look")
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs"),
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove what killed jobs left, and old logs.")
    ] = False,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --clean: remove all but the newest N checkpoints of every run, its best one "
            "and its milestones.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --clean: only say what would be removed.")
    ] = False,
) -> None:
    """List runs: how far each is, its loss, checkpoints and size, and how it ended; or clean up.

    A run that is in training is never cleaned.

    [dim]shoal runs[/dim]
    [dim]shoal runs --clean --dry-run[/dim]
    [dim]shoal runs old_runs --clean --keep 1[/dim]
    """
    from shoal.configs.errors import ConfigError
    from shoal.launcher.cleaning import clean_runs
    from shoal.launcher.tables import cleaning_table, runs_table, show

    if clean:
        cleaning = clean_runs(folder, keep=keep, dry_run=dry_run)
        show(cleaning_table(cleaning, dry_run=dry_run))
    elif keep or dry_run:
        raise ConfigError("--keep and --dry-run go with --clean", where="command line")
    else:
        show(runs_table(folder))


@app.command(rich_help_panel="Look")
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, checkpoint, shards, export or report.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of checkpoints or shards.")
    ] = False,
) -> None:
    """Say what a folder is and what is in it; exits with 3 where it is broken, and says what is.

    [dim]shoal inspect runs/default[/dim]
    [dim]shoal inspect runs/default/checkpoints/step-00000100 --verify[/dim]
    """
    from shoal.launcher.tables import show_path

    show_path(path, verify=verify)


@app.command(rich_help_panel="Look")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a report, for example reports/demo.")],
) -> None:
    """Print a report's verdict, and write its Markdown and HTML again from report.json.

    [dim]shoal report reports/demo[/dim]
    """
    from shoal.eval.report import write_report
    from shoal.launcher.tables import read_report

    write_report(read_report(folder), folder)
    print((folder / "report.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line, print one screen about a failure, and exit with its code."""
    from shoal.launcher.screen import guard

    sys.exit(guard(lambda: _run(argv)))


def _run(argv: list[str] | None) -> None:
    """Run typer; usage errors, which only it knows how to show, exit here."""
    try:
        code = app(args=argv, prog_name="shoal", standalone_mode=False)
    except typer.Abort:  # its word for Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        # The classes of usage errors moved between click and typer; their two members did not.
        if isinstance(error, ShoalError) or not hasattr(error, "show"):
            raise
        error.show()
        raise SystemExit(2) from None
    if code:  # of a typer.Exit, which is returned here
        raise SystemExit(code)


if __name__ == "__main__":
    main()
