"""Runs img2dataset itself, in a separate interpreter as it pins old packages, on pictures served on loopback."""

from __future__ import annotations

import csv
import functools
import http.server
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

TALLY = {"good": 14, "missing": 3, "broken": 2}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def make_pictures(folder: Path) -> list[str]:
    """Smooth pictures of different sizes and formats, two broken ones, and the names of three missing ones."""
    folder.mkdir(parents=True)
    names = []
    for i in range(TALLY["good"]):
        ending = ("jpg", "png", "webp")[i % 3]
        waves = np.sin(np.linspace(0, 3 + i, 40 + 8 * i))[None, :, None] * np.cos(np.linspace(0, 2, 64))[:, None, None]
        pixels = np.uint8(127 + 120 * np.concatenate([waves, -waves, waves * waves], -1))
        Image.fromarray(pixels).save(folder / f"p{i:02d}.{ending}")
        names.append(f"p{i:02d}.{ending}")
    for i in range(TALLY["broken"]):
        (folder / f"broken{i}.jpg").write_bytes(b"no picture at all" * 9)
        names.append(f"broken{i}.jpg")
    return names + [f"gone{i}.jpg" for i in range(TALLY["missing"])]


def run(interpreter: str, root: Path, shard_size: int = 8, **options: str) -> Path:
    """The folder of tars that img2dataset makes of the pictures, each with a caption and a number."""
    names = make_pictures(root / "served")
    with served(root / "served") as address:
        with open(root / "list.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["url", "caption", "aesthetic"])
            rows.writerows([f"{address}/{name}", f"picture {name}", i / 2] for i, name in enumerate(names))
        given = {"input_format": "csv", "url_col": "url", "caption_col": "caption", "output_format": "webdataset",
                 "save_additional_columns": "['aesthetic']", "number_sample_per_shard": str(shard_size),
                 "image_size": "48", "resize_mode": "keep_ratio", "processes_count": "1", "thread_count": "4",
                 "enable_wandb": "False"} | options  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in given.items()]
        command = [interpreter, "-m", "img2dataset.main", f"--url_list={root / 'list.csv'}",
                   f"--output_folder={root / 'tars'}", *arguments]  # fmt: skip
        alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        alone["NO_ALBUMENTATIONS_UPDATE"] = "1"
        done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "tars"


if __name__ == "__main__":
    print(run(sys.argv[1], Path(tempfile.mkdtemp())))
