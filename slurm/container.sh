#!/bin/sh
# Installs what the image needs, for slurm/Dockerfile and slurm/apptainer.def alike; once, when the image is built:
#
#   sh container.sh DIRECTORY      with pyproject.toml and constraints.txt in it
#
# Only the dependencies: the code is that of the checkout, so that an edit needs no new image.
set -eu
cd "$1"

apt-get update
# g++: torch.compile, and DeepSpeed's kernels; the others: InfiniBand, as NCCL loads libibverbs
apt-get install -y --no-install-recommends g++ ibverbs-providers libibverbs1 librdmacm1
rm -rf /var/lib/apt/lists/*

python - >requirements.txt <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["parquet"], sep="\n")
PYTHON
python -m pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
