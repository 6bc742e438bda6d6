"""How training computes: precision, ZeRO stage, offload, and the DeepSpeed configuration for them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import NotNegative, OneOf, Within, refuse_wrong

OFFLOAD = ("none", "optimizer", "all")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The DeepSpeed settings that we rely on, all set explicitly: its defaults, for example, clip gradients at 1.0.

    dtype: as chosen by loop/dtype.py.
    """

    zero_stage: Annotated[int, OneOf((0, 1, 2, 3))] = 1
    dtype: Annotated[str, OneOf(tuple(DTYPES))] = "fp32"
    gradient_clipping: NotNegative = 1.0  # 0: none
    reduce_bucket_size: Annotated[float, Within(1)] = 50_000_000  # number of values; 5e7 is accepted too
    allgather_bucket_size: Annotated[float, Within(1)] = 50_000_000
    overlap_comm: bool = False
    offload: Annotated[str, OneOf(OFFLOAD)] = "none"
    compile: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        refuse_wrong(self, "engine")
        if self.zero_stage == 0 and self.dtype != "fp32":
            raise UserError(
                f"engine.dtype={self.dtype} is not available at ZeRO stage 0, where DeepSpeed keeps no fp32 "
                "master weights: use engine=zero1."
            )
        if self.dtype == "fp16" and not torch.cuda.is_available():
            raise UserError("engine.dtype=fp16 needs a GPU: use engine.dtype=auto.")
        self._check_offload()
        if self.compile and self.zero_stage == 3:
            raise UserError("engine.compile=true is not available at ZeRO stage 3: use engine=zero2.")
        compiler = os.environ.get("CXX", "g++")  # the compiler that torch uses
        if self.compile and shutil.which(compiler) is None:
            raise UserError(
                f"engine.compile=true needs the compiler {compiler}, which is not installed: install it, or leave out "
                "engine.compile."
            )

    def _check_offload(self) -> None:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise UserError("engine.offload=optimizer needs ZeRO: use engine=zero1, zero2 or zero3.")
        if self.offload == "optimizer" and self.zero_stage in (1, 2) and self.dtype != "fp32":
            raise UserError(
                "engine.offload=optimizer at ZeRO stage 1 or 2 does not recover from a non-finite gradient in "
                f"{self.dtype}: use engine=zero3."
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise UserError("engine.offload=all, which offloads the weights too, needs ZeRO stage 3: use engine=zero3.")

    def _accumulates_in_fp32(self, accumulation: int) -> bool:
        """False at stage 1 in bf16 without accumulation, where it would cost a second, slower optimizer."""
        return not (self.dtype == "bf16" and self.zero_stage == 1 and accumulation == 1)

    def for_deepspeed(self, micro_batch: int, accumulation: int, world_size: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        offloads = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * world_size,
            "gradient_clipping": self.gradient_clipping if self.zero_stage else 0.0,  # stage 0: Engine clips
            # Without immediate_grad_update, DeepSpeed's bf16 optimizer with fp32 accumulation adds earlier ones again.
            "bf16": {"enabled": self.dtype == "bf16", "immediate_grad_update": True},
            # Dynamic loss scale: starts at 2^16, halves at each overflow, doubles after 1000 steps without one.
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
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU, and needs no compiler
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
