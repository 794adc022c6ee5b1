"""Everything a YAML file may say about a run: frozen, strict, with units in the names.

One class a section. Unknown keys are refused (`load.py` names the nearest known one). Checks here
need only the values themselves; whatever needs files or devices is checked where those are opened.
What a run reads is in `data.py`, corpora are in `corpus.py`, studies in `study.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from shoal.configs.data import DataConfig, Stream
from shoal.configs.errors import ConfigError
from shoal.configs.section import Count, Section, Share, ShareBelowOne

__all__ = ["Count", "DataConfig", "RunConfig", "Section", "Share", "ShareBelowOne", "Stream"]

EXPERT_MULTIPLE = 8


class MoEConfig(Section):
    """Mixture-of-experts feed-forward, in every layer, dropless."""

    num_experts: Count
    active_experts: Count = Field(2, description="experts a token is sent to (top-k)")
    hidden: Count | None = Field(None, description="hidden width of one expert")
    normalize_gates: bool = Field(True, description="gates of the chosen experts sum to one")
    balance_weight: float = Field(0.01, ge=0, description="weight of the load-balance loss")
    z_weight: float = Field(0.001, ge=0, description="weight of the router z-loss")

    @model_validator(mode="after")
    def _active_fits(self) -> MoEConfig:
        if self.active_experts > self.num_experts:
            raise ValueError(
                f"active_experts {self.active_experts} is more than num_experts {self.num_experts}"
            )
        return self


class ModelConfig(Section):
    """Shape of a GPT-2 or Llama family model; any shape accepted here can be exported."""

    family: Literal["gpt2", "llama"] = "llama"
    vocab_size: Count | None = Field(None, description="None: the tokenizer's, rounded up")
    vocab_multiple: Count = Field(64, description="vocab_size is rounded up to a multiple of this")
    context: Count = Field(1024, description="longest row in tokens")
    num_layers: Count = 12
    width: Count = 768
    num_heads: Count = 12
    num_kv_heads: Count | None = Field(None, description="None: as many as num_heads")
    head_dim: Count | None = Field(None, description="None: width / num_heads")
    hidden: Count | None = Field(
        None, description="feed-forward width; None: 4 x width (gpt2), 8/3 x width (llama)"
    )
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys (exports as Qwen3)")
    tie_embeddings: bool = True
    dropout: ShareBelowOne = 0.0
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)
    output_gain: float = Field(
        1.0,
        gt=0,
        description="start of the final norm's gain: narrow models trained for few steps leave the "
        "unigram plateau sooner, and two seeds end closer, with about 8",
    )
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _exportable(self) -> ModelConfig:
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; set head_dim"
            )
        if self.family == "gpt2":
            self._check_gpt2()
        elif self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} is odd; rotary positions need pairs")
        if self.moe and (self.width % EXPERT_MULTIPLE or self.feed_forward % EXPERT_MULTIPLE):
            raise ValueError(
                f"width {self.width} and expert width {self.feed_forward} must be multiples of "
                f"{EXPERT_MULTIPLE}: transformers runs experts through grouped_mm, which asks for "
                "rows of whole 16 bytes, in bf16 too"
            )
        if self.moe and not self.qk_norm and not self.moe.normalize_gates:
            raise ValueError(
                "moe.normalize_gates=false needs qk_norm=true: Mixtral always normalises its "
                "gates, Qwen3-MoE need not"
            )
        return self

    def _check_gpt2(self) -> None:
        """GPT2LMHeadModel holds square attention, full heads, learned positions, dense layers."""
        if self.moe:
            raise ValueError("family gpt2 has no exportable mixture of experts; use family llama")
        if self.qk_norm:
            raise ValueError("family gpt2 cannot hold qk_norm; use family llama")
        if self.kv_heads != self.num_heads or self.head_size * self.num_heads != self.width:
            raise ValueError(
                "family gpt2 needs num_kv_heads = num_heads and head_dim x heads = width"
            )

    def with_vocab(self, entries: int) -> ModelConfig:
        """Return the model for a tokenizer of `entries`: its own vocabulary, or the next multiple.

        Raises:
            ConfigError: the vocabulary that is given is too small.
        """
        size = self.vocab_size or -(-entries // self.vocab_multiple) * self.vocab_multiple
        if size < entries:
            raise ConfigError(
                f"vocab_size {size} is smaller than the tokenizer's {entries}",
                where="model.vocab_size",
                fix="leave it out: it is taken from the shards",
            )
        return self.model_copy(update={"vocab_size": size})

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def feed_forward(self) -> int:
        """Hidden width of the dense feed-forward, or of one expert."""
        given = self.moe.hidden if self.moe else self.hidden
        if given:
            return given
        if self.hidden:
            return self.hidden
        return 4 * self.width if self.family == "gpt2" else -(-8 * self.width // (3 * 64)) * 64

    @property
    def export_class(self) -> str:
        """The `transformers` class that holds this model without custom code."""
        if self.family == "gpt2":
            return "GPT2LMHeadModel"
        if self.moe:
            return "Qwen3MoeForCausalLM" if self.qk_norm else "MixtralForCausalLM"
        return "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"


class KernelConfig(Section):
    """Which implementation computes what; only `auto` may choose, and the choice is recorded."""

    attention: Literal["auto", "reference", "sdpa"] = "auto"
    experts: Literal["auto", "loop", "grouped_mm"] = "auto"
    loss_chunk_tokens: Count = Field(2048, description="tokens whose logits exist at one time")


class TeacherConfig(Section):
    """Distillation: match a frozen teacher's distribution (Hinton et al. 2015, section 2)."""

    path: str = Field(description="folder of a Shoal export or Hugging Face checkpoint")
    temperature: float = Field(1.0, gt=0)
    weight: Share = Field(0.5, description="share of the teacher's term in the loss")


class OptimConfig(Section):
    """AdamW and its schedule, a pure function of the step."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    min_lr_share: Share = Field(0.1, description="last rate as a share of the peak")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_share: Share = Field(0.02, description="share of the steps spent warming up")
    decay_share: Share = Field(0.2, description="share of the steps in the final decay (wsd)")
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="0: no clipping")


class TrainConfig(Section):
    """How long, in what portions, at which precision and sharding."""

    tokens: Count = Field(description="training tokens, rounded up to whole steps")
    batch_rows: Count = Field(32, description="rows in one optimiser step, over all ranks")
    micro_batch_rows: Count = Field(8, description="rows in one forward pass of one rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile every block")
    spike_limit: float = Field(
        0,
        ge=0,
        description="leave out steps whose loss or gradient norm lies so many robust standard "
        "deviations above the last 128; 0: only what is no number",
    )
    max_skipped_steps: int = Field(
        5, ge=0, description="left out in a row before the run goes back to its newest checkpoint"
    )

    @model_validator(mode="after")
    def _stage_fits(self) -> TrainConfig:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 with bf16 is refused: DeepSpeed takes a phantom optimiser step at "
                "start-up there; use zero_stage 1 (what auto chooses) or precision fp32"
            )
        return self


class CheckpointConfig(Section):
    """When state is saved, and how much of it is kept."""

    every_steps: Count = 200
    keep: Count = Field(2, description="newest checkpoints kept")
    folder: str | None = Field(
        None,
        description="object storage, such as s3://bucket/prefix; None: the run's folder",
        pattern=r"^[a-z0-9+.-]+://.+",
    )
    copies: Literal["shared", "first", "every"] = Field(
        "shared",
        description="shared: all hosts see the run's folder; else each has a disk of its own, and "
        "the first, or every one of them, gets the whole checkpoint",
    )
    milestone_every: Count | None = Field(
        None, description="those of every so many steps are kept for good"
    )
    keep_best: bool = Field(
        False,
        description="keep the one with the lowest validation loss as well; each is then validated",
    )
    resume: str = Field(
        "auto",
        description="auto: go on from the newest of this run; never: refuse to if there is one; "
        "PATH: of another run, or one checkpoint of it, where this run has none yet",
    )
    compare_every: Count = Field(
        100,
        description="steps between two comparisons of what every rank must hold alike; after "
        "every checkpoint there is one, too, and without it there is no checkpoint",
    )
    allow_changes: tuple[str, ...] = Field(
        (),
        description="keys that may differ from the checkpoint's, for example optim.lr; and streams "
        "(the shards, and how much of each), order (in which rows come: schedule, blocks, samples, "
        "with repeat or choose also the length of the run), teacher",
    )

    @model_validator(mode="after")
    def _one_place(self) -> CheckpointConfig:
        if self.folder and self.copies != "shared":
            raise ValueError(f"folder {self.folder} is one place for all hosts; leave copies out")
        return self

    @model_validator(mode="after")
    def _milestones_are_saved(self) -> CheckpointConfig:
        if self.milestone_every and self.milestone_every % self.every_steps:
            raise ValueError(
                f"milestone_every {self.milestone_every} is not a multiple of every_steps "
                f"{self.every_steps}: there is no checkpoint of those steps"
            )
        return self


class ValidationConfig(Section):
    """Loss and bits per byte on the validation shards during training."""

    every_steps: Count = 100
    max_rows: Count = Field(512, description="rows scored, taken evenly over the split")


class WorldConfig(Section):
    """Processes on this machine when no hostfile or launcher says how many."""

    ranks: Literal["auto"] | Count = Field(
        "auto", description="auto: one a GPU, or 2 CPU ranks where there is none"
    )
    threads: Literal["auto"] | Count = Field("auto", description="CPU threads of one rank")
    timeout_seconds: Count = Field(
        600, description="without progress for so long, a rank counts as hanging"
    )
    start_seconds: Count = Field(
        180, description="what the ranks of all hosts may take to find each other, once all run"
    )
    launcher: Literal["ssh", "pdsh", "slurm", "none"] = Field(
        "ssh",
        description="what starts the ranks of other hosts; none: the commands are shown, to be "
        "typed there",
    )
    max_restarts: int = Field(3, ge=0, description="new attempts after ranks or hosts were lost")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="the command saves and stops in time to be over after so long, "
        "all its attempts together"
    )  # fmt: skip
    min_hosts: Count = Field(1, description="with fewer hosts of the hostfile left, give up")
    save_seconds: Count = Field(
        20,
        description="what ranks get to save in when a host or the launcher was lost, and may take "
        "without progress once they are to stop",
    )

    @model_validator(mode="after")
    def _leaves_time_to_train(self) -> WorldConfig:
        if self.time_limit_minutes and self.time_limit_minutes * 60 <= self.save_seconds:
            raise ValueError(
                f"time_limit_minutes {self.time_limit_minutes:g} leaves nothing beside the "
                f"save_seconds {self.save_seconds}"
            )
        return self


class LedgerConfig(Section):
    """How a run's cost is booked."""

    kind: Literal["train", "tune"] = "train"
    scope: Literal["generic", "specialization"] = Field(
        "specialization", description="generic: paid once for all domains"
    )


class RunConfig(Section):
    """One training: model, data, objective, optimiser, sharding. Resumable by its name."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field("runs", description="the run's folder is output/name")
    seed: int = Field(0, ge=0, lt=2**31)
    prepare: str | None = Field(None, description="corpus config prepared first if absent")
    model: ModelConfig = ModelConfig()
    data: DataConfig
    teacher: TeacherConfig | None = None
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    kernels: KernelConfig = KernelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    world: WorldConfig = WorldConfig()
    ledger: LedgerConfig = LedgerConfig()

    @model_validator(mode="after")
    def _best_is_measured(self) -> RunConfig:
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best needs data.validation to choose by")
        return self

    def determinants(self) -> dict[str, Any]:
        """Return what decides the result, `section.key` -> plain value.

        Two runs that agree in these and read the same rows end in the same weights, but for the
        order of floating-point sums; the rest says where, when and how fast.
        """
        tree = self.model_dump(mode="json")
        free_in_train = {"zero_stage", "activation_checkpointing", "compile"}
        if not (self.model.moe or self.model.dropout):  # these look at whole micro-batches
            free_in_train.add("micro_batch_rows")
        found = {"seed": self.seed, "data.document_mask": self.data.document_mask}
        for section in ("model", "teacher", "optim", "train"):
            for key, value in (tree[section] or {}).items():
                if not (section == "train" and key in free_in_train):
                    found[f"{section}.{key}"] = value
        return found

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimiser step."""
        return self.train.batch_rows * self.model.context

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.train.tokens // self.step_tokens)
