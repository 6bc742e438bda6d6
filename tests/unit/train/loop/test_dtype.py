"""engine.dtype=auto: by machine, by the options beside it, by the checkpoint, and alike on all ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.loop.dtype
from data_pipeline.common.errors import UserError
from train.checkpointing.files import CheckpointPaths
from train.distributed.ranks import Ranks
from train.loop.dtype import (
    DtypeChoice,
    SavedDtype,
    best_dtype,
    common_dtype,
    dtype_for_machine,
    dtype_of_cpu,
    keep_saved_dtype,
    resolve_dtype,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SAPPHIRE_RAPIDS = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}
ICE_LAKE, ZEN_3 = {"avx2": True, "avx512_f": True, "avx512_bf16": False}, {"avx2": True}
GRAVITON_3, GRAVITON_2 = {"neon": True, "bf16": True, "sve_bf16": True}, {"neon": True, "bf16": False}
HAS = DtypeChoice("bf16", "this CPU has bf16 instructions")
LACKS = DtypeChoice("fp32", "this CPU has no bf16 instructions")
OLD_GPU = DtypeChoice("fp16", "this GPU has no bf16 instructions")


@pytest.mark.parametrize(
    ("capabilities", "kernels", "environment", "dtype", "because"),
    [
        (SAPPHIRE_RAPIDS, True, {}, "bf16", "this CPU has bf16 instructions"),
        (GRAVITON_3, True, {}, "bf16", "this CPU has bf16 instructions"),
        (ICE_LAKE, True, {}, "fp32", "this CPU has no bf16 instructions"),  # torch emulates them there
        (ZEN_3, False, {}, "fp32", "this CPU has no bf16 instructions"),
        (GRAVITON_2, False, {}, "fp32", "this CPU has no bf16 instructions"),
        (GRAVITON_3, False, {}, "fp32", "this build of torch does not use"),
        (SAPPHIRE_RAPIDS, True, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32", "ONEDNN_MAX_CPU_ISA=AVX2 disables"),
        (SAPPHIRE_RAPIDS, True, {"DNNL_MAX_CPU_ISA": "avx512_core"}, "fp32", "DNNL_MAX_CPU_ISA=avx512_core disables"),
        (SAPPHIRE_RAPIDS, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16", "has bf16"),
        (SAPPHIRE_RAPIDS, True, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, "bf16", "has bf16"),
        (SAPPHIRE_RAPIDS, True, {"LDT_CPU_BF16": "0"}, "fp32", "LDT_CPU_BF16=0 treats this CPU as one without bf16"),
        (ZEN_3, False, {"LDT_CPU_BF16": "1"}, "bf16", "LDT_CPU_BF16=1 treats this CPU as one with bf16"),
        (ZEN_3, False, {"LDT_CPU_BF16": ""}, "fp32", "no bf16 instructions"),
    ],
)
def test_a_cpu_takes_bf16_where_its_instructions_include_it(capabilities, kernels, environment, dtype, because):
    found = dtype_of_cpu(capabilities, kernels, environment)
    assert found.dtype == dtype
    assert because in found.because


def test_this_cpu_is_what_linux_says_of_it(monkeypatch):
    for name in ("LDT_CPU_BF16", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "avx2" not in flags:
        pytest.skip("/proc/cpuinfo has no flags of an x86 CPU here to compare with")
    assert best_dtype(CPU).dtype == ("bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32")


@pytest.mark.parametrize(
    ("zero_stage", "offload", "dtype", "because"),
    [
        (1, "none", "bf16", "this CPU has bf16 instructions"),
        (0, "none", "fp32", "DeepSpeed keeps no separate fp32 master weights at ZeRO stage 0"),
        (2, "optimizer", "fp32", "engine.offload=optimizer at ZeRO stage 1 or 2 needs fp32"),
        (3, "optimizer", "bf16", "this CPU has bf16 instructions"),
        (3, "all", "bf16", "this CPU has bf16 instructions"),
    ],
)
def test_where_other_options_go_with_fp32_alone_it_is_that(zero_stage, offload, dtype, because):
    found = dtype_for_machine({"zero_stage": zero_stage, "offload": offload}, HAS)
    assert found.dtype == dtype
    assert found.because.startswith(because)


@pytest.mark.parametrize(
    ("of_ranks", "found"),
    [
        ([HAS, HAS], HAS),
        ([OLD_GPU], OLD_GPU),
        ([HAS, LACKS, HAS, LACKS], ("fp32", f"{LACKS.because}, at rank(s) 1, 3; the others could use bf16")),
        ([OLD_GPU, HAS], ("fp16", f"{OLD_GPU.because}, at rank(s) 0; the others could use bf16")),
    ],
)
def test_ranks_that_differ_take_what_all_can(of_ranks, found):
    assert common_dtype(of_ranks) == found


@pytest.mark.parametrize(
    ("saved", "best", "device", "because"),
    [
        ("bf16", HAS, CPU, "auto: as in runs/a/step-00000002"),
        ("fp16", OLD_GPU, GPU, "auto: as in runs/a/step-00000002"),
        ("fp32", HAS, CPU, "auto: as in runs/a/step-00000002; a new run would use bf16 here, as this CPU has bf16"),
        ("bf16", LACKS, CPU, "would use fp32 here, as this CPU has no bf16 instructions, and bf16 takes two to nine"),
        ("bf16", OLD_GPU, GPU, "would use fp16 here, as this GPU has no bf16 instructions, and bf16 takes several"),
    ],
)
def test_a_resumed_run_keeps_its_checkpoints_on_any_machine(saved, best, device, because):
    found = keep_saved_dtype(SavedDtype("runs/a/step-00000002", saved), best, device)
    assert found.dtype == saved
    assert because in found.because


def test_a_resumed_run_at_stage_0_is_not_said_to_be_in_bf16_if_it_were_new(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LDT_CPU_BF16", "1")
    monkeypatch.setattr(train.loop.dtype, "saved_dtype", lambda paths: SavedDtype("step-00000002", "fp32"))
    engine = {"zero_stage": 0, "offload": "none", "dtype": "auto"}
    assert resolve_dtype(engine, CheckpointPaths.of(tmp_path, None), Ranks(0, 1, 0, CPU)).dtype == "fp32"
    assert capsys.readouterr().out == "dtype: fp32 (auto: as in step-00000002)\n"


def test_a_checkpoint_in_fp16_needs_a_gpu():
    with pytest.raises(UserError, match=r"needs a GPU.*with engine\.dtype=fp32 training\.allow_mismatch=\[dtype\]"):
        keep_saved_dtype(SavedDtype("runs/a/step-00000002", "fp16"), LACKS, CPU)


def test_bf16_by_name_is_taken_and_its_cost_said(tmp_path, caplog, capsys, monkeypatch):
    paths, alone, engine = CheckpointPaths.of(tmp_path, None), Ranks(0, 1, 0, CPU), {"zero_stage": 1, "offload": "none"}
    monkeypatch.setenv("LDT_CPU_BF16", "0")
    assert resolve_dtype({**engine, "dtype": "bf16"}, paths, alone) == ("bf16", "set by engine.dtype")
    assert "engine.dtype=bf16: LDT_CPU_BF16=0" in caplog.text
    assert "two to nine times as long" in caplog.text
    caplog.clear()
    monkeypatch.setenv("LDT_CPU_BF16", "1")
    assert resolve_dtype({**engine, "dtype": "bf16"}, paths, alone).dtype == "bf16"
    assert resolve_dtype({**engine, "dtype": "fp32"}, paths, alone).dtype == "fp32"
    assert caplog.text == capsys.readouterr().out == ""
    assert resolve_dtype({**engine, "dtype": "auto"}, paths, alone).dtype == "bf16"
    assert capsys.readouterr().out == "dtype: bf16 (auto: LDT_CPU_BF16=1 treats this CPU as one with bf16)\n"


RANK = """
import json, sys
import torch
import torch.distributed as dist
from pathlib import Path
from train.checkpointing.files import CheckpointPaths
from train.loop.dtype import resolve_dtype
from train.distributed.ranks import Ranks
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
engine = {"dtype": "auto", "zero_stage": 1, "offload": "none"}
found = resolve_dtype(engine, CheckpointPaths.of(folder, None), Ranks(rank, 2, rank, torch.device("cpu")))
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.processes
def test_two_machines_of_one_run_agree(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), tmp_path], env={**os.environ, "LDT_CPU_BF16": has})
        for rank, has in enumerate("10")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][0] == "fp32"
    assert "at rank(s) 1; the others could use bf16" in found[0][1]
