"""The only importer of deepspeed, at first use: initialisation, one step, and the fp32 master weights wherever ZeRO
keeps them."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batch import Batch, DataCursor
from train.distributed.ranks import Ranks
from train.engine.config import DTYPES, EngineConfig
from train.engine.flops import of_training
from train.engine.optimizer import AdamW, set_lr
from train.engine.param_shards import Fragment

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scaler


class StepResult(NamedTuple):
    """One global step: parts are this rank's means over its micro-batches, still on the device."""

    parts: dict[str, Tensor]
    cursor: DataCursor
    keys: tuple[str, ...]
    lr: float
    applied: bool


class Engine:
    """A module under DeepSpeed ZeRO. `module(batch)` gives LossTerms; its parameters are the ones trained."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: AdamW,
        config: EngineConfig,
        ranks: Ranks,
        batch_size: int,
        accumulation: int,
    ) -> None:
        deepspeed = quiet_deepspeed()
        self.ranks, self.accumulation, self.optimizer = ranks, accumulation, optimizer
        self.config, self.norm = config, torch.tensor(0.0)
        micro_batch = batch_size // (ranks.world_size * accumulation)
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)  # over the group that ranks.py has made
        module.to(ranks.device)
        _tune(module, config)
        self.deepspeed, self.zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(module, ranks.device),
            config=config.for_deepspeed(micro_batch, accumulation, ranks.world_size),
            dist_init_required=False,
        )
        self.module = self.deepspeed.module
        if config.dtype == "fp16":
            self.zero.loss_scaler.raise_error_at_min_scale = False  # steps skipped in a row are bad_numbers.py's

    def train_step(self, batches: Iterator[Batch], applied_steps: int, total_steps: int) -> StepResult:
        """One optimizer step over `accumulation` micro-batches."""
        lr = self.optimizer.lr_at(applied_steps, total_steps)
        set_lr(self.zero.param_groups, lr)
        sums: dict[str, Tensor] = {}
        keys: tuple[str, ...] = ()
        for _ in range(self.accumulation):
            batch = next(batches).to(self.ranks.device)
            terms = self.deepspeed(batch)
            # A loss may be infinite and its gradients not: then these are made so, and no rank applies the step.
            self.deepspeed.backward(terms.total * torch.where(terms.total.detach().isfinite(), 1.0, torch.nan))
            finite = self._clip_or_drop_gradients()
            self.deepspeed.step()
            keys += batch.keys
            sums = {name: sums.get(name, 0.0) + value / self.accumulation for name, value in terms.parts.items()}
        return StepResult(sums, batch.cursor, keys, lr, finite and self.deepspeed.was_step_applied())

    def _clip_or_drop_gradients(self) -> bool:
        """Whether this step may be applied. ZeRO's stages clip and find that out themselves; stage 0 would apply all.

        A host sync a step, as they have. The gradients are reduced already, so all ranks find the same.
        """
        if self.config.zero_stage or not self.deepspeed.is_gradient_accumulation_boundary():
            return True
        trained = [p for p in self.module.parameters() if p.grad is not None]
        self.norm = get_total_norm([p.grad for p in trained])
        if not self.norm.isfinite():
            for parameter in trained:
                parameter.grad = None  # AdamW leaves its weights and moments as they are
            return False
        if self.config.gradient_clipping:
            clip_grads_with_norm_(trained, self.config.gradient_clipping, self.norm)
        return True

    def gradient_norm(self) -> float:
        """Global norm before clipping, of the last step; a host sync."""
        norm = self.deepspeed.get_global_grad_norm() if self.config.zero_stage else self.norm
        return float(norm) if norm is not None else float("nan")

    def master_shards(self) -> list[Tensor]:
        """This rank's fp32 weights: flat partitions under ZeRO, the parameters themselves without."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            shards = getattr(self.zero, name, None)  # stage 3; stages 1 and 2; stage 1 in bf16
            if shards:
                return list(shards)
        return [p for _, p in self._trained()]

    @torch.no_grad()
    def full_state_dict(self, shards: Sequence[Tensor] | None = None, prefix: str = "") -> dict[str, Tensor]:
        """Whole fp32 weights by name, on the CPU of every rank; `shards` (an EMA's) in place of the master's.

        Collective: all ranks must call it. `prefix` keeps the names below it, and takes it off.
        """
        safe_get_full_fp32_param = quiet_deepspeed().utils.safe_get_full_fp32_param
        with self._masters_replaced_by(shards):
            named = {}
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    full = safe_get_full_fp32_param(parameter)
                    full = parameter if full is None else full
                    if name.startswith(prefix):
                        named[name[len(prefix) :]] = full.detach().to("cpu", torch.float32, copy=True)
        return named

    @contextmanager
    def _masters_replaced_by(self, shards: Sequence[Tensor] | None) -> Iterator[None]:
        if shards is None:
            yield
            return
        masters = self.master_shards()
        kept = [m.detach().clone() for m in masters]
        try:
            for master, shard in zip(masters, shards, strict=True):
                master.data.copy_(shard)
            yield
        finally:
            for master, original in zip(masters, kept, strict=True):
                master.data.copy_(original)

    def flops(self, batch: Batch) -> int:
        """Of one step on this rank, of which `batch` is a micro-batch. Collective at stage 3."""
        batch = batch.to(self.ranks.device)
        return self.accumulation * of_training(lambda: self.module(batch))

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return DTYPES[self.config.dtype]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the trained parameters, whole, by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def fragments(self) -> list[Fragment]:
        """What this rank's master shards are pieces of, padding left out."""
        if self.config.zero_stage == 0:
            return [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(self._trained())]
        if self.config.zero_stage == 3:
            return [f for name, p in self._trained() if (f := self._fragment_at_stage_3(name, p)).length > 0]
        found = []
        for name, parameter in self._trained():
            if (mapping := parameter._hp_mapping) is not None:  # None: all of it is other ranks'
                whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(name, whole.start, whole.numel, mapping.param_group_index, flat.start))
        return found

    def _fragment_at_stage_3(self, name: str, parameter: nn.Parameter) -> Fragment:
        """Each parameter is cut evenly over the ranks, the last part padded."""
        shard, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.ranks.rank * length
        return Fragment(name, start, min(length, parameter.ds_numel - start), shard, offset)

    def fragments_to_save(self) -> list[Fragment]:
        """Those that no other rank saves. Without ZeRO all ranks hold all, and take turns."""
        if self.config.zero_stage:
            return self.fragments()
        return [f for i, f in enumerate(self.fragments()) if i % self.ranks.world_size == self.ranks.rank]

    def tensors(self) -> dict[str, list[Tensor]]:
        """Master weights and Adam's moments of this rank, by kind, cut alike."""
        masters = self.master_shards()
        states = [self._adam_state(master) for master in masters]
        return {"weight": masters, **{kind: [state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq")}}

    def _adam_state(self, master: Tensor) -> dict[str, Tensor]:
        """As torch makes it at the first step, which may not have been."""
        state = getattr(self.zero, "optimizer", self.zero).state[master]
        if "exp_avg" not in state:
            step = torch.zeros((), device=master.device)
            state.update(step=step, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    def scalars(self) -> dict[str, float]:
        """What is saved beside `tensors`, the same on all ranks."""
        step = max(float(self._adam_state(master)["step"]) for master in self.master_shards())
        if self.config.dtype != "fp16":
            return {"adam_step": step}
        return {"adam_step": step, **{name: getattr(self.zero.loss_scaler, name) for name in LOSS_SCALE}}

    @torch.no_grad()
    def after_loading(self, scalars: dict[str, float]) -> None:
        """`tensors` have been filled: set the rest, and the weights that the module computes with. Collective."""
        for master in self.master_shards():
            self._adam_state(master)["step"].fill_(scalars["adam_step"])
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


def _tune(module: nn.Module, config: EngineConfig) -> None:
    """Hand on what concerns the network alone; asked for in vain, it is refused."""
    networks = [part for part in module.modules() if hasattr(part, "tune")]
    for network in networks:
        network.tune(config.compile, config.checkpoint_activations)
    if not networks and (config.compile or config.checkpoint_activations):
        raise UserError("engine.compile and engine.checkpoint_activations are for the U-Net: leave them out here.")


def quiet_deepspeed() -> ModuleType:
    """Its warnings and errors only, and no compilation of a shared-memory op that gloo does without."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)  # else it guesses, and warns
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")  # its calls
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


@functools.cache
def _import_muon_uncompiled() -> None:
    """DeepSpeed imports its Muon optimizer with the first engine, and so torch's compiler: seconds of every start, for
    functions that nothing here calls."""
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_
