"""DeepSpeed: initialisation, one step, and the full weights. Only this file imports deepspeed, at first use."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from train.engine.optimizer import AdamW, set_idle, set_lr
from train.engine.zero_state import ZeroState


class StepResult(NamedTuple):
    """The result of one global step. parts: this rank's means over its micro-batches, still on the device; the gradient
    norm is not among them: `Engine.gradient_norm`."""

    parts: dict[str, Tensor]
    cursor: DataCursor
    keys: tuple[str, ...]
    lr: float
    applied: bool
    bucket: str = ""  # the step's aspect-ratio bucket, in a run on several


class Engine(ZeroState):
    """A module under DeepSpeed ZeRO. `module(batch)` returns LossTerms; its parameters are trained. Parameters that
    module.bounds names, if there is one, are held within (low, high) after each step."""

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
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)  # uses the process group made by ranks.py
        module.to(ranks.device)
        _tune(module, config)
        self.deepspeed, self.zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.build(module, ranks.device),
            config=config.for_deepspeed(micro_batch, accumulation, ranks.world_size),
            dist_init_required=False,
        )
        self.module = self.deepspeed.module
        self.bounds: Mapping[str, tuple[float, float]] = getattr(module, "bounds", {})
        if config.dtype == "fp16":
            self.zero.loss_scaler.raise_error_at_min_scale = False  # stability_monitor.py counts skips

    def train_step(self, batches: Iterator[Batch], applied_steps: int, total_steps: int) -> StepResult:
        """One optimizer step over `accumulation` micro-batches."""
        lr = self.optimizer.lr_at(applied_steps, total_steps)
        set_lr(self.zero.param_groups, lr)
        sums: dict[str, Tensor] = {}
        keys: tuple[str, ...] = ()
        for _ in range(self.accumulation):
            batch = next(batches).to(self.ranks.device)
            terms = self.deepspeed(batch)
            # An infinite loss may have finite gradients: make them NaN too, so that no rank applies the step.
            self.deepspeed.backward(terms.total * torch.where(terms.total.detach().isfinite(), 1.0, torch.nan))
            finite = self._clip_or_drop_gradients()
            set_idle(self.zero.param_groups, getattr(terms, "idle", None))
            self.deepspeed.step()
            keys += batch.keys
            sums = {name: sums.get(name, 0.0) + value / self.accumulation for name, value in terms.parts.items()}
        applied = finite and self.deepspeed.was_step_applied()
        self.hold_within(self.bounds)
        return StepResult(sums, batch.cursor, keys, lr, applied, batch.bucket)

    def _clip_or_drop_gradients(self) -> bool:
        """Whether this step may be applied. ZeRO stages 1 to 3 clip and check that themselves; stage 0 would apply any.

        One host sync a step, as in stages 1 to 3. Gradients are already reduced, so all ranks get the same result.
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
        """Global gradient norm of the last step, before clipping. Not finite if that step was skipped (inf at stages 1
        to 3); NaN if DeepSpeed does not know it, as before the first step. Costs a host sync."""
        norm = self.deepspeed.get_global_grad_norm() if self.config.zero_stage else self.norm
        return float(norm) if norm is not None else float("nan")

    @torch.no_grad()
    def full_state_dict(self, shards: Sequence[Tensor] | None = None, prefix: str = "") -> dict[str, Tensor]:
        """Full fp32 weights by name, on the CPU of every rank; if given, from `shards` (an EMA's), not the masters.

        Collective: all ranks must call it. Only names that start with `prefix` are kept, without the prefix.
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
        """FLOPs of one step on this rank; `batch` is one of its micro-batches. Collective at stage 3."""
        batch = batch.to(self.ranks.device)
        # Compiled code can't be counted, and its forward pass without gradients would be another graph.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with eager:
            return self.accumulation * of_training(lambda: self.module(batch))

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return DTYPES[self.config.dtype]


def _tune(module: nn.Module, config: EngineConfig) -> None:
    """Pass on the options that concern only the network; a UserError if no network takes them."""
    networks = [part for part in module.modules() if hasattr(part, "tune")]
    for network in networks:
        network.tune(config.compile, config.checkpoint_activations)
    if not networks and (config.compile or config.checkpoint_activations):
        raise UserError(
            "engine.compile and engine.checkpoint_activations are only available for the U-Net and first stages: leave "
            "them out here."
        )


def quiet_deepspeed() -> ModuleType:
    """DeepSpeed, logging only warnings and errors, without compiling a shared-memory op that gloo does not need."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)  # otherwise it guesses, and warns
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")  # its calls
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


@functools.cache
def _import_muon_uncompiled() -> None:
    """DeepSpeed's first engine imports its Muon optimizer, and with it torch's compiler: this would cost seconds at
    every start, for functions that nothing here calls."""
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_
