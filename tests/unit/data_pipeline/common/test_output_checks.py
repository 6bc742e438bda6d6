"""An output that can't be written is refused before any work, and trying it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.common.output_checks import refuse_unwritable_outputs


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    else:
        yield folder
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("program", "more"),
    [("make_shards", {}), ("precompute_latents", {}), ("train_ldm", {}), ("plan_storage", {}), ("quickstart", {}),
     ("export_diffusers", {}), ("rebuild_ema", {}), ("verify_shards", {}), ("train_ldm", {"training": {}})],
)  # fmt: skip
def test_read_only_and_in_the_way(program: str, more: dict[str, object], read_only: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for path in (read_only / "x", tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(UserError, match=f"^output={path} can't be written: .*; choose another path"):
            refuse_unwritable_outputs({"input": "a", "output": str(path), **more}, program)
    refuse_unwritable_outputs({"input": "a", "output": str(tmp_path / "new/deeper"), **more}, program)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_places_and_defaults(read_only: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output=.*read_only/drawn can't be written"):
        refuse_unwritable_outputs({"input": str(read_only), "output": None}, "sample_images")
    with pytest.raises(UserError, match=r"^training\.checkpoints=.* can't be written"):
        refuse_unwritable_outputs({"output": "a", "training": {"checkpoints": str(read_only / "c")}}, "train_clip")
    with pytest.raises(UserError, match=r"^output=.*/file can't be written: it is a file"):
        refuse_unwritable_outputs({"input": "a", "output": str(tmp_path / "file")}, "make_shards")
    with pytest.raises(UserError, match=r"^single_file=.* can't be written: it is a folder"):
        refuse_unwritable_outputs({"output": str(tmp_path / "new"), "single_file": str(tmp_path)}, "export_diffusers")
    refuse_unwritable_outputs({"input": str(read_only), "output": None}, "plan_storage")  # writes nothing
    refuse_unwritable_outputs({"output": "s3://bucket/x"}, "make_shards")


def test_a_data_set_that_is_there_may_be_finished(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/manifest.json").write_text("{}")
    (tmp_path / "train").chmod(0o500)
    refuse_unwritable_outputs({"output": str(tmp_path)}, "make_shards")
