"""How our models are written down for `transformers`: configuration keys and tensor names.

The five classes are GPT-2, Llama, Qwen3, Mixtral and Qwen3-MoE. Both directions use the same rules,
so whatever is written can be read back. Nothing here imports `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.configs.errors import DataError
from shoal.configs.schema import ModelConfig, MoEConfig

MODEL_TYPES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Values that change what a model computes and that ours has no place for: anything else is refused.
PLAIN = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "sliding_window": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0.0,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors it is on disk.

    Ours, seen as a matrix of rows, is cut into `rows` along its first axis, one piece a name. GPT-2
    keeps its matrices transposed.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Return their tensors, in memory of their own."""
        pieces = [value] if not self.rows else list(_as_rows(value).split(list(self.rows)))
        pieces = [piece.T if self.transposed else piece for piece in pieces]
        return {n: p.clone().contiguous() for n, p in zip(self.theirs, pieces, strict=True)}

    def join(self, pieces: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return ours from theirs.

        Raises:
            DataError: sizes that do not add up to `shape`.
        """
        values = [pieces[name].T if self.transposed else pieces[name] for name in self.theirs]
        given = [list(pieces[name].shape) for name in self.theirs]
        wanted = [[rows, *shape[-1:]] if len(shape) > 1 else [rows] for rows in self.rows]
        fits = [list(v.shape) for v in values] == (wanted or [list(shape)])
        if not fits:
            raise DataError(
                f"tensors {', '.join(self.theirs[:3])} have shapes {given[:3]}, "
                f"which do not make up {list(shape)}"
            )
        return torch.cat(values).reshape(shape)


def export_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate our state into the tensors of `config.export_class`."""
    tensors: dict[str, Tensor] = {}
    for rule in list_rules(config):
        tensors |= rule.split(state[rule.ours])
    return tensors


def import_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Translate tensors of `config.export_class` into our state.

    Args:
        config: The shape.
        tensors: What the files hold.
        shapes: Of our parameters, by name.

    Raises:
        DataError: tensors missing, left over, or of other shapes.
    """
    tensors = _clean_names(config, tensors)
    rules = list_rules(config)
    wanted = {name for rule in rules for name in rule.theirs}
    missing, spare = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or spare:
        problems = [
            f"{label} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("unknown", spare))
            if names
        ]
        raise DataError(f"not the tensors of {config.export_class}: {'; '.join(problems)}")
    return {rule.ours: rule.join(tensors, shapes[rule.ours]) for rule in rules}


def _clean_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what older versions stored beside the weights, and complete shortened names."""
    short = config.family == "gpt2" and "wte.weight" in tensors
    constants = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
    kept = {}
    for name, value in tensors.items():
        if name.endswith(constants) or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        kept[f"transformer.{name}" if short and name != "lm_head.weight" else name] = value
    return kept


def list_rules(config: ModelConfig) -> list[Rule]:
    """Return a rule for every parameter of `Transformer(config)`."""
    rules = [] if config.tie_embeddings else [Rule("head", ("lm_head.weight",))]
    if config.family == "gpt2":
        return [*rules, *_gpt2_rules(config)]
    rules += [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("final_norm.weight", ("model.norm.weight",)),
    ]
    for layer in range(config.num_layers):
        rules += _llama_layer(config, f"blocks.{layer}", f"model.layers.{layer}")
    return rules


def _gpt2_rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("embedding.weight", ("transformer.wte.weight",))
    yield Rule("positions.weight", ("transformer.wpe.weight",))
    norms = {"final_norm": "transformer.ln_f"}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        norms[f"{ours}.attention_norm"] = f"{theirs}.ln_1"
        norms[f"{ours}.feed_forward_norm"] = f"{theirs}.ln_2"
        matrices = {
            "attention.qkv": "attn.c_attn",
            "attention.output": "attn.c_proj",
            "feed_forward.up": "mlp.c_fc",
            "feed_forward.down": "mlp.c_proj",
        }
        for mine, name in matrices.items():
            yield Rule(f"{ours}.{mine}.weight", (f"{theirs}.{name}.weight",), transposed=True)
            yield Rule(f"{ours}.{mine}.bias", (f"{theirs}.{name}.bias",))
    for mine, name in norms.items():
        yield Rule(f"{mine}.weight", (f"{name}.weight",))
        yield Rule(f"{mine}.bias", (f"{name}.bias",))


def _llama_layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
    attention = f"{theirs}.self_attn"
    yield Rule(
        f"{ours}.attention.qkv.weight",
        tuple(f"{attention}.{name}_proj.weight" for name in "qkv"),
        (query, key, key),
    )
    yield Rule(f"{ours}.attention.output.weight", (f"{attention}.o_proj.weight",))
    if config.qk_norm:
        yield Rule(f"{ours}.attention.query_norm.weight", (f"{attention}.q_norm.weight",))
        yield Rule(f"{ours}.attention.key_norm.weight", (f"{attention}.k_norm.weight",))
    yield Rule(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
    yield Rule(f"{ours}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
    hidden, mlp = config.feed_forward, f"{theirs}.mlp"
    if config.moe:
        yield from _moe_layer(config, f"{ours}.feed_forward", theirs)
        return
    yield Rule(
        f"{ours}.feed_forward.gate_up.weight",
        (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        (hidden, hidden),
    )
    yield Rule(f"{ours}.feed_forward.down.weight", (f"{mlp}.down_proj.weight",))


def _moe_layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    assert config.moe is not None
    experts, hidden = config.moe.num_experts, config.feed_forward
    mixtral = config.export_class == "MixtralForCausalLM"
    mlp = f"{theirs}.{'block_sparse_moe' if mixtral else 'mlp'}"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield Rule(f"{ours}.router", (f"{mlp}.gate.weight",))
    yield Rule(
        f"{ours}.gate_up",
        tuple(f"{mlp}.experts.{e}.{name}.weight" for e in range(experts) for name in (gate, up)),
        (hidden,) * (2 * experts),
    )
    yield Rule(
        f"{ours}.down",
        tuple(f"{mlp}.experts.{e}.{down}.weight" for e in range(experts)),
        (config.width,) * experts,
    )


def _as_rows(value: Tensor) -> Tensor:
    return value if value.ndim == 1 else value.reshape(-1, value.shape[-1])


def export_config(config: ModelConfig, *, eot_id: int, dtype: str) -> dict[str, Any]:
    """Return the content of config.json; `dtype` is fp32 or bf16."""
    common = {
        "architectures": [config.export_class],
        "model_type": MODEL_TYPES[config.export_class],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "use_cache": True,
    }
    return common | (_gpt2_config(config) if config.family == "gpt2" else _llama_config(config))


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.feed_forward,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,  # ours drops nothing there
    }


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    tree = {
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # The first is read by transformers 4 and most servers, the second by transformers 5.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
    }
    if config.moe is None:
        return tree | {"mlp_bias": False}
    tree |= {
        "num_experts_per_tok": config.moe.active_experts,
        "router_aux_loss_coef": config.moe.balance_weight,
        "output_router_logits": False,
    }
    if not config.qk_norm:
        return tree | {"num_local_experts": config.moe.num_experts}
    return tree | {
        "num_experts": config.moe.num_experts,
        "moe_intermediate_size": config.feed_forward,
        "norm_topk_prob": config.moe.normalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def import_config(tree: Mapping[str, Any]) -> ModelConfig:
    """Read a complete `transformers` configuration (defaults filled in) as ours.

    Raises:
        DataError: another class, or something our models do not compute.
    """
    kinds = {model_type: name for name, model_type in MODEL_TYPES.items()}
    kind = kinds.get(str(tree.get("model_type")))
    if kind is None:
        raise DataError(
            f"model_type {tree.get('model_type')!r} is none of {', '.join(MODEL_TYPES.values())}"
        )
    for key, allowed in PLAIN.items():
        if key in tree and tree[key] not in allowed:
            raise DataError(f"{key} = {tree[key]!r} is not supported; only {allowed[0]!r}")
    common = {
        "vocab_size": tree["vocab_size"],
        "tie_embeddings": tree["tie_word_embeddings"],
        "init_std": tree["initializer_range"],
    }
    if kind == "GPT2LMHeadModel":
        return ModelConfig(
            family="gpt2",
            context=tree["n_positions"],
            width=tree["n_embd"],
            num_layers=tree["n_layer"],
            num_heads=tree["n_head"],
            hidden=tree["n_inner"] or 4 * tree["n_embd"],
            norm_eps=tree["layer_norm_epsilon"],
            dropout=tree["resid_pdrop"],
            **common,
        )
    return _import_llama(kind, tree, common)


def _import_llama(kind: str, tree: Mapping[str, Any], common: dict[str, Any]) -> ModelConfig:
    rope = tree["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise DataError(f"rope_type {rope['rope_type']!r} is not supported; only 'default'")
    if set(tree.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise DataError("layers with windowed or linear attention are not supported")
    moe = None
    if kind in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        qwen = kind == "Qwen3MoeForCausalLM"
        moe = MoEConfig(
            num_experts=tree.get("num_local_experts") or tree["num_experts"],
            active_experts=tree["num_experts_per_tok"],
            hidden=tree["moe_intermediate_size"] if qwen else tree["intermediate_size"],
            normalize_gates=tree["norm_topk_prob"] if qwen else True,
            balance_weight=tree["router_aux_loss_coef"],
        )
    return ModelConfig(
        family="llama",
        context=tree["max_position_embeddings"],
        width=tree["hidden_size"],
        num_layers=tree["num_hidden_layers"],
        num_heads=tree["num_attention_heads"],
        num_kv_heads=tree["num_key_value_heads"],
        head_dim=tree.get("head_dim"),
        hidden=None if moe else tree["intermediate_size"],
        qk_norm=kind.startswith("Qwen3"),
        rope_theta=rope["rope_theta"],
        norm_eps=tree["rms_norm_eps"],
        moe=moe,
        **common,
    )
