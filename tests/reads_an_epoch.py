"""One process of a node, for tests: ROOT FOLDER. Reads an epoch of ROOT once FOLDER/go exists."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from loaders import loader_of

from data_pipeline.shards.manifest import Manifest

BATCH, STREAMS = 8, 8

root, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
batches = iter(loader_of(root, BATCH, STREAMS, cache_mb=0, prefetch=0))
for _ in range(Manifest.load(root).samples // BATCH):
    next(batches)
