"""Run all stages on a small real data set, with the commands that a user would type; finished stages are skipped."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.quickstart")  # checks the options, runs main() and exits

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipeline.common.errors import UserError
from data_pipeline.common.finite_json import json_of
from data_pipeline.common.stop_request import EXIT_CODE, Stopped, StopRequest
from data_pipeline.common.storage import write_atomically

REPO = Path(__file__).resolve().parents[1]
WHAT = {
    "make_shards": "draw OpenMoji's pictures and write them with their names as image-text shards",
    "train_autoencoder": "train the first stage: pictures to latents and back",
    "train_clip": "train the text encoder on pairs of pictures and names",
    "precompute_latents": "encode all pictures and names once",
    "train_ldm": "train the U-Net to draw latents from names",
    "sample_images": "draw pictures for a few prompts",
    "evaluate_ldm": "draw training and held-out names, and compare with the real pictures",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A script with its arguments, as typed in the repository root."""

    script: str
    arguments: Sequence[str]

    @property
    def name(self) -> str:
        return Path(self.script).stem

    @property
    def command(self) -> list[str]:
        return [self.script, *self.arguments]

    def note(self, output: Path) -> Path:
        """The file that is written when the stage has finished."""
        return output / "finished" / f"{self.name}.json"


def stages(output: str, extra: DictConfig) -> list[Stage]:
    """All stages, with results under `output`; `extra` has additional arguments for each stage."""
    shards, latents, autoencoder, clip, ldm = (
        f"{output}/{name}" for name in ("shards", "latents", "autoencoder", "clip", "ldm")
    )
    encoders = [f"autoencoder.path={autoencoder}", f"clip.path={clip}"]
    chain = (
        ("data_pipeline/make_shards.py", [f"output={shards}"]),
        ("train/train_autoencoder.py", [f"input={shards}", f"output={autoencoder}"]),
        ("train/train_clip.py", [f"input={shards}", f"output={clip}"]),
        ("data_pipeline/precompute_latents.py", [f"input={shards}", f"output={latents}", *encoders]),
        ("train/train_ldm.py", [f"input={latents}", f"output={ldm}", *encoders]),
        ("train/sample_images.py", [f"input={ldm}"]),
        ("train/evaluate_ldm.py", [f"input={ldm}", f"shards={shards}"]),
    )
    return [Stage(script, [*arguments, *extra[Path(script).stem]]) for script, arguments in chain]


def main(cfg: DictConfig) -> None:
    chain = stages(cfg.output, cfg.demo)
    names = [stage.name for stage in chain]
    if cfg.only is not None and cfg.only not in names:
        raise UserError(f"only={cfg.only} is not a stage: use one of {', '.join(names)}.")
    asked = chain if cfg.only is None else chain[: names.index(cfg.only) + 1]
    print_plan(asked, Path(cfg.output), cfg.demo.measured)
    notes = run_chain(chain, Path(cfg.output), cfg.only)
    say_minutes(notes)
    if cfg.only is None:
        summarise(Path(cfg.output), notes)


def print_plan(chain: Sequence[Stage], output: Path, measured: DictConfig) -> None:
    """Print the stages to run, with their estimated minutes on this machine, by a calibration of 3 seconds."""
    left = [finished_before(stage, output) is None for stage in chain]
    ahead = [stage.name for stage in chain[left.index(True) :]] if any(left) else []  # all later stages run again
    if not ahead:
        return
    from train.engine.calibration import calibration_seconds  # here, as torch takes two seconds to import

    slowness = calibration_seconds() / measured.calibration_s
    minutes = expected_minutes(ahead, measured.minutes, slowness)
    print(
        f"quickstart: {len(ahead)} of {len(chain)} stages will run, for about {sum(minutes.values()):.1f} minutes on "
        f"this machine (a calibration took {slowness:.1f} times as long as on the machine of docs/demo.md)"
    )
    for name, expected in minutes.items():
        print(f"  {name:<20} {expected:5.1f} min  {WHAT[name]}")
    sys.stdout.flush()


def expected_minutes(names: Sequence[str], measured: Mapping[str, float], slowness: float) -> dict[str, float]:
    """Minutes of each stage, from those of a measured run and how many times slower this machine is."""
    return {name: slowness * measured[name] for name in names}


def say_minutes(notes: dict[str, dict[str, Any]]) -> None:
    """Print the minutes of each stage."""
    print("\nquickstart: minutes taken")
    for name, note in notes.items():
        print(f"  {name:<20} {note['seconds'] / 60:5.1f} min")


def run_chain(chain: Sequence[Stage], output: Path, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Run the stages in order, up to `only`, skipping finished ones; returns each stage's note."""
    notes = {}
    for number, stage in enumerate(chain, 1):
        note, place = finished_before(stage, output), f"[{number}/{len(chain)}]"
        if note is None:
            for later in chain[number - 1 :]:  # they depend on this stage's output
                later.note(output).unlink(missing_ok=True)
            note = run_stage(stage, output, place)
        else:
            print(f"{place} {stage.name}: already finished", flush=True)
        notes[stage.name] = note
        if stage.name == only:
            break
    return notes


def finished_before(stage: Stage, output: Path) -> dict[str, Any] | None:
    """The note of this stage, if the same command has finished before: its seconds, and its peak memory."""
    path = stage.note(output)
    note = json.loads(path.read_text()) if path.exists() else {}
    return note if note.get("command") == stage.command else None


def run_stage(stage: Stage, output: Path, place: str) -> dict[str, Any]:
    """Run the stage, and record that it has finished."""
    command = stage.command
    typed = " ".join(part if all(c not in part for c in " '[]") else f'"{part}"' for part in command)
    print(f"\n{place} python {typed}", flush=True)
    started = time.monotonic()
    code = finished_code([sys.executable, *command])
    if code:
        print(
            f"quickstart: {stage.name} failed with exit code {code}; fix the error and start again to continue",
            file=sys.stderr,
        )
        sys.exit(code)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of this or an earlier stage
    note = {"command": command, "seconds": time.monotonic() - started, "peak_memory_gb": peak}
    write_atomically(stage.note(output), json.dumps(note).encode())
    return note


def finished_code(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code; Stopped if this process was asked to stop meanwhile.

    The stage also gets Ctrl-C, and says how to continue. It does not get SIGTERM, which is passed on.
    """
    stop, passed_on = StopRequest().hear_interrupts(), False
    stage = subprocess.Popen(command, cwd=REPO)
    while stage.poll() is None:
        try:
            stage.wait(0.2)
        except subprocess.TimeoutExpired:
            if stop.requested and not passed_on:
                stage.terminate()
                passed_on = True
    if stop.requested:
        if stage.returncode != EXIT_CODE:
            print("quickstart: stopped by a signal; start the same command again to continue", file=sys.stderr)
        raise Stopped
    return stage.returncode


def summarise(output: Path, notes: dict[str, dict[str, Any]]) -> None:
    """Write the demo's figures to <output>/summary.json, and print them."""
    autoencoder = json.loads((output / "autoencoder/config.json").read_text())
    clip = json.loads((output / "clip/config.json").read_text())
    evaluation = json.loads((output / "ldm/evaluation/evaluation.json").read_text())
    heldout = [
        row["heldout_loss"]
        for row in map(json.loads, (output / "ldm/metrics.jsonl").read_text().splitlines())
        if "heldout_loss" in row
    ]
    summary = {
        **{name: evaluation[name] for name in evaluation if name.endswith(("top1", "top5"))},
        "heldout_psnr_db": autoencoder["heldout_psnr_db"],
        "clip_train_retrieval_top1": clip["train_retrieval_top1"],
        "clip_heldout_retrieval_top5": clip["heldout_retrieval_top5"],
        "heldout_loss": heldout[-1],
        "minutes": {name: round(note["seconds"] / 60, 2) for name, note in notes.items()},
        "minutes_in_all": round(sum(note["seconds"] for note in notes.values()) / 60, 1),
        "peak_memory_gb": round(max(note["peak_memory_gb"] for note in notes.values()), 2),
    }
    write_atomically(output / "summary.json", json_of(summary))
    print(f"\nquickstart: done in {summary['minutes_in_all']} minutes, peak memory {summary['peak_memory_gb']} GB")
    print(
        f"  recall of training captions  top-1 {summary['training_recall_top1']:.2f}, top-5 "
        f"{summary['training_recall_top5']:.2f} (shuffled: {summary['shuffled_captions_top1']:.2f}, "
        f"{summary['shuffled_captions_top5']:.2f})"
    )
    print(f"  held-out PSNR of the autoencoder  {summary['heldout_psnr_db']:.2f} dB")
    print(f"  held-out loss of the denoiser     {summary['heldout_loss']:.4f}")
    for what, where in (
        ("drawn beside real", "ldm/evaluation/beside_real.png"),
        ("drawn, with captions", "ldm/evaluation/drawn.png"),
        ("held-out captions", "ldm/evaluation/heldout.png"),
        ("grids during training", "ldm/samples/"),
        ("curves", "ldm/curves.png"),
        ("all figures", "summary.json"),
    ):
        print(f"  {what:<24} {output / where}")
