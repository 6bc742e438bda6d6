"""The only importer of deepspeed, at first use: initialisation, one step, and the fp32 master weights wherever ZeRO
keeps them."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data_pipeline.errors import UserError
from data_pipeline.samples import Batch, DataCursor
from train.dtype import DTYPES
from train.flops import of_training
from train.fragments import Fragment
from train.optim import AdamW, set_lr
from train.option_checks import NotNegative, OneOf, Within, refuse_wrong
from train.ranks import Ranks

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scaler
OFFLOAD = ("none", "optimizer", "all")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What we rely on of DeepSpeed, each field spelled out: its own defaults clip gradients at 1.0, for one.

    dtype: as dtype.py has chosen it.
    """

    zero_stage: Annotated[int, OneOf((0, 1, 2, 3))] = 1
    dtype: Annotated[str, OneOf(tuple(DTYPES))] = "fp32"
    gradient_clipping: NotNegative = 1.0  # 0: none
    reduce_bucket_size: Annotated[float, Within(1)] = 50_000_000  # values; 5e7, too
    allgather_bucket_size: Annotated[float, Within(1)] = 50_000_000
    overlap_comm: bool = False
    offload: Annotated[str, OneOf(OFFLOAD)] = "none"
    compile: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        refuse_wrong(self, "engine")
        if self.zero_stage == 0 and self.dtype != "fp32":
            raise UserError(
                f"engine: DeepSpeed keeps no fp32 master weights for {self.dtype} at ZeRO stage 0; take engine=zero1."
            )
        if self.dtype == "fp16" and not torch.cuda.is_available():
            raise UserError("engine.dtype=fp16 needs a GPU: take engine.dtype=auto.")
        self._check_offload()
        if self.compile and self.zero_stage == 3:
            raise UserError("engine.compile=true does not go with ZeRO stage 3: take engine=zero2.")
        compiler = os.environ.get("CXX", "g++")  # torch's choice
        if self.compile and shutil.which(compiler) is None:
            raise UserError(f"engine.compile=true needs {compiler}, which is not there: install it, or leave it out.")

    def _check_offload(self) -> None:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise UserError("engine.offload=optimizer needs ZeRO: take engine=zero1, zero2 or zero3.")
        if self.offload == "optimizer" and self.zero_stage in (1, 2) and self.dtype != "fp32":
            raise UserError(
                "engine.offload=optimizer at ZeRO stage 1 or 2 never recovers from one gradient that is not finite in "
                f"{self.dtype}: take engine=zero3."
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise UserError("engine.offload=all, the weights too, needs ZeRO stage 3: take engine=zero3.")

    def _accumulates_in_fp32(self, accumulation: int) -> bool:
        """Not where there is nothing to accumulate: at stage 1 in bf16 it would cost a second, slower optimizer."""
        return not (self.dtype == "bf16" and self.zero_stage == 1 and accumulation == 1)

    def for_deepspeed(self, micro_batch: int, accumulation: int, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        offloads = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * world_size,
            "gradient_clipping": self.gradient_clipping if self.zero_stage else 0.0,  # stage 0: by Engine
            # Without the second, its optimizer for bf16 with fp32 accumulation adds earlier micro-batches again.
            "bf16": {"enabled": self.dtype == "bf16", "immediate_grad_update": True},
            # Dynamic loss scale: from 2^16, halved at each overflow, doubled after 1000 steps without.
            "fp16": {
                "enabled": self.dtype == "fp16",
                "loss_scale": 0,
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 1,
                "min_loss_scale": 1,
            },
            "data_types": {"grad_accum_dtype": "fp32" if self._accumulates_in_fp32(accumulation) else "bf16"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": int(self.reduce_bucket_size),
                "allgather_bucket_size": int(self.allgather_bucket_size),
                "overlap_comm": self.overlap_comm,
                "contiguous_gradients": True,
                "round_robin_gradients": False,
                # Stage 3: small parameters stay whole on each rank; gathering them costs more than it saves.
                "stage3_param_persistence_threshold": 10_000,
                **dict.fromkeys(offloads[self.offload], to_cpu),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU, too, and needs no compiler
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }


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
        self.ranks, self.batch_size, self.accumulation, self.optimizer = ranks, batch_size, accumulation, optimizer
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
