"""Small batches, networks and objectives on random data."""

import pytest
import torch

import train.models.torchvision_patch  # noqa: F401  (before diffusers or open_clip import torchvision)
from data_pipeline.loading.batch import Batch, DataCursor
from train.data.latent_facts import LatentFacts
from train.diffusion.parameterization import Velocity
from train.diffusion.process import DiscreteVP
from train.diffusion.time_sampling import uniform
from train.models.conditioning import ConditionedUNet, Conditioners, StoredText
from train.objectives.latent_diffusion import LatentDiffusion

TOKENS, CONTEXT_DIM, POOLED_DIM = 5, 24, 12


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_batch():
    """make_batch(streams, make_tensors): rows of a stream are the same in whichever batch it is."""

    def make(make_tensors, streams=(0, 1, 2, 3), per_stream=2, step=0, captions=()):
        parts = [make_tensors(torch.Generator().manual_seed(1000 * step + stream), per_stream) for stream in streams]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        keys = tuple(f"{stream}-{i}" for stream in streams for i in range(per_stream))
        return Batch(keys, tuple(captions) or keys, tensors, tuple(streams), step, DataCursor(step + 1))

    return make


@pytest.fixture
def latent_batch(make_batch):
    def tensors(generator, count):
        return {
            "moments": torch.randn(count, 8, 8, 8, generator=generator),
            "text": torch.randn(count, TOKENS, CONTEXT_DIM, generator=generator),
            "pooled": torch.randn(count, POOLED_DIM, generator=generator),
        }

    return lambda **where: make_batch(tensors, **where)


@pytest.fixture
def image_batch(make_batch):
    def tensors(generator, count):
        return {"image": torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1}

    return lambda **where: make_batch(tensors, **where)


@pytest.fixture
def null():
    """The text encoder's states of the empty prompt."""
    generator = torch.Generator().manual_seed(77)
    return {
        "text": torch.randn(TOKENS, CONTEXT_DIM, generator=generator),
        "pooled": torch.randn(POOLED_DIM, generator=generator),
    }


@pytest.fixture
def make_facts(null):
    """make_facts(fold=1, ...): of a data set that `latent_batch` could be from."""

    def make(**changed):
        shapes = {"moments": [8, 8, 8], "text": [TOKENS, CONTEXT_DIM], "pooled": [POOLED_DIM]}
        about = {
            "shapes": shapes, "mean": [0.1, -0.2, 0.3, 0.0], "std": [1.5, 0.5, 1.0, 2.0], "fold": 1,
            "fingerprints": {"autoencoder": "a", "text_encoder": "t"}, "conditions": {}, "null": null,
        }  # fmt: skip
        changed["shapes"] = {**shapes, **changed.get("shapes", {})}
        return LatentFacts(**{**about, **changed})

    return make


@pytest.fixture
def latent_objective(make_facts):
    """latent_objective(unet, ...): the objective of a U-Net of 4 x 8 x 8 latents, conditioned on stored text."""

    def make(unet, process=None, parameterization=None, fold=1, **options):
        facts = make_facts(fold=fold)
        network = ConditionedUNet(unet, Conditioners(facts, {"text": StoredText}))
        return LatentDiffusion(
            network, process or DiscreteVP(), parameterization or Velocity(), uniform, facts.latents, **options
        )

    return make


@pytest.fixture
def train_a_little():
    """A few steps of the real objective, so that no weight is where its initialisation left it."""

    def train(objective, batch, steps=3):
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            objective(batch(step=step)).total.backward()
            optimizer.step()
        return objective

    return train


@pytest.fixture
def relative_error():
    return lambda got, expected: float((got - expected).detach().norm() / expected.detach().norm())
