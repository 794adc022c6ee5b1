"""What trains in the speed benchmarks: the engine, a plain loop, and a `transformers` model.

All take steps on the same batches, and remember their losses, which have to agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.claims import time_call
from shoal.configs.schema import KernelConfig, ModelConfig, OptimConfig, TrainConfig
from shoal.data_pipeline.batch import Batch
from shoal.kernels.backend import Kernels, resolve
from shoal.trainer.engine import Engine
from shoal.trainer.formats import export_config, export_tensors
from shoal.trainer.model import Transformer
from shoal.trainer.objective import Objective
from shoal.trainer.optim import group_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIM = OptimConfig(lr=3e-4, schedule="constant", warmup_share=0.0)


def build_objective(config: ModelConfig, precision: str, device: torch.device) -> Objective:
    """Return the model with its loss in fp32, with the kernels that `precision` would get."""
    kernels = choose_kernels(precision, device)
    model = Transformer(config, kernels)
    model.initialize(seed=0)
    return Objective(model)


def choose_kernels(precision: str, device: torch.device) -> Kernels:
    """Return what `auto` chooses."""
    return resolve(KernelConfig(), device, DTYPES[precision])


class Contestant:
    """Something that trains on a cycle of batches."""

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self.batches = [batch.to(device) for batch in batches]
        self.tokens = [batch.real_tokens for batch in batches]
        self.device = device
        self.losses: list[float] = []

    def step(self) -> float:
        """Train on the next batch; return the seconds until the device is done."""
        number = len(self.losses) % len(self.batches)

        def work() -> None:
            self.losses.append(self._train(self.batches[number], self.tokens[number]))
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return time_call(work)

    def rate(self) -> float:
        """Train on the next batch; return the tokens per second."""
        tokens = self.batches[0].inputs.numel()
        return tokens / self.step()

    def _train(self, batch: Batch, tokens: int) -> float:
        raise NotImplementedError


class EngineLoop(Contestant):
    """Our engine at stage 1, of one rank."""

    def __init__(
        self, objective: Objective, precision: str, batches: Sequence[Batch], device: torch.device
    ) -> None:
        super().__init__(batches, device)
        rows = batches[0].inputs.shape[0]
        train = TrainConfig.model_validate(
            {
                "tokens": 1,
                "batch_rows": rows,
                "micro_batch_rows": rows,
                "precision": precision,
                "zero_stage": 1,
            }
        )
        self.engine = Engine(objective, OPTIM, train, accumulation=1, device=device)

    def _train(self, batch: Batch, tokens: int) -> float:
        result = self.engine.train_step([batch], OPTIM.lr, tokens)
        return result.sums.cross_entropy / result.tokens


class PlainLoop(Contestant):
    """The loop anyone would write: fused AdamW, clipping; in bf16 with fp32 master weights."""

    def __init__(
        self, objective: Objective, precision: str, batches: Sequence[Batch], device: torch.device
    ) -> None:
        super().__init__(batches, device)
        masters = objective.to(device)
        self.module = masters
        if precision == "bf16":
            self.module = copy.deepcopy(masters).to(torch.bfloat16)
        self.masters, self.weights = list(masters.parameters()), list(self.module.parameters())
        self.optimizer = make_optimizer(masters)

    def _train(self, batch: Batch, tokens: int) -> float:
        loss, sums = self.module(batch.inputs, batch.targets, batch.segments)
        (loss / tokens).backward()
        separate = self.masters[0] is not self.weights[0]
        if separate:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        finish_step(self.masters, self.optimizer)
        if separate:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return float(sums[0]) / tokens


class LlamaLoop(Contestant):
    """`LlamaForCausalLM` with its own loss; in bf16 under autocast, as `Trainer` runs it."""

    def __init__(
        self,
        model: PreTrainedModel,
        precision: str,
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        super().__init__(batches, device)
        self.model = model.to(device).train()
        self.precision = precision
        self.weights = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model)

    def _train(self, batch: Batch, tokens: int) -> float:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            answer: Any = self.model(
                input_ids=batch.inputs,
                labels=batch.targets,
                shift_labels=batch.targets,  # ours are shifted when the batch is made
                use_cache=False,
            )
        answer.loss.backward()
        finish_step(self.weights, self.optimizer)
        return float(answer.loss.detach())


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser that every contestant has."""
    groups = group_parameters(module, OPTIM)
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)


def finish_step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Clip, update, clear."""
    nn.utils.clip_grad_norm_(weights, OPTIM.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def build_llama(objective: Objective) -> PreTrainedModel:
    """Return the `transformers` model of the same shape with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = objective.model.config
    tree = export_config(config, eot_id=0, dtype="fp32")
    model = LlamaForCausalLM(LlamaConfig.from_dict(tree))
    tensors = export_tensors(config, objective.model.state_dict())
    result = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_embeddings else []
    if result.unexpected_keys or list(result.missing_keys) != tied:
        raise RuntimeError(f"weights do not fit LlamaForCausalLM: {result}")
    return model


def time_layer(layer: Callable[[Tensor], Tensor], states: Tensor, grad: Tensor) -> float:
    """Return the seconds of one forward and backward pass of a layer."""

    states.grad = None

    def work() -> None:
        layer(states).backward(grad)
        if states.is_cuda:
            torch.cuda.synchronize()

    return time_call(work)
