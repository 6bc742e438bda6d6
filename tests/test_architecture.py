"""Import rules (docs/architecture.md). Checked on the source text, so nothing needs to be imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in ("train", "data_pipeline") for p in (ROOT / folder).rglob("*.py"))

# Third-party package -> the only files that may import it.
OWNERS = {
    "deepspeed": {"train/engine/deepspeed_engine.py"},
    "wandb": {"train/runs/wandb_reporter.py"},
    "xformers": {"train/models/attention.py"},
    "open_clip": {"train/models/open_clip_alone.py"},
    "pyarrow": {"data_pipeline/sources/table_rows.py"},
    "diffusers": set(),
    # Only the first imports by names that are read from files (docs/security.md); the second imports the script that
    # runs; the others look up their own package's files.
    "importlib": {
        "data_pipeline/common/saved_objects.py",
        "data_pipeline/common/composition.py",
        "data_pipeline/images/grid.py",
        "data_pipeline/sources/openmoji.py",
        "data_pipeline/sources/emoji_styles.py",
        "train/weights/perceptual.py",
    },
    "transformers": {"train/weights/hf_text.py"},
}
# Beside the entry scripts, the only files that may import hydra: what stands before them.
COMMAND_LINE = ("data_pipeline/common/composition.py", "data_pipeline/common/command_line.py")
OPENS_URLS = ("fsspec", "s3fs", "aiohttp", "botocore", "aiobotocore", "boto3", "urllib", "urllib3", "requests", "httpx")
OWNERS |= {package: {"data_pipeline/common/s3.py"} for package in (*OPENS_URLS, "http", "smart_open")}
# Folder -> folders of the same package that it may import. An entry script may import any folder, but no other script.
FOLDERS = {
    "data_pipeline/common": "",
    "data_pipeline/images": "common",
    "data_pipeline/shards": "common images",
    "data_pipeline/sources": "common images shards",
    "data_pipeline/loading": "common images shards",
    "data_pipeline/encode": "common images shards",
    "data_pipeline/audit": "common images shards encode",
    "train/distributed": "",
    "train/diffusion": "",
    "train/models": "",
    "train/engine": "distributed",
    "train/objectives": "models diffusion distributed",
    "train/checkpointing": "engine distributed",
    "train/weights": "models checkpointing",
    "train/runs": "checkpointing distributed",
    "train/loop": "engine checkpointing runs distributed",
    "train/data": "models weights diffusion",  # diffusion: whether a model to start from knows the run's process
    "train/evaluation": "objectives models diffusion runs distributed engine",
    "train/sampling": "data objectives models diffusion checkpointing runs engine weights",  # weights: of decoder=
}
# train/ may import only modules of data_pipeline/ whose names begin with one of these.
FOR_TRAINING = (
    "common",
    "images",
    "shards.data_sets",  # one or several data sets that are read as one
    "shards.input_option",  # what input= of a training names
    "shards.manifest",
    "shards.samples",
    "shards.caption_edits",  # evaluation edits captions as they were for training
    "shards.json_fields",  # the sizes that a run is conditioned on, and their means
    "shards.provenance",
    "loading.batch",
    "encode.encoders",
)
GUARD = '\nif __name__ == "__main__"'
ENTRIES = {p for p in FILES if p.parent.parent == ROOT and GUARD in p.read_text()}  # not train/distributed/launch.py
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


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


def foreign(path: Path) -> list[str]:
    """Packages that only other files may import."""
    here, packages = name(path), {(module.partition(".")[0], module) for module in imports(path)}
    bad = [module for package, module in packages if package in OWNERS and here not in OWNERS[package]]
    if here not in COMMAND_LINE and path not in ENTRIES:
        bad += [module for package, module in packages if package in ("hydra", "omegaconf")]
    return bad


def violations(path: Path) -> list[str]:
    bad = foreign(path)
    folder = name(path.parent)
    package, _, own = folder.partition("/")
    for module in imports(path) & MODULES.keys():
        other, _, below = module.partition(".")
        if other != package:
            if package == "data_pipeline" or not below.startswith(FOR_TRAINING):
                bad.append(module)
        elif MODULES[module] in ENTRIES:
            bad.append(module)
        elif folder in FOLDERS:
            bad += [module] if below.partition(".")[0] not in (own, *FOLDERS[folder].split()) else []
    return bad


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_keep_to_the_layers(path: Path) -> None:
    assert violations(path) == []


def test_a_violation_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    wrong = tmp_path / "data_pipeline" / "wrong.py"
    wrong.parent.mkdir()
    wrong.write_text("import deepspeed\nfrom train.models import unet\nfrom data_pipeline import make_shards\n")
    assert {"deepspeed", "train.models.unet", "data_pipeline.make_shards"} <= set(violations(wrong))


def test_every_folder_has_its_line() -> None:
    folders = {name(path.parent) for path in FILES}
    assert folders == {*FOLDERS, "train", "data_pipeline"}
    known: set[str] = set()
    for folder, allowed in FOLDERS.items():  # only folders from lines above, so there is no cycle
        package = folder.partition("/")[0]
        assert {f"{package}/{each}" for each in allowed.split()} <= known, folder
        known.add(folder)
    scripts = {path for path in FILES if name(path.parent) in ("train", "data_pipeline") and path.stem != "__init__"}
    assert scripts == ENTRIES  # all other modules are in a folder


@pytest.mark.parametrize("folder", ["train", "data_pipeline"])
def test_no_script_hides_a_module_of_the_standard_library_or_a_dependency(folder: str) -> None:
    """`python train/x.py` puts train/ first in sys.path."""
    taken = set(sys.stdlib_module_names) | {"torch", "train", "data_pipeline", "numpy", "wandb", "hydra", "webdataset"}
    assert not {p.stem for p in (ROOT / folder).iterdir()} & taken
