"""The plots of docs/maths.md, drawn by the functions that the page describes: python docs/plots.py [folder].

Nothing is written again here: processes, weightings and times are those of conf/, samplers those that draw pictures.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from data_pipeline.images.grid import save_png
from train.diffusion import samplers
from train.diffusion.parameterization import Flow
from train.diffusion.process import CosineVP, DiffusionProcess, RectifiedFlow, half_log_snr, time_at_noise
from train.diffusion.time_sampling import stratified
from train.engine.ema import Ema
from train.engine.optimizer import SCHEDULES, Schedule

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))  # lines that coincide can be told apart
SPACINGS = {
    "uniform_times": samplers.uniform_times,
    "trailing_times": samplers.trailing_times,
    "karras_times": samplers.karras_times,
}
SAMPLERS = {
    name: getattr(samplers, f"sample_{name}") for name in ("ddpm", "euler", "ddim", "heun", "dpmpp_2m", "unipc")
}


def option(group: str, name: str, **changes: Any) -> Any:
    """What group=name of the configuration builds."""
    return instantiate(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"), **changes)


def options(group: str) -> dict[str, Any]:
    """All of a group, by name."""
    return {path.stem: option(group, path.stem) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))}


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes in reading order, each with a light grid."""
    layout = {"figsize": (width, height), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(rows, columns, **layout, **shared)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, list(axes.flat)


def saved(figure: Figure, path: Path) -> Path:
    """As a PNG of 64 colours, which is a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot.close(figure)
    return save_png(Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE), path)


def along(process: DiffusionProcess, points: int = 500) -> tuple[Tensor, Tensor]:
    """Fractions from data to noise, and the times there."""
    fraction = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    return fraction, process.start + fraction * (process.end - process.start)


def processes(folder: Path) -> Path:
    """alpha and sigma of every process."""
    figure, axes = panels(1, 2, 9.5, 4.3, sharey=True)
    for style, (name, process) in zip(STYLES, options("process").items(), strict=True):
        fraction, t = along(process)
        axes[0].plot(fraction, process.alpha(t), linestyle=style, label=name)
        axes[1].plot(fraction, process.sigma(t), linestyle=style)
    axes[0].set(title="alpha, the signal", xlabel="way from data (0) to noise (1)", ylabel="coefficient")
    axes[1].set(title="sigma, the noise", xlabel="way from data (0) to noise (1)")
    figure.legend(loc="outside lower center", ncols=4)
    return saved(figure, folder / "processes.png")


def signal_to_noise(folder: Path) -> Path:
    """lambda of every process, but at its ends where it is infinite."""
    figure, (axis,) = panels(1, 1, 9.5, 4.0)
    for style, (name, process) in zip(STYLES, options("process").items(), strict=True):
        fraction, t = along(process)
        axis.plot(fraction[1:-1], half_log_snr(process, t[1:-1]), linestyle=style, label=name)
    axis.set(xlabel="way from data (0) to noise (1)", ylabel="lambda = log(alpha / sigma)", ylim=(-8, 6), xlim=(0, 1))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return saved(figure, folder / "log_snr.png")


def weights(folder: Path) -> Path:
    """Each weighting of each prediction over lambda, as it is applied and as it counts for x0."""
    lambdas = torch.linspace(-5.0, 5.0, 401, dtype=torch.float64)
    weightings = options("weighting")
    figure, axes = panels(2, len(weightings), 9.5, 6.2, sharex=True, sharey=True)
    for column, (name, weighting) in enumerate(weightings.items()):
        for style, (kind, parameterization) in zip(STYLES, options("parameterization").items(), strict=False):
            process = RectifiedFlow() if isinstance(parameterization, Flow) else CosineVP()
            t = time_at_noise(process, (-lambdas).exp())
            alpha, sigma = process.alpha(t), process.sigma(t)
            weight = weighting(alpha, sigma, parameterization)
            of_x0 = weight / parameterization.x0_error_scale(alpha, sigma).square()
            axes[column].plot(lambdas, weight, linestyle=style, label=kind if column == 0 else None)
            axes[len(weightings) + column].plot(lambdas, of_x0, linestyle=style)
        axes[column].set(title=name, yscale="log", ylim=(1e-4, 1e4))
        axes[len(weightings) + column].set(xlabel="lambda = log(alpha / sigma)")
    axes[0].set(ylabel="weight of the prediction's error")
    axes[len(weightings)].set(ylabel="the same, of the error in x0")
    figure.legend(loc="outside lower center", ncols=4)
    return saved(figure, folder / "weights.png")


def times(folder: Path) -> Path:
    """Densities of training times on rectified flow, and one batch of them, each by itself and stratified."""
    figure, axes = panels(1, 2, 9.5, 3.9)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for shift in (1.0, 3.0):
        for style, (name, sampling) in zip(STYLES, options("time_sampling").items(), strict=False):
            t = option("process", "rectified_flow", shift=shift).at(sampling(u))
            axes[0].plot(t, np.gradient(u, t), linestyle=style, label=f"{name}, shift {shift:g}")
    axes[0].set(xlabel="t of rectified flow", ylabel="density", title="time_sampling and process.shift", xlim=(0, 1))
    axes[0].set_ylim(0, 3.2)
    axes[0].legend(fontsize="small", loc="upper left")
    count = 32
    draws, strata = torch.rand(count, generator=torch.Generator().manual_seed(0)), torch.arange(count)
    share = np.arange(1, count + 1) / count
    for name, batch in (("each by itself", draws), ("stratified", stratified(draws, strata, count))):
        axes[1].step(batch.sort().values, share, where="post", label=name)
    axes[1].plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="uniform")
    axes[1].set(xlabel="fraction of the process", ylabel="share of the batch below", title=f"a batch of {count} times")
    axes[1].legend(loc="upper left")
    return saved(figure, folder / "times.png")


def spacings(folder: Path, steps: int = 10) -> Path:
    """Where samplers evaluate, over the process and over lambda."""
    shown = {
        "scaled_linear": option("process", "scaled_linear"),
        "zero_terminal_snr": option("process", "zero_terminal_snr"),
        "rectified_flow": option("process", "rectified_flow"),
        "rectified_flow\nshift 3": option("process", "rectified_flow", shift=3.0),
    }
    figure, axes = panels(1, 2, 9.5, 4.6, sharey=True)
    for row, process in enumerate(shown.values()):
        for offset, (name, spacing) in enumerate(SPACINGS.items()):
            t = spacing(process, steps).double()[:-1]  # not the data, where nothing is evaluated
            marks = {"marker": "osD"[offset], "linestyle": "", "color": f"C{offset}", "markersize": 5}
            height = torch.full_like(t, row + 0.25 * (offset - 1))
            fraction = (t - process.start) / (process.end - process.start)
            axes[0].plot(fraction, height, **marks, label=name if row == 0 else None)
            finite = half_log_snr(process, t).isfinite()
            axes[1].plot(half_log_snr(process, t)[finite], height[finite], **marks)
    axes[0].set_yticks(range(len(shown)), list(shown))
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    axes[0].set(xlabel="way from data (0) to noise (1)", title=f"{steps} evaluations")
    axes[1].set(xlabel="lambda = log(alpha / sigma); noise at the left", title="the same, where lambda is finite")
    figure.legend(loc="outside lower center", ncols=3)
    return saved(figure, folder / "spacings.png")


@dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, std^2), for which the best denoiser and every marginal are known."""

    mean: float = 0.7
    std: float = 0.5

    def marginal(self, process: DiffusionProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * self.mean, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def denoiser(self, process: DiffusionProcess) -> samplers.Denoise:
        """(x_t, t) -> E[x0 | x_t]."""

        def x0(x: Tensor, t: Tensor) -> Tensor:
            mean, std = self.marginal(process, t)
            return self.mean + process.alpha(t) * self.std**2 / std**2 * (x - mean)

        return x0

    def error(self, function: Callable[..., Tensor], process: DiffusionProcess, at: Tensor) -> float:
        """2-Wasserstein distance of what is sampled from at[0]'s marginal to that of at[-1].

        Exact: the result is affine in the start and in each step's noise, which are set to 1 one after another.
        """
        unit = torch.eye(len(at) + 1, dtype=torch.float64)[:, :, None, None]  # row 0: the start; 1 + i: noise of step i
        mean, std = self.marginal(process, at[0])
        probes = torch.cat([torch.zeros_like(unit[:1]), unit])[:, :, None]  # (1 + number of draws, draws, 1, 1, 1)
        end = function(self.denoiser(process), mean + std * probes[:, 0], at, process, lambda i: probes[:, 1 + i])
        mean_error = float(end[0] - self.marginal(process, at[-1])[0])
        return hypot(mean_error, float((end[1:] - end[0]).norm() - self.marginal(process, at[-1])[1]))


def convergence(folder: Path, counts: Sequence[int] = (5, 10, 20, 40, 80, 160)) -> Path:
    """Errors of all samplers over their steps, where the ODE is smooth and all the way to the data."""
    vp, flow = option("process", "continuous_vp"), option("process", "rectified_flow")

    def evenly(end: float, last: float) -> Callable[[DiffusionProcess, int], Tensor]:
        return lambda process, steps: torch.linspace(end, last, steps + 1, dtype=torch.float64)

    shown = (
        ("continuous_vp, t = 1 to 0.05", vp, evenly(1.0, 0.05)),
        ("rectified_flow, t = 0.95 to 0.02", flow, evenly(0.95, 0.02)),
        ("continuous_vp, all the way, uniform_times", vp, samplers.uniform_times),
        ("rectified_flow, all the way, uniform_times", flow, samplers.uniform_times),
    )
    figure, axes = panels(2, 2, 9.5, 8.2, sharex=True, sharey=True)
    for axis, (title, process, spacing) in zip(axes, shown, strict=True):
        for name, errors in measured(process, spacing, counts):
            slope = np.log2(errors[-1] / errors[-2]) / np.log2(counts[-1] / counts[-2])
            style = {"linestyle": "--", "zorder": 3} if name == "ddim" else {}  # on top of euler's, which it is
            axis.loglog(counts, errors, marker=".", label=f"{name} {slope:.2f}", **style)
        axis.set_title(title, fontsize="medium")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.legend(
            title=f"slope, {counts[-2]} to {counts[-1]} steps",
            fontsize="small",
            title_fontsize="small",
            loc="lower left",
        )
    for axis in axes[2:]:
        axis.set_xlabel("steps")
    for axis in axes[::2]:
        axis.set_ylabel("distance to the exact distribution")
    return saved(figure, folder / "convergence.png")


def measured(
    process: DiffusionProcess, spacing: Callable[[DiffusionProcess, int], Tensor], counts: Sequence[int]
) -> Iterator[tuple[str, list[float]]]:
    """Each sampler's errors at `counts` steps."""
    for name, function in SAMPLERS.items():
        yield name, [GaussianData().error(function, process, spacing(process, n).double()) for n in counts]


def schedules(folder: Path, total: int = 1000) -> Path:
    """Learning rates over a run, and the decay of the weights' average over its updates."""
    figure, axes = panels(1, 2, 9.5, 3.6)
    for style, kind in zip(STYLES, SCHEDULES, strict=False):
        schedule = Schedule(kind, warmup=100, tail=0.5)
        axes[0].plot([schedule.factor(step, total) for step in range(total)], linestyle=style, label=kind)
    axes[0].set(xlabel=f"step of {total}, 100 of warm-up", ylabel="factor of the learning rate", ylim=(0, 1.3))
    axes[0].legend(ncols=3, loc="upper center")
    updates = np.unique(np.geomspace(1, 1e6, 200).astype(int))
    for style, decay in zip(STYLES, (0.99, 0.999, 0.9999), strict=False):
        axes[1].loglog(updates, [1.0 - decay_at(decay, n) for n in updates], linestyle=style, label=f"decay {decay}")
    axes[1].set(xlabel="n-th update", ylabel="1 - d, the newest weights' share")
    axes[1].legend(loc="upper right")
    return saved(figure, folder / "schedules.png")


def decay_at(decay: float, update: int) -> float:
    """What is left of the average at that update: of a 1, when the weights are 0."""
    ema = Ema([torch.ones(1)], decay)
    ema.updates = update - 1
    ema.update([torch.zeros(1)])
    return float(ema.shards[0])


PLOTS: Mapping[str, Callable[[Path], Path]] = {
    f.__name__: f for f in (processes, signal_to_noise, weights, times, spacings, convergence, schedules)
}


def draw_all(folder: Path) -> list[Path]:
    """All of them, as PNGs in `folder`."""
    return [plot(folder) for plot in PLOTS.values()]


if __name__ == "__main__":
    for path in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "maths"):
        print(f"{path} {path.stat().st_size / 1024:.0f} KB")
