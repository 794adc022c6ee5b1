"""The composition root of a run: parts are built here in order, and handed to the loop.

Each function is one command's worth of work; everything heavy is imported when it is needed.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError, NonFiniteLossError, PreflightError
from shoal.configs.load import dump_config
from shoal.configs.schema import RunConfig
from shoal.launcher.corpus import Corpus, open_corpus, wait_for_corpus
from shoal.launcher.lock import hold_lock
from shoal.launcher.runs import CONFIG_FILE, DIVERGED, run_folder
from shoal.trainer.storage import write_text

if TYPE_CHECKING:
    import torch

    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.shards import Manifest
    from shoal.launcher.world import World
    from shoal.trainer.objective import Objective, Teacher
    from shoal.trainer.segment import RunFacts, Validation

TIMEOUT_MARGIN = 60


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
    # Later than the watchdog, which says more.
    with world.watchdog.meeting():
        start_process_group(device, configs[0].world.timeout_seconds + TIMEOUT_MARGIN)
    try:
        with world.watchdog:
            for config in configs:
                _train_one(config, world, device)
    finally:
        stop_process_group()


def _train_one(config: RunConfig, world: World, device: torch.device) -> None:
    from shoal.trainer.engine import Engine
    from shoal.trainer.loop import train as run_loop
    from shoal.trainer.teamwork import do_together

    folder = run_folder(config)
    lock = do_together(
        lambda tick: hold_lock(folder, world.rank, tick),
        "waiting for the lock of the run",
        world.watchdog.touch,
        device,
    )
    corpus = open_corpus(config)
    config, position = _settle(folder, config, corpus, world)
    objective = _build_objective(config, corpus, device)
    # Closed however it ends, or a thread goes on downloading for a run that is over.
    with closing(_build_loader(config, corpus, world)) as loader:
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
                _run_facts(config, world, objective, engine.stage, loader),
                validation=_validation(config, corpus, world),
                stop_requested=lambda: world.stop.requested,
                position=position,
                progress=world.watchdog.touch,
            )
        except NonFiniteLossError as error:
            if config.ledger.kind != "tune":
                raise
            if world.rank == 0:  # a rate that is too high is a result of a search, not its end
                write_text(folder / DIVERGED, str(error))
    engine.close()
    if lock:
        lock.close()


def _settle(
    folder: Path, config: RunConfig, corpus: Corpus, world: World
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the whole config and what a checkpoint remembers of its inputs; keep the former.

    Raises:
        ConfigError, DataError: ranks differ, or what there is was trained otherwise.
        PreflightError: a disk is too small.
    """
    from shoal.trainer.identity import check_same_on_ranks
    from shoal.trainer.teamwork import raise_together

    config = resolve_run(config, corpus.manifest)
    position = corpus.identity() | _teacher_identity(config)
    check_same_on_ranks(config, position)
    _check_resume(folder, config, position)
    # Ranks are numbered host by host: where both numbers agree is the first one.
    raise_together(find_short_disk(folder, config, is_first=world.rank == world.local_rank))
    if world.rank == 0:
        write_text(folder / CONFIG_FILE, dump_config(config))
    return config, position


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


def needed_bytes(folder: Path, config: RunConfig, *, is_first: bool = True) -> int:
    """Return what the checkpoints of a run will take on this host beyond what they take now.

    `is_first`: on the first host of the job, which may be the only one that keeps them.
    """
    from shoal.trainer.checkpoint import BYTES_PER_PARAMETER, checkpoint_step, list_checkpoints
    from shoal.trainer.cost import count_parameters

    rule = config.checkpoint
    done = list_checkpoints(folder / "checkpoints")
    written = sum(file.stat().st_size for checkpoint in done for file in checkpoint.glob("*"))
    left = config.steps - (checkpoint_step(done[-1].name) if done else 0)
    saves = -(-left // rule.every_steps)
    if saves <= 0:
        return 0
    milestones = config.steps // rule.milestone_every if rule.milestone_every else 0
    # The newest lies beside those kept until it is whole.
    most = min(rule.keep + milestones + rule.keep_best + 1, len(done) + saves)
    if rule.folder or (rule.copies == "first" and not is_first):
        # Only parts on their way, and the one that was gone on from.
        most = min(most, 2)
    return max(0, BYTES_PER_PARAMETER * count_parameters(config.model).total * most - written)


def find_short_disk(
    folder: Path, config: RunConfig, *, is_first: bool = True
) -> PreflightError | None:
    """Return what is wrong if the checkpoints of a run cannot fit where they go."""
    needed = needed_bytes(folder, config, is_first=is_first)
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return PreflightError(
        f"checkpoints need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
        f"{socket.gethostname()}",
        where=folder,
        fix="free some space, write elsewhere (output=FOLDER), or lower checkpoint.keep",
    )


def _check_resume(folder: Path, config: RunConfig, position: dict[str, Any]) -> None:
    """Refuse to go on with another config or other inputs before anything is built or written."""
    from shoal.trainer.checkpoint import list_candidates, read_manifest
    from shoal.trainer.identity import check_same_inputs, check_same_run

    for checkpoint in list_candidates(folder / "checkpoints", config.checkpoint.resume):
        try:
            manifest = read_manifest(checkpoint)
        except DataError:
            continue  # passed over with a warning when the newest whole one is looked for
        check_same_run(manifest.run, config, where=checkpoint)
        check_same_inputs(manifest.position, position, checkpoint, config.checkpoint.allow_changes)
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
    teacher = load_teacher(config, corpus.manifest, device, dtype)
    return Objective(model, teacher, num_streams=len(corpus.train))


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
        mixture=corpus.mixture(config),
        block_rows=config.data.shuffle_block_rows,
        read_ahead=config.data.read_ahead_steps,
        end_step=config.steps,
        orders=corpus.orders(config.seed),
    )


def _run_facts(
    config: RunConfig, world: World, objective: Objective, stage: int, loader: Loader
) -> RunFacts:
    from shoal.trainer.cost import training_flops_per_token
    from shoal.trainer.segment import RunFacts

    teacher = objective.teacher
    names = tuple(stream.label for stream in config.data.train)

    def count_rows(batches: int) -> dict[str, int]:
        return dict(zip(names, loader.count_rows(batches).tolist(), strict=True))

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
        streams=names,
        count_rows=count_rows,
    )


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
    from shoal.trainer.segment import Validation

    token_bytes = Tokenizer.load(corpus.validation.tokenizer_folder).token_bytes
    parts = []
    for name, rows in corpus.validations.items():
        batches, text_bytes = validation_batches(
            rows,
            max_rows=config.validation.max_rows,
            micro_batch_rows=config.train.micro_batch_rows,
            rank=world.rank,
            num_ranks=world.num_ranks,
            document_mask=config.data.document_mask,
            token_bytes=token_bytes,
        )
        parts.append(Validation(batches, text_bytes, name))
    return replace(parts[0], more=tuple(parts[1:]))
