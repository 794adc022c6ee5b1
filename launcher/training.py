"""The composition root of a run: parts are built here in order, and handed to the loop.

Each function is one command's worth of work; everything heavy is imported when it is needed.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.corpus import PrepareConfig
from shoal.configs.errors import ConfigError, DataError, PreflightError
from shoal.configs.load import build_config, dump_config, load_config, read_tree
from shoal.configs.schema import RunConfig
from shoal.trainer.storage import write_text

if TYPE_CHECKING:
    import torch

    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.shards import Manifest, Prepared, Rows
    from shoal.launcher.tables import Progress
    from shoal.launcher.world import World
    from shoal.trainer.loop import RunFacts, Validation
    from shoal.trainer.objective import Objective, Teacher

CONFIG_FILE = "config.yaml"
DIVERGED = "diverged.txt"
WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Corpus:
    """The shards of a run, opened."""

    train: list[tuple[Rows, float]]
    validation: Rows | None

    @property
    def manifest(self) -> Manifest:
        """Manifest of the first training stream; the others agree on tokenizer and row length."""
        return self.train[0][0].manifest

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data."""
        return {"streams": [[rows.manifest.shards_hash, weight] for rows, weight in self.train]}


def train(configs: Sequence[RunConfig], world: World) -> None:
    """Train the runs one after another on the ranks of `world`; finished ones cost nothing.

    Raises:
        ConfigError, DataError, PreflightError: named, before anything expensive where possible.
        StoppedOnRequest: a signal arrived; a checkpoint is saved.
    """
    from shoal.trainer.engine import start_process_group, stop_process_group

    for config in configs:
        wait_for_corpus(config, world)
    device = world.device
    start_process_group(device, configs[0].world.timeout_seconds)
    try:
        for config in configs:
            _train_one(config, world, device)
    finally:
        stop_process_group()


def _train_one(config: RunConfig, world: World, device: torch.device) -> None:
    from shoal.trainer.engine import Engine
    from shoal.trainer.loop import NonFiniteLossError
    from shoal.trainer.loop import train as run_loop

    folder = run_folder(config)
    lock = _lock(folder, world)
    corpus = open_corpus(config)
    config = resolve_run(config, corpus.manifest)
    position = corpus.identity() | _teacher_identity(config)
    _check_resume(folder, config, position)
    _check_disk(folder, config)
    if world.rank == 0:
        write_text(folder / CONFIG_FILE, dump_config(config))
    objective = _build_objective(config, corpus, device)
    loader = _build_loader(config, corpus, world)
    engine = Engine(
        objective,
        config.optim,
        config.train,
        accumulation=loader.accumulation,
        device=device,
    )
    try:
        run_loop(
            engine,
            loader,
            config,
            _run_facts(config, world, objective, engine.stage),
            validation=_validation(config, corpus, world),
            stop_requested=lambda: world.stop.requested,
            position=position,
        )
    except NonFiniteLossError as error:
        if config.ledger.kind != "tune":
            raise
        if world.rank == 0:  # a rate that is too high is a result of a search, not its end
            write_text(folder / DIVERGED, str(error))
    engine.close()
    lock.close()


def _teacher_identity(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint remembers of its teacher: the hash of its weights, by file.

    Raises:
        ConfigError: there is no such folder.
    """
    from shoal.trainer.storage import digest

    if config.teacher is None:
        return {}
    if not Path(config.teacher.path).is_dir():
        fix = "export it first: shoal export RUN OUT"
        raise ConfigError("no such teacher", where=config.teacher.path, fix=fix)
    weights = sorted(Path(config.teacher.path).glob("*.safetensors"))
    return {"teacher": {file.name: digest(file) for file in weights}}


def _check_disk(folder: Path, config: RunConfig) -> None:
    """Refuse a run whose checkpoints cannot fit where they go.

    Raises:
        PreflightError: names what is needed and what is free.
    """
    from shoal.trainer.checkpoint import BYTES_PER_PARAMETER
    from shoal.trainer.cost import count_parameters

    written = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    done = [int(f.name.removeprefix("step-")) for f in folder.glob("checkpoints/step-[0-9]*")]
    left = config.steps - max(done, default=0)
    saves = -(-left // config.checkpoint.every_steps)
    if saves <= 0:
        return
    # The newest lies beside those kept until it is whole.
    most = min(config.checkpoint.keep + 1, len(done) + saves)
    needed = BYTES_PER_PARAMETER * count_parameters(config.model).total * most - written
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PreflightError(
            f"checkpoints need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=folder,
            fix="free some space, write elsewhere (output=FOLDER), or lower checkpoint.keep",
        )


def _check_resume(folder: Path, config: RunConfig, position: dict[str, Any]) -> None:
    """Refuse to go on with another config or other inputs before anything is built or written."""
    from shoal.trainer.checkpoint import read_manifest
    from shoal.trainer.loop import check_same_inputs, check_same_run

    for checkpoint in sorted(folder.glob("checkpoints/step-[0-9]*"), reverse=True):
        try:
            manifest = read_manifest(checkpoint)
        except DataError:
            continue  # passed over with a warning when the newest whole one is looked for
        check_same_run(manifest.run, config, where=checkpoint)
        check_same_inputs(manifest.position, position, where=checkpoint)
        return


def _build_objective(config: RunConfig, corpus: Corpus, device: torch.device) -> Objective:
    import torch

    from shoal.kernels.backend import resolve
    from shoal.trainer.model import Transformer
    from shoal.trainer.objective import Objective

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    kernels = resolve(config.kernels, device, dtype)
    model = Transformer(config.model, kernels)
    model.initialize(config.seed)
    model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return Objective(model, load_teacher(config, corpus.manifest, device, dtype))


def _build_loader(config: RunConfig, corpus: Corpus, world: World) -> Loader:
    from shoal.data_pipeline.loader import Loader

    return Loader(
        corpus.train,
        seed=config.seed,
        batch_rows=config.train.batch_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        rank=world.rank,
        num_ranks=world.num_ranks,
        document_mask=config.data.document_mask,
    )


def _run_facts(config: RunConfig, world: World, objective: Objective, stage: int) -> RunFacts:
    from shoal.trainer.cost import training_flops_per_token
    from shoal.trainer.loop import RunFacts

    teacher = objective.teacher
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed")}
    return RunFacts(
        folder=run_folder(config),
        rank=world.rank,
        ranks=world.num_ranks,
        device=world.device_name,
        training_flops_per_token=training_flops_per_token(
            config.model, config.model.context, teacher.model.config if teacher else None
        ),
        chosen={**asdict(objective.model.kernels), "zero_stage": stage, **versions},
    )


def run_folder(config: RunConfig) -> Path:
    """Return where a run lives."""
    return Path(config.output) / config.name


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Return whether a run has its last checkpoint, whole; a damaged one is trained again."""
    from shoal.trainer.checkpoint import checkpoint_name, verify_checkpoint

    last = folder / "checkpoints" / checkpoint_name(config.steps)
    try:
        verify_checkpoint(last)
    except DataError:
        return False
    return True


def has_diverged(folder: Path) -> bool:
    """Return whether a run was a trial that ended in a loss that is not a number."""
    return (folder / DIVERGED).is_file()


def ensure_prepared(config: RunConfig) -> None:
    """Prepare the run's corpus if its config names one and the shards are absent."""
    if config.prepare and not _is_under_way(config):
        from shoal.launcher.tables import progress_bars

        with progress_bars() as progress:
            prepare_corpus(load_config(PrepareConfig, config.prepare), progress)


def _is_under_way(config: RunConfig) -> bool:
    """Whether a run has been started on shards that are still there.

    Its checkpoints know those by their hash, so the text they were made from may be gone.
    """
    folders = [Path(stream.path) for stream in config.data.train]
    folders += [Path(config.data.validation)] if config.data.validation else []
    started = any(run_folder(config).glob("checkpoints/step-[0-9]*"))
    return started and all((folder / "manifest.json").is_file() for folder in folders)


def prepare_corpus(config: PrepareConfig, progress: Progress | None = None) -> Prepared:
    """Prepare a corpus, and book what that cost beside it; nothing is done twice."""
    from shoal.data_pipeline.shards import prepare, read_manifest
    from shoal.trainer.ledger import LedgerEntry, append_entry, now

    started, begun = now(), time.monotonic()
    present = Path(config.output).exists()
    prepared = prepare(config, progress)
    if not present:
        entry = LedgerEntry(
            kind="prepare",
            stage=config.name,
            scope="generic",
            started=started,
            seconds=time.monotonic() - begun,
            tokens=read_manifest(prepared.train).tokens,
        )
        append_entry(prepared.output / "ledger.jsonl", entry)
    return prepared


def wait_for_corpus(config: RunConfig, world: World) -> None:
    """Rank 0 of every machine prepares what is absent; the others wait for it.

    Happens before the process group exists, so that no collective times out on a large corpus.

    Raises:
        DataError: the run names shards that this does not prepare, and that are not there.
    """
    if world.local_rank == 0:
        ensure_prepared(config)
        open_corpus(config)
        return
    folders = [Path(stream.path) for stream in config.data.train]
    while config.prepare and not all((f / "manifest.json").is_file() for f in folders):
        time.sleep(WAIT_SECONDS)


def open_corpus(config: RunConfig) -> Corpus:
    """Open the shards a run names and check that they belong together.

    Raises:
        DataError: missing or altered shards, a tokenizer that is not theirs, or streams that do not
            belong together.
        ConfigError: the model's context is not that of the rows.
    """
    from shoal.data_pipeline.shards import Rows, check_alike, check_context

    streams = [(Rows.open(Path(s.path)), s.weight) for s in config.data.train]
    validation = Rows.open(Path(config.data.validation)) if config.data.validation else None
    check_alike([*(rows for rows, _ in streams), *([validation] if validation else [])])
    check_context(streams[0][0].manifest, config.model.context)
    return Corpus(streams, validation)


def resolve_run(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Fill in what only the shards know: the vocabulary size."""
    model = config.model.with_vocab(manifest.vocab_size)
    return config.model_copy(update={"model": model})


def load_teacher(
    config: RunConfig, manifest: Manifest, device: torch.device, dtype: torch.dtype
) -> Teacher | None:
    """Load the frozen teacher of a distillation.

    Raises:
        ConfigError: its vocabulary is not the student's, so its distribution has no meaning here.
    """
    if config.teacher is None:
        return None
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.kernels.backend import resolve
    from shoal.trainer.export import load_model
    from shoal.trainer.objective import Teacher

    folder = Path(config.teacher.path)
    same_tokens = Tokenizer.load(folder).fingerprint == manifest.tokenizer_fingerprint
    model, shape = load_model(folder, resolve(config.kernels, device, dtype))
    if not same_tokens or shape.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the teacher's tokenizer is not the one of the shards (vocabularies of "
            f"{shape.vocab_size} and {config.model.vocab_size}): distillation compares two "
            "distributions over the same tokens, entry by entry",
            where=folder,
            fix="train the teacher on these shards, or prepare the corpus with the teacher's "
            "tokenizer (tokenizer.path=TEACHER)",
        )
    if shape.context < config.model.context:
        raise ConfigError(
            f"the teacher's context {shape.context} is shorter than {config.model.context}",
            where=folder,
        )
    return Teacher(model.to(device=device, dtype=dtype), config.teacher)


def _validation(config: RunConfig, corpus: Corpus, world: World) -> Validation | None:
    if corpus.validation is None:
        return None
    from shoal.data_pipeline.loader import validation_batches
    from shoal.data_pipeline.tokenizer import Tokenizer
    from shoal.trainer.loop import Validation

    batches, text_bytes = validation_batches(
        corpus.validation,
        max_rows=config.validation.max_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        rank=world.rank,
        num_ranks=world.num_ranks,
        document_mask=config.data.document_mask,
        token_bytes=Tokenizer.load(corpus.validation.tokenizer_folder).token_bytes,
    )
    return Validation(batches, text_bytes)


def _lock(folder: Path, world: World) -> Any:
    """Hold the run's lock on rank 0 for as long as the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    if world.rank == 0:
        for _ in range(10):  # ranks of a killed job may take a moment to go
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                time.sleep(WAIT_SECONDS)
        raise PreflightError(
            "another process is training this run",
            where=folder,
            fix="wait for it, stop it, or give this one another name=",
        )
    return file


def read_run(folder: Path) -> RunConfig:
    """Read the resolved config of a run folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError("not a run: it has no config.yaml", where=folder, fix="shoal runs")
    return build_config(RunConfig, read_tree(folder / CONFIG_FILE), where=folder / CONFIG_FILE)
