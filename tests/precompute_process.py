"""Precompute processes that tests start, stop and kill. They start fast: forked from one with all imports done."""

from __future__ import annotations

import multiprocessing
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import torch

from data_pipeline.common.stop_request import StopRequest
from data_pipeline.encode.batch_encoder import Encoders
from data_pipeline.encode.caption_cache import CaptionCache
from data_pipeline.encode.conditions import LowResolution
from data_pipeline.encode.encoders import TextStates
from data_pipeline.encode.latent_dataset import SplitToEncode
from data_pipeline.encode.latent_shard import OutputPaths
from data_pipeline.encode.shard_reader import ShardReader
from data_pipeline.encode.split_encoder import encode_split
from data_pipeline.encode.text_conditions import Text
from data_pipeline.encode.workers import Worker
from data_pipeline.images.aspect_buckets import sizes_of
from data_pipeline.shards.manifest import Manifest
from train.models.autoencoder import AutoencoderKL

SMALL = {"latent_channels": 4, "channels": [8, 16], "layers_per_block": 1, "norm_groups": 4, "mid_attention": True}


class Table:
    """A text encoder: one row per letter, then a matrix product, whose last bits depend on the rest of the batch."""

    fingerprint = "table"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.mix = torch.randn(128, 24, generator=generator), torch.randn(24, 24, generator=generator)

    def encode_text(self, captions) -> TextStates:
        letters = torch.tensor([[ord(letter) % 128 for letter in caption.ljust(8)[:8]] for caption in captions])
        tokens = torch.tanh(self.rows[letters] @ self.mix)
        return TextStates(tokens, tokens.mean(1))


def table_at(path: str) -> Table:
    """Builds a table, as a configuration builds a CLIP."""
    return Table()


def encoders(dtype: str = "float32", batch_size: int = 4) -> Encoders:
    """A small random autoencoder and a table, the same in every process."""
    torch.manual_seed(0)
    image = AutoencoderKL(**SMALL).eval()
    image.fingerprint = "random"
    conditions = {"text": Text(), "low_resolution": LowResolution(2)}
    return Encoders(image, CaptionCache(Table(), batch_size), conditions, torch.device("cpu"), batch_size, dtype, True)


def split_of(images: str, output: str) -> SplitToEncode:
    source, using = Manifest.load(images, "image-text"), encoders()
    reader = ShardReader(images, using, sizes_of(None, None, 64, 2), threads=2)
    return SplitToEncode("", source, OutputPaths(output), reader)


def work(images: str, output: str, number: int, workers: int, ready: Event, go: Event) -> None:
    """What each process runs once `go` is set."""
    torch.set_num_threads(1)
    split, stop = split_of(images, output), StopRequest()
    ready.set()
    go.wait()
    encode_split(split, Worker(number, workers), stop)


def started(images: str, output: object, number: int = 0, workers: int = 1) -> BaseProcess:
    """A process that is encoding."""
    process, go = prepared(images, output, number, workers)
    go.set()
    return process


def prepared(images: str, output: object, number: int, workers: int) -> tuple[BaseProcess, Event]:
    """A process that is ready and encodes when its event is set. Each has its own event, because a process that is
    killed may keep the event's lock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "data_pipeline.encode.split_encoder", "train.models.autoencoder"])
    ready, go = context.Event(), context.Event()
    process = context.Process(target=work, args=(images, str(output), number, workers, ready, go), daemon=True)
    process.start()
    if not ready.wait(60):
        raise AssertionError("the process did not come up")
    return process, go


def finished(process: BaseProcess, code: int = 0) -> None:
    """Waits for a process to end with exit code `code`."""
    process.join(60)
    if process.exitcode != code:
        raise AssertionError(f"exit code {process.exitcode}, not {code}")
