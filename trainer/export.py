"""Models leave and enter as Hugging Face folders: a door to `transformers`, with a gate.

A folder is written aside, loaded again by plain `transformers`, compared with the model it came
from, and only then renamed into place. No pickle is read and no code of a folder is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from shoal.configs.errors import ConfigError, DataError, ShoalError
from shoal.configs.load import first_problem
from shoal.configs.schema import ModelConfig
from shoal.kernels.backend import Kernels
from shoal.trainer.card import render_card
from shoal.trainer.formats import export_config, export_tensors, import_config, import_tensors
from shoal.trainer.model import Transformer
from shoal.trainer.storage import digest, open_aside, sync

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTS = "shoal.json"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LARGEST_DIFFERENCE = 1e-4
"""Between logits in fp32; two orders of summation differ by about 1e-6 to 1e-5."""
GENERATED_TOKENS = 16
TIE = 1e-3
"""A greedy choice may differ from ours where the two best logits are this close."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class GateError(ShoalError):
    """What was written does not compute what the model computes; nothing was exported."""


@dataclass(frozen=True)
class ExportReport:
    """What the gate found; stored in the export as part of shoal.json."""

    export_class: str
    dtype: str
    max_logit_difference: float
    compared_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class TokenizerProof:
    """What the exported tokenizer must reproduce."""

    folder: Path
    text: str
    ids: Sequence[int]


def export_model(
    model: Transformer,
    config: ModelConfig,
    tokenizer: TokenizerProof,
    out: Path,
    *,
    sample_ids: Sequence[Sequence[int]],
    facts: Mapping[str, Any],
    dtype: str,
    eot_id: int,
) -> ExportReport:
    """Write `model` as a Hugging Face folder, proven equal before it exists.

    Args:
        model: The trained model, fp32 on the CPU.
        config: Its shape.
        tokenizer: Folder of its tokenizer, and a text with the ids it must give.
        out: Folder to make; must not exist.
        sample_ids: Rows of real text, equally long, on which logits are compared.
        facts: What the card and shoal.json say: name, run, step, tokens, validation, provenance.
        dtype: fp32 or bf16: precision of the stored weights.
        eot_id: Id that ends a document.

    Raises:
        ConfigError: `out` exists.
        GateError: what was written does not agree with the model; nothing is left behind.
    """
    if out.exists():
        raise ConfigError("exists already", where=out, fix="choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = open_aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _write(model, config, tokenizer.folder, aside, dtype, eot_id)
        report = _pass_gate(model, aside, out, tokenizer, sample_ids, dtype)
        _describe(aside, config, report, facts)
        _publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _write(
    model: Transformer, config: ModelConfig, tokenizer: Path, folder: Path, dtype: str, eot_id: int
) -> None:
    from safetensors.torch import save_file

    tensors = export_tensors(config, model.state_dict())
    stored = {name: value.to(DTYPES[dtype]) for name, value in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", export_config(config, eot_id=eot_id, dtype=dtype))
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    _write_json(folder / "generation_config.json", generation)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def _describe(
    folder: Path, config: ModelConfig, report: ExportReport, facts: Mapping[str, Any]
) -> None:
    """Add what an export says of itself: hashes of what is there, and a card."""
    files = {
        file.name: digest(file)
        for file in sorted(folder.iterdir())
        if file.name != "generation_config.json"  # habits of sampling; no score depends on it
    }
    _write_json(folder / FACTS, {"export": asdict(report), "files": files, **facts})
    card = render_card(config, asdict(report), facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(file: Path, tree: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(aside: Path, out: Path) -> None:
    for path in (*aside.iterdir(), aside):
        sync(path)
    try:
        aside.rename(out)
    except OSError:
        if not out.exists():
            raise
        raise ConfigError(
            "appeared while the export was being written",
            where=out,
            fix="choose another folder, or remove it",
        ) from None
    sync(out.parent)


@torch.no_grad()
def _pass_gate(
    model: Transformer,
    folder: Path,
    out: Path,
    tokenizer: TokenizerProof,
    sample_ids: Sequence[Sequence[int]],
    dtype: str,
) -> ExportReport:
    """Load what was written to `folder` for `out`, and hold it against the model it came from."""
    theirs = open_pretrained(folder, torch.float32)
    ours = _rounded(model, dtype)
    rows = torch.tensor(sample_ids)  # (rows, context)
    difference = float((theirs(rows).logits - ours(rows)).abs().max())
    if not difference < LARGEST_DIFFERENCE:  # not >=: NaN must fail too
        raise _gate_error(
            f"logits of what was written differ from the model's by {difference:.3g}, more than "
            f"{LARGEST_DIFFERENCE:g}",
            out,
        )
    generated = _check_generation(theirs, ours, rows[:1], out)
    _check_tokenizer(open_tokenizer(folder), tokenizer, out)
    return ExportReport(model.config.export_class, dtype, difference, rows.numel(), generated)


def _rounded(model: Transformer, dtype: str) -> Callable[[Tensor], Tensor]:
    """Return the model's logits with weights as stored: rounded to `dtype`, computed in fp32."""
    state = {name: value.to(DTYPES[dtype]).float() for name, value in model.state_dict().items()}
    training = model.training

    def logits(ids: Tensor) -> Tensor:
        model.eval()
        try:
            hidden = torch.func.functional_call(model, state, (ids,)).states
        finally:
            model.train(training)
        head = state["embedding.weight"] if model.head is None else state["head"]
        return torch.nn.functional.linear(hidden, head)

    return logits


def _check_generation(
    theirs: PreTrainedModel, ours: Callable[[Tensor], Tensor], row: Tensor, out: Path
) -> int:
    """Let the export continue a text greedily; each token must be the best by our own logits.

    Theirs goes through the key-value cache, ours computes every prefix afresh.
    """
    prompt = row[:, : max(1, row.shape[1] // 2)]
    count = min(GENERATED_TOKENS, row.shape[1] - prompt.shape[1])
    longer: Tensor = theirs.generate(  # type: ignore[operator]
        prompt, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    logits = ours(longer)[0]
    for place in range(prompt.shape[1], longer.shape[1]):
        scores = logits[place - 1]
        if float(scores.max() - scores[longer[0, place]]) > TIE:
            raise _gate_error(f"greedy generation leaves the model's own at token {place}", out)
    return longer.shape[1] - prompt.shape[1]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, proof: TokenizerProof, out: Path) -> None:
    """Encode and decode a text of the corpus as the shards' tokenizer does."""
    ids = tokenizer(proof.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if list(ids) != list(proof.ids) or tokenizer.decode(ids) != proof.text:
        raise _gate_error(
            f"the exported tokenizer does not reproduce the ids of {proof.folder}", out
        )


def _gate_error(cause: str, out: Path) -> GateError:
    return GateError(
        f"{cause}; nothing was exported",
        where=out,
        fix="this is a bug: please report the run's config.yaml",
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return shoal.json of an export of ours; nothing for other models.

    Raises:
        DataError: it is there and cannot be read.
    """
    file = folder / FACTS
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot be read: {error}", where=file) from None


def verify_export(folder: Path) -> dict[str, Any]:
    """Hold an export of ours against the hashes in its shoal.json; return that file's content.

    Models of others have no such file, and pass.

    Raises:
        DataError: a file is missing or altered, named.
    """
    facts = read_facts(folder)
    for name, expected in (facts.get("files") or {}).items():
        if not (folder / name).is_file():
            raise DataError("is missing from the export", where=folder / name)
        if digest(folder / name) != expected:
            raise DataError(
                "is not what was exported: its SHA-256 differs from the one in shoal.json",
                where=folder / name,
                fix="export it again; if you changed it on purpose, remove shoal.json",
            )
    return facts


def open_pretrained(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder on disk, every tensor accounted for.

    Raises:
        DataError: it does not load, its tensors are not those its config.json asks for, or it is an
            export of ours that was altered.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verify_export(folder)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        built: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (
        OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise DataError(f"model does not load: {error}", where=folder) from None
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model, report = built
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise DataError(
            f"weights do not fit config.json: {len(wrong)} tensors differ, first {wrong[0]}",
            where=folder,
        )
    return model.eval()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored with a model.

    Raises:
        DataError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tokenizer does not load: {error}", where=folder) from None


def read_shape(folder: Path) -> ModelConfig:
    """Read config.json of a Hugging Face folder, ours or another's, as a shape of ours.

    Raises:
        DataError: it does not load, or the model computes something ours cannot.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        settled = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise DataError(f"config.json does not load: {error}", where=folder) from None
    try:
        return import_config(settled.to_dict())
    except DataError as error:
        raise DataError(error.cause, where=error.where or folder, fix=error.fix) from None
    except ValidationError as error:  # a shape that transformers would take
        raise DataError(f"no model of ours: {first_problem(error)}", where=folder) from None


def load_model(folder: Path, kernels: Kernels) -> tuple[Transformer, ModelConfig]:
    """Read a Hugging Face folder, ours or another's, as one of our models in fp32.

    Raises:
        DataError: weights are not safetensors, a tensor is missing or spare, the model computes
            something ours cannot, or it is an export of ours that was altered.
    """
    verify_export(folder)
    config = read_shape(folder)
    model = Transformer(config, kernels)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    try:
        state = import_tensors(config, _read_tensors(folder), shapes)
    except DataError as error:
        raise DataError(error.cause, where=error.where or folder, fix=error.fix) from None
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model, config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError("no weights: there is no .safetensors file", where=folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise DataError(f"cannot be read: {error}", where=file) from None
    return tensors
