"""Access to what training changes, wherever ZeRO stores it: master weights, moments, scalars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed.ranks import Ranks
from train.engine.config import EngineConfig
from train.engine.param_shards import Fragment

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scaler


class ZeroState:
    """The part of Engine that reads and writes DeepSpeed's attributes. `zero`: DeepSpeed's optimizer."""

    module: nn.Module
    zero: Any
    config: EngineConfig
    ranks: Ranks

    def master_shards(self) -> list[Tensor]:
        """This rank's fp32 weights: flat partitions with ZeRO, the parameters themselves without it."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            shards = getattr(self.zero, name, None)  # stage 3; stages 1 and 2; stage 1 in bf16
            if shards:
                return list(shards)
        return [p for _, p in self._trained()]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Full shapes of the trained parameters, by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def fragments(self) -> list[Fragment]:
        """The pieces of parameters in this rank's master shards, without padding."""
        if self.config.zero_stage == 0:
            return [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(self._trained())]
        if self.config.zero_stage == 3:
            return [f for name, p in self._trained() if (f := self._fragment_at_stage_3(name, p)).length > 0]
        found = []
        for name, parameter in self._trained():
            if (mapping := parameter._hp_mapping) is not None:  # None: other ranks hold all of it
                whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(name, whole.start, whole.numel, mapping.param_group_index, flat.start))
        return found

    def _fragment_at_stage_3(self, name: str, parameter: nn.Parameter) -> Fragment:
        """Each parameter is split evenly over the ranks; the last part is padded."""
        shard, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.ranks.rank * length
        return Fragment(name, start, min(length, parameter.ds_numel - start), shard, offset)

    @torch.no_grad()
    def hold_within(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Clamp these parameters, by name: the master weights, and what the module computes with."""
        if not bounds:
            return
        masters = self.master_shards()
        for fragment in self.fragments():
            if fragment.name in bounds:
                fragment.of(masters).clamp_(*bounds[fragment.name])
        for name, parameter in self._trained():
            if name in bounds:
                for held in (parameter, getattr(parameter, "ds_tensor", parameter)):  # at stage 3 whole and its part
                    held.data.clamp_(*bounds[name])

    def fragments_to_save(self) -> list[Fragment]:
        """The fragments that only this rank saves. Without ZeRO all ranks hold all, and each saves its share."""
        if self.config.zero_stage:
            return self.fragments()
        return [f for i, f in enumerate(self.fragments()) if i % self.ranks.world_size == self.ranks.rank]

    def tensors(self) -> dict[str, list[Tensor]]:
        """This rank's master weights and Adam moments, by kind, all partitioned alike."""
        masters = self.master_shards()
        states = [self._adam_state(master) for master in masters]
        return {"weight": masters, **{kind: [state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq")}}

    def _adam_state(self, master: Tensor) -> dict[str, Tensor]:
        """The state as torch creates it at the first step, created here if no step was taken yet."""
        state = getattr(self.zero, "optimizer", self.zero).state[master]
        if "exp_avg" not in state:
            step = torch.zeros((), device=master.device)
            state.update(step=step, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    def _by_player(self) -> dict[str, list[Tensor]]:
        """This rank's master shards, by the key in `scalars` of their Adam step: one each for players in turn."""
        player_of = {id(p): group.get("player") for group in self.zero.param_groups for p in group["params"]}
        found: dict[str, list[Tensor]] = {}
        for master in self.master_shards():
            player = player_of.get(id(master))
            found.setdefault(f"adam_step/{player}" if player else "adam_step", []).append(master)
        return found

    def scalars(self) -> dict[str, float]:
        """The scalars saved with `tensors`; the same on all ranks."""
        steps = {key: max(float(self._adam_state(m)["step"]) for m in part) for key, part in self._by_player().items()}
        if self.config.dtype != "fp16":
            return steps
        return {**steps, **{name: getattr(self.zero.loss_scaler, name) for name in LOSS_SCALE}}

    @torch.no_grad()
    def after_loading(self, scalars: dict[str, float]) -> None:
        """Once `tensors` are filled, set the scalars, and the weights that the module computes with. Collective."""
        for key, masters in self._by_player().items():
            for master in masters:
                self._adam_state(master)["step"].fill_(scalars.get(key, scalars["adam_step"]))
        for name in LOSS_SCALE if self.config.dtype == "fp16" else ():
            setattr(self.zero.loss_scaler, name, scalars.get(name, getattr(self.zero.loss_scaler, name)))
        if self.config.zero_stage in (1, 2):
            self.zero.update_lp_params()
        elif self.config.zero_stage == 3:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self.zero.persistent_parameters:
                persistent[0].all_gather(persistent)
