"""Who may import whom (docs/architecture.md). Read from the sources, so that nothing needs to be imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in ("train", "data_pipeline") for p in (ROOT / folder).rglob("*.py"))

# Foreign package -> the only files that may import it.
OWNERS = {
    "deepspeed": {"train/engine.py"},
    "wandb": {"train/reporters.py"},
    "xformers": {"train/models/attention.py"},
    "open_clip": {"train/models/open_clip_alone.py"},
    "pyarrow": {"data_pipeline/sources/table.py"},
    "diffusers": set(),
    # By name: what a file names only in the first (docs/security.md), the script that runs in the second; the others
    # look for their own package's files.
    "importlib": {
        "train/saved_objects.py",
        "data_pipeline/entry.py",
        "data_pipeline/picture_grid.py",
        "data_pipeline/sources/openmoji.py",
        "data_pipeline/sources/emoji_styles.py",
    },
    "transformers": set(),
}
OPENS_URLS = ("fsspec", "s3fs", "aiohttp", "botocore", "aiobotocore", "boto3", "urllib", "urllib3", "requests", "httpx")
OWNERS |= {package: {"data_pipeline/bucket.py"} for package in (*OPENS_URLS, "http", "smart_open")}
FROM_DATA_PIPELINE = {
    "samples",
    "manifest",
    "storage",
    "errors",
    "progress",
    "entry",
    "codec",
    "picture_grid",
    "saved_names",
}
ENTRIES = {p for p in FILES if 'if __name__ == "__main__"' in p.read_text()}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def violations(path: Path) -> list[str]:
    here, used = name(path), imports(path)
    bad = []
    for package, owners in OWNERS.items():
        if here not in owners:
            bad += [m for m in used if m.partition(".")[0] == package]
    if here != "data_pipeline/entry.py" and path not in ENTRIES:
        bad += [m for m in used if m.partition(".")[0] in ("hydra", "omegaconf")]
    if here.startswith("data_pipeline/"):
        bad += [m for m in used if m.partition(".")[0] == "train"]
    else:
        bad += [m for m in used if m.startswith("data_pipeline.") and m.split(".")[1] not in FROM_DATA_PIPELINE]
    for layer, other in (("models", "diffusion"), ("diffusion", "models")):
        if here.startswith(f"train/{layer}/"):
            allowed = (f"train.{layer}", "train.torchvision_beside_cpu_torch")
            bad += [m for m in used if m.startswith("train.") and not m.startswith(allowed)]
            assert not any(m.startswith(f"train.{other}") for m in used), here
    if here == "train/trainer.py":
        bad += [m for m in used if m.startswith(("train.models", "train.diffusion", "train.objectives"))]
    return bad


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_keep_to_the_layers(path: Path) -> None:
    assert violations(path) == []


def test_a_violation_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    wrong = tmp_path / "data_pipeline" / "wrong.py"
    wrong.parent.mkdir()
    wrong.write_text("import deepspeed\nfrom train.models import unet\n")
    assert {"deepspeed", "train.models"} <= set(violations(wrong))


@pytest.mark.parametrize("folder", ["train", "data_pipeline"])
def test_no_script_hides_a_module_of_the_standard_library_or_a_dependency(folder: str) -> None:
    """`python train/x.py` puts train/ first on sys.path."""
    taken = set(sys.stdlib_module_names) | {"torch", "train", "data_pipeline", "numpy", "wandb", "hydra", "webdataset"}
    assert not {p.stem for p in (ROOT / folder).iterdir()} & taken
