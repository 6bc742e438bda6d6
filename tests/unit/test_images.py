"""slurm/Dockerfile and slurm/apptainer.def, which can't be built here: of one base, with what container.sh reads."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FILES = ["pyproject.toml", "constraints.txt", "slurm/container.sh"]


def test_both_images_are_made_alike() -> None:
    docker, apptainer = (ROOT / "slurm/Dockerfile").read_text(), (ROOT / "slurm/apptainer.def").read_text()
    assert re.findall(r"^FROM (\S+)", docker, re.MULTILINE) == re.findall(r"^From: (\S+)", apptainer, re.MULTILINE)
    assert f"COPY {' '.join(FILES)} /opt/ldt/\n" in docker
    assert [line.split()[0] for line in apptainer.splitlines() if line.startswith("    ") and "/opt/ldt/" in line] == [
        *FILES,
        "sh",
    ]
    assert (
        docker.count("sh /opt/ldt/container.sh /opt/ldt") == apptainer.count("sh /opt/ldt/container.sh /opt/ldt") == 1
    )


def test_the_requirements_are_those_of_pyproject() -> None:
    (program,) = re.findall(r"<<'PYTHON'\n(.*)PYTHON\n", (ROOT / "slurm/container.sh").read_text(), re.DOTALL)
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [Requirement(line).name for line in said.splitlines()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names == [Requirement(line).name for line in project["dependencies"]] + ["pyarrow"]
