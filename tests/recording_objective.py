"""The latent diffusion objective, which also records what it trains on: objective._target_=recording_objective..."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from data_pipeline.loading.batch import Batch
from train.diffusion.randomness import StreamRandom
from train.objectives.latent_diffusion import LatentDiffusion
from train.objectives.terms import LossTerms


class RecordingObjective(LatentDiffusion):
    """<records>/<process>.jsonl: for each micro-batch its step, and per stream its keys and digests of draws."""

    def __init__(self, *args, records: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.path = Path(records) / f"{os.getpid()}.jsonl"
        self.path.parent.mkdir(exist_ok=True)

    def noise(self, random: StreamRandom, x0: Tensor) -> Tensor:
        self.drawn = super().noise(random, x0)
        return self.drawn

    def times(self, batch: Batch, random: StreamRandom) -> Tensor:
        self.at = super().times(batch, random)
        return self.at

    def forward(self, batch: Batch) -> LossTerms:
        terms, each = super().forward(batch), len(batch) // len(batch.streams)
        streams = {}
        for i, stream in enumerate(batch.streams):
            rows = slice(i * each, (i + 1) * each)
            draws = [hashlib.sha256(drawn[rows].numpy().tobytes()).hexdigest() for drawn in (self.drawn, self.at)]
            streams[stream] = [*batch.keys[rows], *draws]
        with self.path.open("a") as file:
            file.write(json.dumps({"step": batch.step, "streams": streams}) + "\n")
        return terms


def read_records(folder: Path) -> dict[tuple[int, int], list[str]]:
    """(step, stream) -> keys, and digests of noise and times; asserts that repetitions are equal."""
    found: dict[tuple[int, int], list[str]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for stream, drawn in row["streams"].items():
                assert found.setdefault((row["step"], int(stream)), drawn) == drawn
    return found
