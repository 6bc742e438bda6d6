"""The dtype of training: engine.dtype=auto is resolved once, before the run's identity, and alike on all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch

from data_pipeline.common import storage
from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import OneOf, refuse_wrong_values
from train.checkpointing.files import CheckpointPaths, newest_whole
from train.distributed.collectives import broadcast_object, gathered_objects
from train.distributed.ranks import Ranks
from train.engine.config import DTYPES

log = logging.getLogger(__name__)
CHOICES = ("auto", *DTYPES)
LEAST_FIRST = ("fp32", "fp16", "bf16")  # a machine whose best is one of these can also use those before it
STAND_IN = "LDT_CPU_BF16"  # 0 or 1: treat this CPU as one without or with bf16 instructions, for tests
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # the last two are ARM's
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN uses the first that is set, in upper or lower case
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


class DtypeChoice(NamedTuple):
    """One of DTYPES, and the reason for it, for the log and config.yaml."""

    dtype: str
    because: str


class SavedDtype(NamedTuple):
    """The checkpoint that a run resumes from: its path, and the dtype of its training."""

    path: str
    dtype: str


def resolve_dtype(engine: Mapping[str, Any], paths: CheckpointPaths, ranks: Ranks) -> DtypeChoice:
    """The dtype of a run with checkpoints at `paths`; printed before later checks may refuse the run. Collective."""
    refuse_wrong_values({"dtype": engine["dtype"]}, {"dtype": Annotated[str, OneOf(CHOICES)]}, "engine.")
    saved = broadcast_object(saved_dtype(paths) if ranks.is_main else None)
    best = common_dtype(gathered_objects(best_dtype(ranks.device)))
    if engine["dtype"] == "auto":
        fresh = dtype_for_machine(engine, best)
        new = DtypeChoice(fresh.dtype, f"auto: {fresh.because}")
        chosen = keep_saved_dtype(saved, fresh, ranks.device) if saved else new
        if ranks.is_main:
            print(f"dtype: {chosen.dtype} ({chosen.because})", flush=True)
        return chosen
    if ranks.is_main and engine["dtype"] == "bf16" and best.dtype != "bf16":
        log.warning("engine.dtype=bf16: %s", cost_of_bf16(best))
    return DtypeChoice(engine["dtype"], "set by engine.dtype")


def dtype_for_machine(engine: Mapping[str, Any], best: DtypeChoice) -> DtypeChoice:
    """The best dtype of the machines, or fp32 if the other options need it."""
    why = only_fp32(engine)
    return DtypeChoice("fp32", why) if why else best


def common_dtype(of_ranks: Sequence[DtypeChoice]) -> DtypeChoice:
    """The best dtype that every rank's machine supports."""
    least = min(of_ranks, key=lambda of_rank: LEAST_FIRST.index(of_rank.dtype))
    those = [str(rank) for rank, of_rank in enumerate(of_ranks) if of_rank.dtype == least.dtype]
    if len(those) == len(of_ranks):
        return least
    most = max((of_rank.dtype for of_rank in of_ranks), key=LEAST_FIRST.index)
    return DtypeChoice(least.dtype, f"{least.because}, at rank(s) {', '.join(those)}; the others could use {most}")


def keep_saved_dtype(saved: SavedDtype, fresh: DtypeChoice, device: torch.device) -> DtypeChoice:
    """The dtype of a resumed run, independent of its machine now. fresh: what a new run would use there."""
    if saved.dtype == "fp16" and device.type != "cuda":
        raise UserError(
            f"{saved.path} was trained in fp16, which needs a GPU: continue on a machine with a GPU, or in "
            f"{fresh.dtype} with engine.dtype={fresh.dtype} training.allow_mismatch=[dtype]."
        )
    here = ""
    if saved.dtype != fresh.dtype:
        why = cost_of_bf16(fresh) if saved.dtype == "bf16" else fresh.because
        here = f"; a new run would use {fresh.dtype} here, as {why}"
    return DtypeChoice(saved.dtype, f"auto: as in {saved.path}{here}")


def saved_dtype(paths: CheckpointPaths) -> SavedDtype | None:
    """The newest checkpoint and its dtype; None if it has no valid one, which comparing identities refuses later."""
    found = newest_whole(paths.checkpoints)
    identity = found.saved.get("identity") if found else None
    dtype = identity.get("dtype") if isinstance(identity, dict) else None
    return SavedDtype(storage.join(paths.checkpoints, found.name), dtype) if dtype in tuple(DTYPES) else None


def only_fp32(engine: Mapping[str, Any]) -> str | None:
    """Why these options need fp32, or None if they do not: EngineConfig refuses them with another dtype."""
    if engine["zero_stage"] == 0:
        return "DeepSpeed keeps no separate fp32 master weights at ZeRO stage 0"
    if engine["offload"] == "optimizer" and engine["zero_stage"] in (1, 2):
        return "engine.offload=optimizer at ZeRO stage 1 or 2 needs fp32; engine=zero3 allows other dtypes"
    return None


def cost_of_bf16(best: DtypeChoice) -> str:
    """What bf16 costs on machines whose best dtype is another. Measured on CPUs, for a step of a small U-Net: 2 times
    as long with AVX-512 alone, 9 times with AVX2."""
    times = "two to nine" if best.dtype == "fp32" else "several"
    return f"{best.because}, and bf16 takes {times} times as long as {best.dtype} there"


def best_dtype(device: torch.device) -> DtypeChoice:
    """The fastest dtype of 16 bits or more on this rank's machine."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return DtypeChoice("bf16" if has else "fp16", f"this GPU has {'' if has else 'no '}bf16 instructions")
    # Kernels in torch are not enough: it also has them for AVX-512 alone, where it emulates the instructions.
    kernels = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype_of_cpu(torch.cpu.get_capabilities(), kernels, os.environ)


def dtype_of_cpu(capabilities: Mapping[str, Any], kernels: bool, environment: Mapping[str, str]) -> DtypeChoice:
    """The best dtype of a CPU: by its instructions, torch's bf16 kernels, and limits on oneDNN, which provides them."""
    has, because = _cpu_has_bf16(capabilities, kernels, environment)
    return DtypeChoice("bf16" if has else "fp32", because)


def _cpu_has_bf16(capabilities: Mapping[str, Any], kernels: bool, environment: Mapping[str, str]) -> tuple[bool, str]:
    if (said := environment.get(STAND_IN)) in ("0", "1"):
        return said == "1", f"{STAND_IN}={said} treats this CPU as one with{'' if said == '1' else 'out'} bf16"
    if not any(capabilities.get(name) for name in BF16_INSTRUCTIONS):
        return False, "this CPU has no bf16 instructions"
    limit = next((name for name in ISA_LIMITS if environment.get(name)), None)
    if limit and environment[limit].upper() in ISAS_WITHOUT_BF16:
        return False, f"{limit}={environment[limit]} disables this CPU's bf16 instructions"
    if not kernels:
        return False, "this build of torch does not use the CPU's bf16 instructions"
    return True, "this CPU has bf16 instructions"
