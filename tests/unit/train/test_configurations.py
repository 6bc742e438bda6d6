"""Everything under conf/ composes, builds, takes a training step and draws a picture."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.common.hydra_messages import top_keys
from data_pipeline.loading.batch import Batch, DataCursor
from train.data.build import build_network
from train.data.latent_facts import LatentFacts
from train.models.latents import LatentScaling
from train.sampling.generator import ConditionBatch, Generator

ROOTS = sorted(path.stem for path in Path(CONF).glob("*.yaml") if path.stem != "quiet")
GROUPS = {
    str(folder.relative_to(CONF)): sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in Path(CONF).rglob("*")
    if folder.is_dir()
}
GIVEN = {
    "train_ldm": ["input=a", "output=b", "autoencoder.path=c", "clip.path=d"],
    "precompute_latents": ["input=a", "output=b", "autoencoder.path=c"],
    "evaluate_ldm": ["input=a", "shards=b"],
    "make_shards": ["output=b"],
    "quickstart": [],
    "plan_storage": ["images=1e6"],
}
LISTS = ("conditioning", "conditions")
# Groups whose options differ between roots: a first stage and a CLIP are built in one place and loaded in others.
LOADED, BUILT = ("trained", "identity", "stable_diffusion"), {"autoencoder": "train_autoencoder", "clip": "train_clip"}


def composed(root: str, *overrides: str) -> OmegaConf:
    """A third of a second the first time."""
    return copy.deepcopy(_composed(root, *overrides))


@functools.cache
def _composed(root: str, *overrides: str) -> OmegaConf:
    with initialize_config_dir(CONF, version_base="1.3"):
        given = GIVEN.get(root, ["input=a", "output=b"])
        if "~autoencoder.path" in overrides:  # without a first stage there is no path to one
            given = [option for option in given if not option.startswith("autoencoder.path")]
        return compose(root, [*given, *(option for option in overrides if option != "~autoencoder.path")])


def choices(root: str) -> list[tuple[str, str]]:
    """(group, option) pairs that a root's defaults can be given."""
    listed = OmegaConf.load(f"{CONF}/{root}.yaml").get("defaults", [])
    groups = [next(iter(entry)) for entry in listed if OmegaConf.is_dict(entry)]
    pairs = [(group, option) for group in groups if group != "objective" for option in GROUPS[group]]
    pairs = [pair for pair in pairs if pair[0] != "experiment" or root == root_of(pair[1])]
    return [p for p in pairs if p[0] not in BUILT or (root == BUILT[p[0]]) != (p[1] in LOADED)]


def root_of(experiment: str) -> str:
    """The program that an experiment is for."""
    if experiment.startswith("clip_"):
        return "train_clip"
    return "train_autoencoder" if re.match(r"(ldm|sd)_(kl|vq)_f\d", experiment) else "train_ldm"


DIFFUSION = [name for name in GROUPS["experiment"] if root_of(name) == "train_ldm"]

# Each option with one of the roots that have its group, the largest first.
CHOICES = {pair: root for root in reversed(["train_ldm", *ROOTS]) for pair in choices(root)}


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root: str) -> None:
    config = composed(root)
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True)


# Training steps and pictures, with U-Nets made small.

SMALL = ["unet.norm_groups=4", "unet.layers_per_block=1"]
FIELDS = {
    "text": lambda dim: {"text": [5, dim], "pooled": [12]},
    "label": lambda dim: {"label": []},
    "layout": lambda dim: {"boxes": [3, 4], "box_label": [3]},
    "image_embedding": lambda dim: {"image_embedding": [10]},
    "low_resolution": lambda dim: {"low_resolution": [3, 8, 8]},
    "hole": lambda dim: {},
    "joint_text": lambda dim: {},
    "size": lambda dim: {"size": [6]},
}


def small(config: OmegaConf, facts: LatentFacts) -> None:
    """Narrow levels with a head each, as many as there were; the context as wide as it was at most 32."""
    levels = len(config.unet.channels)
    config.unet.update({"channels": [8] * levels, "norm_groups": 4, "layers_per_block": 1, "heads": [1] * levels})
    if config.unet.context_dim is not None:
        config.unet.context_dim = 32
    if config.unet.vector_dim is not None:
        config.unet.vector_dim = 12 + 6 * 256 * ("size" in config.conditioning)


def facts_for(config: OmegaConf) -> LatentFacts:
    """Of a data set that fits the configuration's latents: their channels from the U-Net, 16 x 16 of them unfolded."""
    fold, channels = config.fold, config.unet.out_channels // config.fold**2
    side = 8 * fold
    shapes: dict[str, list[int]] = {"moments": [2 * channels, side, side]}
    for name in config.conditioning:
        shapes |= FIELDS[name](32 if config.unet.context_dim else 0)
        if name == "hole":
            shapes |= {"hole": [1, side, side], "masked_latents": [channels, side, side]}
    classes = {"classes": ["a", "b", "c"]}
    null = {"text": torch.zeros(5, 32), "pooled": torch.zeros(12)}
    return LatentFacts(shapes, [0.0] * channels, [1.0] * channels, fold, {"autoencoder": "a"},
                       {"label": classes, "layout": classes}, null)  # fmt: skip


def batch_for(facts: LatentFacts, count: int = 4) -> Batch:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(count, *shape, generator=random) for name, shape in facts.shapes.items()}
    for name in ("label", "box_label"):
        if name in tensors:
            tensors[name] = torch.randint(0, 3, tensors[name].shape, generator=random)
    captions = ("a cat", "a dog", "a red heart", "")[:count]
    return Batch(captions, captions, tensors, tuple(range(count)), 0, DataCursor(1), count)


def step_and_picture(config: OmegaConf) -> tuple[float, float, np.ndarray]:
    """Losses before and after five steps at one batch, and what is drawn."""
    facts = facts_for(config)
    small(config, facts)
    plain = OmegaConf.to_container(config, resolve=True)
    torch.manual_seed(0)
    network = build_network(plain, facts, instantiate)
    make = instantiate(config.objective, _partial_=True, _convert_="all")
    objective, batch = make(network=network, latents=facts.latents, seed=0), batch_for(facts)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        terms = objective(batch)
        terms.total.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())
        optimizer.step()
        losses.append(float(terms.total))
    assert isinstance(config.sampler.steps, int)
    sampler = instantiate({**config.sampler, "steps": 2})
    generator = Generator(network.eval(), objective.process, objective.parameterization, facts.scaling, to_rgb,
                          facts.unet_shape, torch.device("cpu"))  # fmt: skip
    asked = ConditionBatch(batch.tensors, batch.captions)
    return losses[0], losses[-1], generator.draw(asked, sampler, instantiate(config.guidance, _convert_="all"), seed=1)


def to_rgb(z: torch.Tensor) -> torch.Tensor:
    return z[:, :3]


def works(config: OmegaConf) -> None:
    first, last, pictures = step_and_picture(config)
    assert np.isfinite([first, last]).all()
    assert last < first
    assert pictures.shape[0] == 4
    assert pictures.shape[-1] == 3
    assert pictures.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("experiment", DIFFUSION)
def test_every_experiment_takes_a_step_and_draws(experiment: str) -> None:
    without = ["~autoencoder.path"] if "pixel" in experiment else []
    config = composed("train_ldm", f"experiment={experiment}", *without)
    assert set(config) <= top_keys(Path(CONF), "train_ldm")  # else the entry would refuse it
    works(config)


KIND = {"rectified_flow": "flow", "cosine": "sample", "linear": "epsilon"}
OPTIONS = [
    *[("process", p, f"parameterization={KIND.get(p, 'velocity')}") for p in GROUPS["process"]],
    ("parameterization", "velocity", "process=cosine"), ("parameterization", "velocity", "process=linear"),
    *[("loss", name, "seed=0") for name in GROUPS["loss"]],
    *[("weighting", name, "objective.offset_noise=0.1") for name in GROUPS["weighting"]],
    *[("time_sampling", name, "objective.stratified_times=true") for name in GROUPS["time_sampling"]],
    *[("sampler", name, "seed=0") for name in GROUPS["sampler"]],
    *[("spacing", name, "seed=0") for name in GROUPS["spacing"]],
    *[("guidance", name, "guidance.rescale=0.7") for name in GROUPS["guidance"]],
    *[("unet", name, "fold=1") for name in GROUPS["unet"] if name not in ("demo", "ldm_unconditional", "from_start")],
]  # fmt: skip


def together(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """As few choices of an option of each group as have them all; a list has all of its own at once."""
    groups: dict[str, list[str]] = {}
    for group, option in pairs:
        groups.setdefault(group, []).append(option)
    groups = {group: [f"[{','.join(names)}]"] if group in LISTS else names for group, names in groups.items()}
    most = max(map(len, groups.values()))
    return [{group: names[i % len(names)] for group, names in groups.items()} for i in range(most)]


TOGETHER = together((group, option) for group, option, _ in OPTIONS if group != "parameterization")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", TOGETHER, ids=lambda chosen: chosen["process"])
def test_every_option_takes_a_step_and_draws(chosen: dict[str, str]) -> None:
    """Several at once."""
    given = {"parameterization": KIND.get(chosen["process"], "velocity"), "fold": 1, "guidance.rescale": 0.7}
    given |= {"objective.offset_noise": 0.1, "objective.stratified_times": "true"}
    works(composed("train_ldm", *(f"{name}={value}" for name, value in {**chosen, **given}.items())))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("group", "option", "more"), OPTIONS, ids=lambda value: value)
def test_each_option_by_itself(group: str, option: str, more: str) -> None:
    works(composed("train_ldm", f"{group}={option}", more))


TRAINED = {(group, option) for group, option, _ in OPTIONS} | {("experiment", name) for name in GROUPS["experiment"]}
TRAINED |= {("parameterization", name) for name in KIND.values()}
OTHERS = [
    (root, chosen)
    for root in ROOTS
    if (pairs := [pair for pair, owner in CHOICES.items() if owner == root and pair not in TRAINED])
    for chosen in together(pairs)
]


@pytest.mark.parametrize(("root", "chosen"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_other_option_of_every_group_composes(root: str, chosen: dict[str, str]) -> None:
    given = [f"{group}={option}" for group, option in chosen.items()]
    if chosen.get("autoencoder") == "identity":
        given = ["~autoencoder.path", *given]
    OmegaConf.to_container(composed(root, *given), resolve=True)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["process=zero_terminal_snr", "parameterization=epsilon"], "parameterization=velocity or sample"),
        (["process=scaled_linear"], "parameterization=flow with process=rectified_flow"),
        (["unet.context_dim=768"], "set unet.context_dim=32"),  # what facts_for says its text has
        (["experiment=super_resolution", "unet.in_channels=16"], "set unet.in_channels=28"),
        (["experiment=unconditional", "unet.context_dim=192"], "set unet.context_dim=null"),
    ],
)
def test_a_bad_combination_gets_a_sentence(overrides: list[str], remedy: str) -> None:
    config = composed("train_ldm", *overrides)
    facts = facts_for(composed("train_ldm", *[o for o in overrides if not o.startswith("unet")]))
    if not any(override.startswith("unet") for override in overrides):
        small(config, facts)
    make = instantiate(config.objective, _partial_=True, _convert_="all")
    plain = OmegaConf.to_container(config, resolve=True)
    with pytest.raises(UserError, match=remedy):
        make(network=build_network(plain, facts, instantiate), latents=facts.latents)


def test_the_scaling_of_pixels_is_that_of_the_data() -> None:
    assert torch.equal(LatentScaling([0.0] * 3, [1.0] * 3).to_model(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("experiment", "ranks"), [("sd15_finetune", (1, 2, 4, 8)), ("sd21_from_scratch", (1, 8, 16, 64))]
)
def test_recipes_for_a_card_can_be_shared_by_ranks(experiment: str, ranks: tuple[int, ...]) -> None:
    """Their micro-batch fits a card; at each number of cards the global batch and its streams must still divide."""
    config = composed("train_ldm", f"experiment={experiment}")
    assert config.engine.checkpoint_activations
    assert "GB" in Path(CONF, "experiment", f"{experiment}.yaml").read_text().partition("defaults:")[0]
    for count in ranks:
        training = instantiate(config.training).over(count)
        assert training.batch_size == config.training.micro_batch * training.accumulation * count
        assert config.data.streams % (count * training.accumulation) == 0
        assert training.batch_size % config.data.streams == 0
