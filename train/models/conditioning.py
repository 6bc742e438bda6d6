"""What the U-Net is conditioned on: conditioners turn a batch's stored fields into a Conditioning with its null.

Each conditioner says what it gives: tokens for cross-attention, a vector for the time embedding, or planes that are
concatenated to x_t. Several at once are `Conditioners`. Letters: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.models.attention import TransformerBlock
from train.models.latents import LatentScaling


class Parts(NamedTuple):
    """context (B, T, D) for cross-attention, vector (B, P) for the time embedding, concat (B, C, h, w); None: none."""

    context: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None


class Conditioning(NamedTuple):
    """What is given, and the null of each part, of a batch of 1 or B. A tuple, as DeepSpeed's hooks look into no other.

    A null is what a dropped condition is replaced by in training and what guidance steers away from in sampling (Ho &
    Salimans 2022, alg. 1): for text, the encoder's own states of the empty prompt.
    """

    given: Parts
    null: Parts

    @property
    def is_empty(self) -> bool:
        """Whether nothing is given at all."""
        return all(part is None for part in self.given)

    def dropped(self, drop: Tensor) -> Conditioning:
        """The null in place of the condition where drop (B,) is true; all parts together."""

        def replaced(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            return None if value is None else torch.where(drop.view(-1, *[1] * (value.dim() - 1)), null, value)

        return self._replace(given=Parts(*map(replaced, self.given, self.null)))

    def for_guidance(self) -> Conditioning:
        """Twice the batch: the condition, then its null."""

        def doubled(value: Tensor | None, null: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value, null.expand_as(value)])

        return self._replace(given=Parts(*map(doubled, self.given, self.null)))


class DataFacts(Protocol):
    """What conditioners must know of the data that they are trained on."""

    null: Mapping[str, Tensor]  # the encoders' own, by field
    shapes: Mapping[str, Sequence[int]]  # of the stored fields, unbatched
    scaling: LatentScaling
    unet_shape: tuple[int, int, int]  # (C, h, w) of x_t

    def classes(self, condition: str) -> Sequence[str]: ...


class Conditioner(nn.Module):
    """needs: stored fields that it reads; context_dim, vector_dim, concat_channels: what it gives the U-Net, if any.

    of_text: whether a negative prompt takes the place of its null.
    """

    of_text = False
    needs: tuple[str, ...] = ()
    context_dim: int | None = None
    vector_dim: int | None = None
    concat_channels: int = 0

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        raise NotImplementedError


class StoredText(Conditioner):
    """Text states as precompute stored them: tokens (B, T, D) and, if it did, the pooled vector (B, P); their null."""

    of_text = True
    needs = ("text",)

    def __init__(self, facts: DataFacts) -> None:
        super().__init__()
        self.context_dim = facts.shapes["text"][-1]
        self.vector_dim = facts.shapes["pooled"][-1] if "pooled" in facts.shapes else None
        self.null = facts.null

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        text, pooled = fields["text"], fields.get("pooled")
        null = Parts(self.null["text"].to(text)[None], None if pooled is None else self.null["pooled"].to(pooled)[None])
        return Conditioning(Parts(text, pooled), null)


class ClassLabel(Conditioner):
    """A learnt vector a class as the only token (B, 1, D), and one more for none (Rombach et al. 2022, app. E.1)."""

    needs = ("label",)

    def __init__(self, facts: DataFacts, dim: int) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("label")) + 1, dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        label = fields["label"]
        none = label.new_full((1,), self.embedding.num_embeddings - 1)
        rows = self.embedding(torch.cat([label, none]))[:, None]  # not its weight: ZeRO's stage 3 may have put it away
        return Conditioning(Parts(rows[:-1]), Parts(rows[-1:]))


class LayoutTokens(Conditioner):
    """A token a box (B, N, D): its class' vector and its corners' sinusoids, through transformer blocks.

    As tau for layouts (Rombach et al. 2022, sec. 4.3.1), but with corners as numbers, not as words of a vocabulary.
    The null is a layout without boxes.
    """

    needs = ("boxes", "box_label")
    FREQUENCIES = 8

    def __init__(self, facts: DataFacts, dim: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(len(facts.classes("layout")) + 1, dim)  # the first: no box
        self.corners = nn.Linear(4 * 2 * self.FREQUENCIES, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, None, heads, dim // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        boxes, labels = fields["boxes"], fields["box_label"]
        # One more row without boxes: the null goes through the same weights.
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
    """A CLIP image embedding (B, E) as `tokens` tokens (B, T, D); the null is the projection of zeros."""

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

    drop: whether guidance and dropping take it away too (its null is grey), or leave it.
    """

    needs = ("low_resolution",)

    def __init__(self, facts: DataFacts, drop: bool = True) -> None:
        super().__init__()
        self.drop, self.fold = drop, facts.scaling.fold
        self.size = tuple(side * self.fold for side in facts.unet_shape[1:])
        self.concat_channels = 3 * self.fold**2

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        image = fields["low_resolution"]
        if tuple(image.shape[-2:]) != self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True)
        planes = F.pixel_unshuffle(image, self.fold)
        null = torch.zeros_like(planes[:1]) if self.drop else planes
        return Conditioning(Parts(concat=planes), Parts(concat=null))


class HoleAndRest(Conditioner):
    """The hole (B, 1, h, w) and the latents of the rest (B, C, h, w), concatenated in this order as Stable Diffusion's
    inpainting does (Rombach et al. 2022, sec. 4.5). The null is a hole everywhere; drop: as in LowResolutionImage."""

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
    """Any number of conditioners as one, none included: tokens and planes one after another, vectors likewise."""

    def __init__(self, facts: DataFacts, parts: Mapping[str, Callable[[DataFacts], Conditioner]]) -> None:
        super().__init__()
        for name, make in parts.items():
            needs = getattr(make, "func", make).needs
            if not set(needs) <= set(facts.shapes):
                raise UserError(
                    f"conditioning={name} reads {' and '.join(needs)}, which these latents don't hold: run "
                    f"precompute_latents.py with conditions=[{name}], or choose another conditioning."
                )
        self.parts = nn.ModuleDict({name: make(facts) for name, make in parts.items()})
        self.needs = tuple(field for part in self.parts.values() for field in part.needs)
        self.context_dims = {name: p.context_dim for name, p in self.parts.items() if p.context_dim is not None}
        self.context_dim = next(iter(self.context_dims.values()), None)
        self.vector_dim = sum(part.vector_dim or 0 for part in self.parts.values()) or None
        self.concat_channels = sum(part.concat_channels for part in self.parts.values())

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        made = [part(fields, captions) for part in self.parts.values()]
        return Conditioning(joined([one.given for one in made]), joined([one.null for one in made]))

    def against(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Parts:
        """The null with the states of a negative prompt in the place of the empty one's; other parts keep theirs."""
        made = [(part.of_text, part(fields, captions)) for part in self.parts.values()]
        return joined([one.given if of_text else one.null for of_text, one in made])


def joined(all_parts: Sequence[Parts]) -> Parts:
    """Along tokens, width of the vector, and channels. Nulls of a batch of 1 are spread where another has B."""

    def one(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        if len(there) < 2:
            return there[0] if there else None
        batch = max(len(value) for value in there)
        return torch.cat([value.expand(batch, *value.shape[1:]) for value in there], 1)

    return Parts(*(one(values) for values in zip(*all_parts, strict=True))) if all_parts else Parts()


class ConditionedUNet(nn.Module):
    """The network that is trained: a U-Net, and the conditioners that are trained with it."""

    def __init__(self, unet: nn.Module, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def condition(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        """What a batch is conditioned on."""
        return self.conditioner(fields, captions)

    def condition_against(
        self, conditioning: Conditioning, fields: Mapping[str, Tensor], captions: Sequence[str]
    ) -> Conditioning:
        """The same, steering away from negative prompts."""
        return conditioning._replace(null=self.conditioner.against(fields, captions))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, C, h, w) at network times t (B,) -> (B, C, h, w)."""
        context, vector, concat = conditioning.given
        if concat is not None:
            x_t = torch.cat([x_t, concat.to(x_t)], 1)
        return self.unet(x_t, t, context, vector if self.unet.vector_dim is not None else None)
