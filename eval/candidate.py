"""Candidates: any causal language model in a Hugging Face folder on disk, as eval sees it.

Models and tokenizers are loaded by `trainer.export`, a door to `transformers`. Weights come from
safetensors only; folders that hold pickles instead, or ask for code of their own, are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import ConfigError, DataError
from shoal.trainer.cost import BYTES_PER_VALUE
from shoal.trainer.storage import digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_PRECISIONS = ("fp32", "bf16")
"""Those that models can be run at; budgets may be computed for others."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class ShapeFacts:
    """What a built model weighs and computes, measured on the model itself."""

    total: int
    """Parameters, shared ones once."""
    active: int
    """Parameters one token uses: of expert tensors only the chosen share."""
    embedding: int
    """Parameters that are looked up: token and learned position embeddings."""
    context: int
    """Tokens in context at which FLOPs were counted."""
    flops_per_token: float
    """FLOPs of one forward pass over `context` tokens, divided by `context`."""
    kv_values_per_token: int
    """Numbers the cache holds for one token."""

    def resident_bytes(self, precision: str) -> float:
        """Bytes of all weights at a precision."""
        return float(self.total * BYTES_PER_VALUE[precision])

    def kv_bytes_per_token(self, precision: str) -> float:
        """Bytes of cache one token adds at a precision."""
        return float(self.kv_values_per_token * BYTES_PER_VALUE[precision])


class Candidate:
    """A finished model: folder, tokenizer, context, and the built model on demand."""

    def __init__(self, folder: Path, name: str, kind: str, config: dict[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.kind = kind
        self.config = config
        self._models: dict[tuple[str, str], PreTrainedModel] = {}
        self._facts: dict[int, ShapeFacts] = {}

    @classmethod
    def open(
        cls, folder: str | Path, name: str | None = None, kind: str | None = None
    ) -> Candidate:
        """Check a folder and open it; weights are read when first needed.

        Raises:
            DataError: not a model folder, weights missing or pickled, or custom code wanted.
        """
        folder = Path(folder)
        config = _read_config(folder)
        _check_weights(folder)
        found = "moe" if _count_experts(config) else "dense"
        return cls(folder, name or folder.name, kind or found, config)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over configuration, weights and tokenizer: what determines every score."""
        from shoal.trainer.export import TOKENIZER_FILES

        total = hashlib.sha256()
        names = {"config.json", "vocab.json", "merges.txt", *TOKENIZER_FILES}
        files = [f for f in self.folder.iterdir() if f.name in names or f.suffix == ".safetensors"]
        for file in sorted(files):
            total.update(f"{file.name}\0{digest(file)}\n".encode())
        return total.hexdigest()

    @cached_property
    def context(self) -> int:
        """Longest input in tokens."""
        for key in ("max_position_embeddings", "n_positions"):
            if self.config.get(key):
                return int(self.config[key])
        raise DataError(
            "config.json names no context length (max_position_embeddings)", where=self.folder
        )

    def check_context(self, context: int) -> None:
        """Refuse more tokens than the model can take.

        Raises:
            ConfigError: `context` is longer than the model's own.
        """
        if context > self.context:
            raise ConfigError(
                f"a context of {context} tokens is longer than the model's {self.context}",
                where=self.name,
                fix="lower the context of the budget or of the tasks",
            )

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        return int(self.config["vocab_size"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer stored with the model."""
        from shoal.trainer.export import open_tokenizer

        loaded = open_tokenizer(self.folder)
        if len(loaded) > self.vocab_size:
            raise DataError(
                f"the tokenizer has {len(loaded)} entries, the model only {self.vocab_size}",
                where=self.folder,
                fix="this tokenizer belongs to another model",
            )
        return loaded

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's vocabulary: equal where perplexities may be compared."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    @cached_property
    def start_id(self) -> int:
        """Token that every document starts with: BOS, or else end of text."""
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        raise DataError("the tokenizer names neither BOS nor EOS token", where=self.folder)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts; text that looks like a special token stays text."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def rounded_model(self, precision: str) -> PreTrainedModel:
        """Return the model with weights rounded to `precision`, computing in fp32.

        What a byte budget limits is how weights are stored; computing in fp32 keeps scores the
        same on every machine.
        """
        return self._load(precision, "scoring")

    def model(self, dtype: str) -> PreTrainedModel:
        """Return the model as a user would run it: weights and arithmetic in `dtype`."""
        return self._load(dtype, "native")

    def release(self) -> None:
        """Let go of built models."""
        self._models.clear()

    def _load(self, precision: str, purpose: str) -> PreTrainedModel:
        import torch

        if precision not in RUN_PRECISIONS:
            raise ConfigError(
                f"models cannot be run at {precision} yet",
                where=self.name,
                fix=" or ".join(RUN_PRECISIONS),
            )
        if (precision, purpose) not in self._models:
            native = purpose == "native" and precision == "bf16"
            model = self._build(
                torch.bfloat16 if native else torch.float32,
                # The flop counter and exact sums want plain matrix products for every expert.
                None if purpose == "native" else "eager",
            )
            if precision == "bf16" and not native:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(parameter.to(torch.bfloat16))
            self._models[precision, purpose] = model
        return self._models[precision, purpose]

    def _build(self, dtype: torch.dtype, experts: str | None) -> PreTrainedModel:
        import torch

        from shoal.trainer.export import open_pretrained

        has_choice = experts and _count_experts(self.config)
        options = {"experts_implementation": experts} if has_choice else {}
        model = open_pretrained(self.folder, dtype, **options)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]

    def shape_facts(self, context: int) -> ShapeFacts:
        """Count parameters, FLOPs per token at `context`, and cache size on the built model.

        Raises:
            ConfigError: `context` is longer than the model's own.
        """
        self.check_context(context)
        if context not in self._facts:
            self._facts[context] = self._measure(context)
        return self._facts[context]

    def _measure(self, context: int) -> ShapeFacts:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        model = self.rounded_model("fp32")
        ids = torch.arange(context, device=model.device).remainder(self.vocab_size)[None]
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            output = model(input_ids=ids, use_cache=True)
        layers = output.past_key_values.layers
        cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        total = sum(parameter.numel() for parameter in model.parameters())
        return ShapeFacts(
            total=total,
            active=total - self._idle_parameters(model),
            embedding=_looked_up(model),
            context=context,
            flops_per_token=counter.get_total_flops() / context,
            kv_values_per_token=math.ceil(cached / context),
        )

    def _idle_parameters(self, model: PreTrainedModel) -> int:
        """Parameters of the experts a token is not sent to."""
        count = _count_experts(self.config)
        if not count:
            return 0
        chosen = int(self.config["num_experts_per_tok"])
        held = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if ".experts." in name and (parameter.dim() == 2 or parameter.shape[0] == count)
        )
        return held * (count - chosen) // count


def _count_experts(config: dict[str, Any]) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _looked_up(model: PreTrainedModel) -> int:
    """Parameters of the embeddings, a tied head among them."""
    import torch

    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return sum({id(table): table.numel() for table in tables}.values())


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise DataError(
            "not a model folder: it has no config.json", where=folder, fix="shoal export RUN OUT"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not readable as JSON: {error}", where=file) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise DataError("not a transformers configuration: no model_type", where=file)
    if config.get("auto_map"):
        raise DataError(
            "the model asks to run code of its own (auto_map), which is never done",
            where=file,
            fix="use a model that transformers itself holds",
        )
    return config


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"weights are pickled ({pickled[0]}), and pickles run code when they are read",
            where=folder,
            fix="save the model as safetensors",
        )
    raise DataError("no weights: there is no .safetensors file", where=folder)
