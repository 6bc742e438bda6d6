"""Send all of a run's metrics.jsonl to a new W&B run: for use when the original W&B run lacks some of it."""

from __future__ import annotations

from data_pipeline.common.entry import start_entry

if __name__ == "__main__":
    start_entry("train.replay_metrics")  # checks the options, runs main() and exits

from pathlib import Path

from omegaconf import DictConfig

from data_pipeline.common.errors import UserError
from data_pipeline.common.progress import Progress
from data_pipeline.common.saved_objects import read_config
from train.runs.metrics import read_metrics, rows_by_step
from train.runs.wandb_reporter import WeightsAndBiases


def main(cfg: DictConfig) -> None:
    run = Path(cfg.input)
    for name in ("metrics.jsonl", "run_id", "config.yaml"):
        if not (run / name).exists():
            raise UserError(
                f"input={run} is not a run's folder, as {name} is missing: use the output= of a training run."
            )
    rows = list(rows_by_step(read_metrics(run / "metrics.jsonl"), run / "samples"))
    config = read_config(run / "config.yaml")
    project = cfg.project or config["training"].get("wandb_project")
    if not project:
        raise UserError("the run has no training.wandb_project: add project=....")
    run_id = cfg.run_id or f"{(run / 'run_id').read_text().split()[1]}-replayed"
    folder = Path(cfg.output or run)
    folder.mkdir(parents=True, exist_ok=True)
    wandb = WeightsAndBiases(folder, run_id, config, project, name=run_id, queue_size=0, patience_s=None)
    with Progress("replay", len(rows), "steps") as bar:
        for row in rows:
            wandb.log(row["step"], row)
            bar.advance(1)
        wandb.close()
    if wandb.error is not None:
        raise UserError(f"W&B did not receive all steps ({wandb.error}): fix the cause, and start again.")
    print(f"replay: {len(rows)} steps sent to W&B as run {run_id} of {project}; files in {folder}/wandb", flush=True)
