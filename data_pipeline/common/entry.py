"""How every entry script starts, and where conf/ lies.

A script begins with `if __name__ == "__main__": start_entry("train.train_ldm")`. That composes the configuration.
`--help` and errors of composition (no such option, a missing `input=`) are answered by Hydra alone, in well under a
second. When the options are right, the script is imported by its module's name, with everything below those two
lines, such as torch; its `main(cfg)` is called, and the process ends. So scripts import at their top as modules do.

Packages that take seconds and that few runs need are imported in the function that uses them: deepspeed by `Engine`,
open_clip by `train/models/open_clip_alone.py`, wandb, matplotlib, s3fs, pyarrow and webdataset by their owners. So a
value that a dataclass refuses costs the import of torch and little more.
`tests/unit/test_what_is_imported.py` checks both for all entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from data_pipeline.common.caches import keep_caches_in_venv
from data_pipeline.common.stop_request import InterruptWatch

CONF = str(Path(__file__).resolve().parents[2] / "conf")


def start_entry(module: str) -> NoReturn:
    """Compose conf/<last part of the module's name>.yaml, import the module, call its `main(cfg)`, and end the process.

    A UserError ends it with its one sentence on stderr and its exit code; anything else keeps its traceback.
    """
    InterruptWatch.begin(module.rpartition(".")[2])  # before Hydra is imported: that takes half a second
    keep_caches_in_venv()
    from data_pipeline.common.composition import run_entry

    run_entry(module)
