"""What a rank holds of weights and optimiser states, by parameter: slices that can be read and set.

Leans on internals of DeepSpeed 0.19 (pinned): where it keeps fp32 masters at each ZeRO stage, and
how they reach the forward weights. `tests/trainer/test_checkpoint.py` is what holds this up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WEIGHT = "weight"


def name_states(
    model: nn.Module, groups: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[str, ...]]:
    """Return what there is of every parameter: its weight, and what the optimiser keeps of it.

    A frozen parameter is in no group and has a weight alone.

    Args:
        model: Whose parameters.
        groups: Of an optimiser; each names under `states` what it keeps of its `params`.
    """
    kept = {id(p): tuple(group["states"]) for group in groups for p in group["params"]}
    return {name: (WEIGHT, *kept.get(id(p), ())) for name, p in model.named_parameters()}


class ShardedState:
    """The state behind a DeepSpeed engine at any ZeRO stage."""

    def __init__(self, native: Any, stage: int, states: Mapping[str, tuple[str, ...]]) -> None:
        """Make every state now, zero, so that a fresh run and a resumed one hold the same.

        Args:
            native: DeepSpeed's engine, around a module with a `model`.
            stage: Of ZeRO.
            states: What there is of every parameter (`name_states`).
        """
        self.native, self.stage, self.states = native, stage, states
        for master, kept in self._masters_and_states():
            self.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device)
            } | {state: torch.zeros_like(master) for state in kept}
        if stage == 3:
            for name, parameter in self.parameters():
                for state in states[name]:
                    part = self._hold(parameter, state)
                    part[max(0, _whole_size(parameter) - dist.get_rank() * part.numel()) :].zero_()
        self._link()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that DeepSpeed shards."""
        return self.native.basic_optimizer  # type: ignore[no-any-return]

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the model's parameters by name, in the one order every rank uses."""
        by_name = dict(self.native.module.model.named_parameters())
        return [(name, by_name[name]) for name in self.states]

    def masters(self) -> list[Tensor]:
        """Return the tensors the optimiser updates on this rank."""
        return [master for master, _ in self._masters_and_states()]

    def replicas(self) -> list[Tensor]:
        """Return what every rank must hold alike: forward weights, at stage 0 the states too."""
        if self.stage == 3:
            return []
        held = [parameter.data for _, parameter in self.parameters()]
        if self.stage == 0:
            for kept in self.optimizer.state.values():
                held += [value for state, value in kept.items() if state != "step"]
        return held

    def slices(self, *, dealt: bool) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield (parameter, state, offset, values) of what this rank holds: flat views.

        Not collective. What every rank holds alike (all at stage 0, what is frozen up to stage 2)
        is dealt out, parameter by parameter, so that all ranks' slices make up every parameter and
        state exactly once; unless `dealt` is False.
        """
        self._link()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for number, (name, parameter) in enumerate(self.parameters()):
            alike = self.stage == 0 or (self.stage < 3 and not parameter.requires_grad)
            if dealt and alike and number % ranks != rank:
                continue
            for state in self.states[name]:
                offset, values = self._own_slice(parameter, state)
                if values.numel():
                    yield name, state, offset, values

    def finish_writing(self, step: int) -> None:
        """Count `step` updates, and push the masters into the forward weights; collective."""
        for kept in self.optimizer.state.values():
            kept["step"].fill_(float(step))
        self.native.global_steps = step
        optimizer = self.native.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(optimizer.fp16_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # Small parameters stay gathered between steps: gather them again from what was set.
            if persistent := optimizer.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def _masters_and_states(self) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        groups = self.optimizer.param_groups
        if self.stage == 3:
            group_of = self.native.optimizer.sub_group_to_group_id
            for number, master in enumerate(self.native.optimizer.fp32_partitioned_groups_flat):
                yield master, groups[group_of[number]]["states"]
        else:
            for group in groups:
                for master in group["params"]:
                    yield master, group["states"]

    def _own_slice(self, parameter: nn.Parameter, state: str) -> tuple[int, Tensor]:
        """Return where this rank's part of a parameter's state begins, and the part."""
        if self.stage == 3:
            part = self._hold(parameter, state)
            offset = dist.get_rank() * part.numel()
            return offset, part[: max(0, _whole_size(parameter) - offset)]  # the last one is padded
        if state == WEIGHT and (self.stage == 0 or not parameter.requires_grad):
            return 0, parameter.data.view(-1)
        if self.stage == 0:
            return 0, self.optimizer.state[parameter][state].view(-1)
        held = getattr(parameter, "_hp_mapping", None)
        if held is None:  # all of it is on other ranks
            return 0, torch.empty(0)
        values = held.hp_fragment if state == WEIGHT else held.optim_fragment[state]
        return int(held.lp_fragment_address.start), values.detach()

    def _hold(self, parameter: Any, state: str) -> Tensor:
        """Return this rank's partition at stage 3, padding and all."""
        if not parameter.requires_grad:
            return parameter.ds_tensor.data.view(-1)  # type: ignore[no-any-return]
        key = None if state == WEIGHT else state
        part: Tensor = self.native.optimizer.get_local_fp32_param(parameter, key)
        return part.detach().view(-1)

    def _link(self) -> None:
        """Let DeepSpeed's fragments point at the states; it does so for group 0 alone."""
        if self.stage in (1, 2):
            self.native.optimizer._hp_optimizer_states_linked = False
            self.native.optimizer._lazy_init_hp_params_optimizer_state()


def _whole_size(parameter: Any) -> int:
    """Return the elements of a parameter that is partitioned."""
    return int(parameter.ds_numel)
