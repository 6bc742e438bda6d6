"""Conditioning of the U-Net: conditioners turn a batch's stored fields into a Conditioning with its null.

Each conditioner declares its outputs: tokens for cross-attention, a vector for the time embedding, or planes that are
concatenated to x_t. `Conditioners` combines several. Letters: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.attention import TransformerBlock
from train.models.latents import LatentScaling


class Parts(NamedTuple):
    """context (B, T, D) for cross-attention, vector (B, P) for the time embedding, concat (B, C, h, w); or None."""

    context: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None


class Conditioning(NamedTuple):
    """The condition and the null of each part, batch 1 or B. A tuple: DeepSpeed's hooks skip most other types.

    The null replaces a dropped condition in training, and guidance steers away from it in sampling (Ho & Salimans
    2022, alg. 1). For text it is the encoder's states of the empty prompt.
    """

    given: Parts
    null: Parts

    @property
    def is_empty(self) -> bool:
        """Whether there is no condition at all."""
        return all(part is None for part in self.given)

    def dropped(self, drop: Tensor) -> Conditioning:
        """The null in place of the condition where drop (B,) is true, in all parts together."""

        def replaced(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            return None if value is None else torch.where(drop.view(-1, *[1] * (value.dim() - 1)), null, value)

        return self._replace(given=Parts(*map(replaced, self.given, self.null)))

    def for_guidance(self) -> Conditioning:
        """A batch of twice the size: the condition, then its null."""

        def doubled(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value, null.expand_as(value)])

        return self._replace(given=Parts(*map(doubled, self.given, self.null)))


class DataFacts(Protocol):
    """What conditioners need to know about the training data."""

    null: Mapping[str, Tensor]  # field -> the encoder's null
    shapes: Mapping[str, Sequence[int]]  # stored field -> its shape without the batch
    scaling: LatentScaling
    unet_shape: tuple[int, int, int]  # (C, h, w) of x_t

    def classes(self, condition: str) -> Sequence[str]: ...


class Conditioner(nn.Module):
    """needs: the stored fields that it reads; context_dim, vector_dim, concat_channels: sizes of its outputs, if any.

    of_text: whether a negative prompt replaces its null; needs_vector: whether a U-Net without vector_dim is refused.
    """

    of_text = needs_vector = False
    needs: tuple[str, ...] = ()
    context_dim: int | None = None
    vector_dim: int | None = None
    concat_channels: int = 0

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def fits(self, facts: DataFacts) -> bool:
        """Whether it can condition latents with the shapes of another aspect-ratio bucket."""
        return True


class StoredText(Conditioner):
    """Text states stored by precompute: tokens (B, T, D), the pooled vector (B, P) if it is stored, and their null.

    captions: weights of a sample's captions, if it has several; the loader draws by them (conf/data/shards.yaml).
    """

    of_text = True
    needs = ("text",)

    def __init__(self, facts: DataFacts, captions: Mapping[Any, float] | None = None) -> None:
        super().__init__()
        self.context_dim = facts.shapes["text"][-1]
        self.vector_dim = facts.shapes["pooled"][-1] if "pooled" in facts.shapes else None
        self.null = facts.null

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        text, pooled = fields["text"], fields.get("pooled")
        null = Parts(self.null["text"].to(text)[None], None if pooled is None else self.null["pooled"].to(pooled)[None])
        return Conditioning(Parts(text, pooled), null)


class ClassLabel(Conditioner):
    """One token (B, 1, D), a learnt vector per class, and one more as the null (Rombach et al. 2022, app. E.1)."""

    needs = ("label",)

    def __init__(self, facts: DataFacts, dim: int) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("label")) + 1, dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        label = fields["label"]
        none = label.new_full((1,), self.embedding.num_embeddings - 1)
        rows = self.embedding(torch.cat([label, none]))[:, None]  # not its .weight: ZeRO stage 3 may have released it
        return Conditioning(Parts(rows[:-1]), Parts(rows[-1:]))


class LayoutTokens(Conditioner):
    """One token per box (B, N, D): the vector of its class and sinusoids of its corners, through transformer blocks.

    Like tau for layouts (Rombach et al. 2022, sec. 4.3.1), but the corners are numbers, not tokens of a vocabulary.
    The null is a layout without boxes.
    """

    needs = ("boxes", "box_label")
    FREQUENCIES = 8

    def __init__(self, facts: DataFacts, dim: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("layout")) + 1, dim)  # index 0: no box
        self.corners = nn.Linear(4 * 2 * self.FREQUENCIES, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, None, heads, dim // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        boxes, labels = fields["boxes"], fields["box_label"]
        # One more row, without boxes, so that the null passes through the same weights.
        boxes = torch.cat([boxes, torch.zeros_like(boxes[:1])])  # (B + 1, N, 4)
        labels = torch.cat([labels, torch.full_like(labels[:1], -1)])  # (B + 1, N)
        tokens = self.embedding(labels + 1)
        waves = self.corners(fourier(boxes, self.FREQUENCIES).to(tokens.dtype))
        tokens = tokens + waves * (labels >= 0)[..., None]
        for block in self.blocks:
            tokens = block(tokens, None)
        tokens = self.norm(tokens)
        return Conditioning(Parts(tokens[:-1]), Parts(tokens[-1:]))


def fourier(x: Tensor, frequencies: int) -> Tensor:
    """(..., D) in [0, 1] -> (..., D * 2 * frequencies): sin and cos of pi 2^k x (Mildenhall et al. 2020, eq. 4)."""
    angles = x[..., None] * (torch.pi * 2.0 ** torch.arange(frequencies, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class ImageTokens(Conditioner):
    """Projects a CLIP image embedding (B, E) to `tokens` tokens (B, T, D); the null is the projection of zeros."""

    needs = ("image_embedding",)

    def __init__(self, facts: DataFacts, dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.context_dim, self.tokens = dim, tokens
        self.projection = nn.Linear(facts.shapes["image_embedding"][-1], tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        embedding = fields["image_embedding"]
        rows = torch.cat([embedding, torch.zeros_like(embedding[:1])]).to(self.projection.weight.dtype)
        tokens = self.norm(self.projection(rows).unflatten(-1, (self.tokens, -1)))  # (B + 1, T*D) -> (B + 1, T, D)
        return Conditioning(Parts(tokens[:-1]), Parts(tokens[-1:]))


class LowResolutionImage(Conditioner):
    """A small picture (B, 3, H, W), enlarged to the latents and concatenated (Rombach et al. 2022, sec. 4.4).

    drop: whether dropout and guidance replace it, too, by its null (grey), or keep it. In buckets, each picture is
    enlarged by the factors of the bucket whose shapes are the facts'.
    """

    needs = ("low_resolution",)

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.fold, self.factors = drop, facts.scaling.fold, enlargement(facts)
        self.concat_channels = 3 * self.fold**2

    def fits(self, facts: DataFacts) -> bool:
        return enlargement(facts) == self.factors

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        image = fields["low_resolution"]
        size = tuple(int(side * factor) for side, factor in zip(image.shape[-2:], self.factors, strict=True))
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        planes = F.pixel_unshuffle(image, self.fold)
        null = torch.zeros_like(planes[:1]) if self.drop else planes
        return Conditioning(Parts(concat=planes), Parts(concat=null))


def enlargement(facts: DataFacts) -> tuple[Fraction, ...]:
    """Height and width of unfolded latents, divided by those of the small picture."""
    fold, sides = facts.scaling.fold, facts.shapes["low_resolution"][-2:]
    return tuple(Fraction(side * fold, small) for side, small in zip(facts.unet_shape[1:], sides, strict=True))


class HoleAndRest(Conditioner):
    """The hole (B, 1, h, w), then the latents of the rest (B, C, h, w), concatenated in the order of Stable Diffusion's
    inpainting (Rombach et al. 2022, sec. 4.5). The null is a hole everywhere; drop: as in LowResolutionImage."""

    needs = ("hole", "masked_latents")

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.scaling = drop, facts.scaling
        self.concat_channels = facts.scaling.fold**2 + facts.unet_shape[0]

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        hole = F.pixel_unshuffle(fields["hole"], self.scaling.fold)
        planes = torch.cat([hole, self.scaling.to_model(fields["masked_latents"])], 1)
        null = torch.cat([torch.ones_like(hole[:1]), torch.zeros_like(planes[:1, hole.shape[1] :])], 1)
        return Conditioning(Parts(concat=planes), Parts(concat=null if self.drop else planes))


class Conditioners(Conditioner):
    """Combines any number of conditioners, or none: concatenates their tokens, vectors and planes."""

    def __init__(self, facts: DataFacts, parts: Mapping[str, Callable[[DataFacts], Conditioner]]) -> None:
        super().__init__()
        # Sizes come last, as in SDXL, in any order of conditioning=: the U-Net's weights depend on it.
        parts = dict(sorted(parts.items(), key=lambda part: getattr(part[1], "func", part[1]).needs_vector))
        for name, make in parts.items():
            needs = getattr(make, "func", make).needs
            if not set(needs) <= set(facts.shapes):
                raise UserError(
                    f"conditioning={name} needs {' and '.join(needs)}, which these latents don't contain: run "
                    f"precompute_latents.py with conditions=[{name}], or choose another conditioning."
                )
        self.parts = nn.ModuleDict({name: make(facts) for name, make in parts.items()})
        self.needs = tuple(field for part in self.parts.values() for field in part.needs)
        self.context_dims = {name: p.context_dim for name, p in self.parts.items() if p.context_dim is not None}
        self.context_dim = next(iter(self.context_dims.values()), None)
        self.vector_dim = sum(part.vector_dim or 0 for part in self.parts.values()) or None
        self.needs_vector = any(part.needs_vector for part in self.parts.values())
        self.concat_channels = sum(part.concat_channels for part in self.parts.values())

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        made = [part(fields, captions) for part in self.parts.values()]
        return Conditioning(joined([one.given for one in made]), joined([one.null for one in made]))

    def misfits(self, facts: DataFacts) -> list[str]:
        """The names of those that can't condition another bucket."""
        return [name for name, part in self.parts.items() if not part.fits(facts)]

    def against(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Parts:
        """The null, with the states of a negative prompt in place of the empty prompt's; other parts keep theirs."""
        made = [(part.of_text, part(fields, captions)) for part in self.parts.values()]
        return joined([one.given if of_text else one.null for of_text, one in made])


def joined(all_parts: Sequence[Parts]) -> Parts:
    """Concatenates tokens, vectors and channels along dimension 1. Batches of 1 are expanded if another has B."""

    def one(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        if len(there) < 2:
            return there[0] if there else None
        batch = max(len(value) for value in there)
        return torch.cat([value.expand(batch, *value.shape[1:]) for value in there], 1)

    return Parts(*(one(values) for values in zip(*all_parts, strict=True))) if all_parts else Parts()


class ConditionedUNet(nn.Module):
    """The network to train: a U-Net, and the conditioners that are trained with it."""

    def __init__(self, unet: nn.Module, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def condition(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        """The conditioning of a batch."""
        return self.conditioner(fields, captions)

    def condition_against(
        self, conditioning: Conditioning, fields: Mapping[str, Tensor], captions: Sequence[str]
    ) -> Conditioning:
        """The same conditioning, with negative prompts as its null."""
        return conditioning._replace(null=self.conditioner.against(fields, captions))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, C, h, w) at network times t (B,) -> (B, C, h, w)."""
        context, vector, concat = conditioning.given
        if concat is not None:
            x_t = torch.cat([x_t, concat.to(x_t)], 1)
        return self.unet(x_t, t, context, vector if self.unet.vector_dim is not None else None)
