"""Conditioning of the U-Net: conditioners turn a batch's stored fields into a Conditioning with its null.

Each conditioner declares its outputs: tokens for cross-attention, a vector for the time embedding, or planes that are
concatenated to x_t. `Conditioners` combines several. Letters: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from data_pipeline.encode.encoders import first
from train.models.latents import LatentScaling


class Parts(NamedTuple):
    """context (B, T, D) for cross-attention, vector (B, P) for the time embedding, concat (B, C, h, w); or None.

    mask (B, T): the tokens of the context that are attended to, at least one; None: all.
    """

    context: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    mask: Tensor | None = None


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
    mask: whether padding is left out of attention, by the stored lengths; None: if they are stored.
    """

    of_text = True
    needs = ("text",)
    prefix, pooled = "text", "pooled"

    def __init__(self, facts: DataFacts, captions: Mapping[Any, float] | None = None, mask: bool | None = None) -> None:
        super().__init__()
        length = f"{self.prefix}_length"
        if mask and length not in facts.shapes:
            raise UserError(
                f"conditioning.{self.prefix}.mask=true needs the captions' lengths, which these latents don't contain: "
                f"run precompute_latents.py with conditions.{self.prefix}.mask=true, or leave it null."
            )
        self.length = length if mask is not False and length in facts.shapes else None
        self.context_dim = facts.shapes[self.prefix][-1]
        self.vector_dim = facts.shapes[self.pooled][-1] if self.pooled in facts.shapes else None
        self.null = facts.null

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        return Conditioning(self._parts(fields), self._null_like(fields))

    def _parts(self, fields: Mapping[str, Tensor]) -> Parts:
        text = fields[self.prefix]
        mask = None if self.length is None else first(fields[self.length], text.shape[1])
        return Parts(text, fields.get(self.pooled), mask=mask)

    def _null_like(self, fields: Mapping[str, Tensor]) -> Parts:
        """The null with a batch of 1, in the dtypes and on the device of the fields."""
        wanted = (self.prefix, self.pooled, *([self.length] if self.length else []))
        return self._parts({name: self.null[name].to(fields[name])[None] for name in wanted if name in fields})


class SecondStoredText(StoredText):
    """Those of a second text encoder. join: how its tokens meet those of the first.

    tokens: one after the other, the narrower filled up with zeros, as T5 beside CLIP in Stable Diffusion 3 (Esser et
    al. 2024, app. B.3); channels: side by side, as both CLIPs in SDXL (Podell et al. 2023, sec. 2.1).
    """

    needs = ("text_t5",)
    prefix, pooled = "text_t5", "text_t5_pooled"

    def __init__(
        self,
        facts: DataFacts,
        join: str = "tokens",
        mask: bool | None = None,
    ) -> None:
        super().__init__(facts, mask=mask)
        if join not in ("tokens", "channels"):
            raise UserError(f"conditioning.text_t5.join={join} must be tokens or channels.")
        self.join = join
        tokens, own = (facts.shapes.get(name, facts.shapes["text_t5"])[0] for name in ("text", "text_t5"))
        if join == "channels" and tokens != own:
            raise UserError(
                "conditioning.text_t5.join=channels needs as many tokens of both text encoders, but these latents have "
                f"{tokens} and {own}: use join=tokens, or run precompute_latents.py with "
                f"text_encoder.context_length={tokens}."
            )


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
        self.side_by_side = {"text", "text_t5"} <= set(self.parts) and self.parts["text_t5"].join == "channels"
        self.context_dims = self._context_dims()
        self.context_dim = next(iter(self.context_dims.values()), None)
        self.vector_dim = sum(part.vector_dim or 0 for part in self.parts.values()) or None
        self.needs_vector = any(part.needs_vector for part in self.parts.values())
        self.concat_channels = sum(part.concat_channels for part in self.parts.values())

    def _context_dims(self) -> dict[str, int]:
        """The width of each part's tokens; of two text encoders, that of both together."""
        found = {name: part.context_dim for name, part in self.parts.items() if part.context_dim is not None}
        if {"text", "text_t5"} <= set(found):
            both = found["text"], found.pop("text_t5")
            found["text"] = sum(both) if self.side_by_side else max(both)
        return found

    def forward(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Conditioning:
        made = [part(fields, captions) for part in self.parts.values()]
        return Conditioning(self._joined([one.given for one in made]), self._joined([one.null for one in made]))

    def misfits(self, facts: DataFacts) -> list[str]:
        """The names of those that can't condition another bucket."""
        return [name for name, part in self.parts.items() if not part.fits(facts)]

    def against(self, fields: Mapping[str, Tensor], captions: Sequence[str]) -> Parts:
        """The null, with the states of a negative prompt in place of the empty prompt's; other parts keep theirs."""
        made = [(part.of_text, part(fields, captions)) for part in self.parts.values()]
        return self._joined([one.given if of_text else one.null for of_text, one in made])

    def _joined(self, made: list[Parts]) -> Parts:
        """All parts as one; text_t5's tokens beside those of text, if they are joined by channels."""
        if self.side_by_side:
            text, other = (list(self.parts).index(name) for name in ("text", "text_t5"))
            made[text] = beside(made[text], made[other])
            made[other] = made[other]._replace(context=None, mask=None)
        return joined(made)


def beside(a: Parts, b: Parts) -> Parts:
    """The first with the tokens of both side by side, (B, T, D1 + D2); one is attended to if either is the caption's,
    or all, if either has no mask."""
    mask = None if a.mask is None or b.mask is None else a.mask | b.mask
    return a._replace(context=torch.cat([a.context, b.context], -1), mask=mask)


def joined(all_parts: Sequence[Parts]) -> Parts:
    """Concatenates tokens, vectors and channels along dimension 1. Batches of 1 are expanded if another has B. Narrower
    tokens are filled up with zeros; without a mask, all of a part's tokens are attended to."""
    all_parts = [part._replace(context=context) for part, context in zip(all_parts, widened(all_parts), strict=True)]
    if any(part.mask is not None for part in all_parts):
        all_parts = [part._replace(mask=mask_of(part)) for part in all_parts]

    def one(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        if len(there) < 2:
            return there[0] if there else None
        batch = max(len(value) for value in there)
        return torch.cat([value.expand(batch, *value.shape[1:]) for value in there], 1)

    return Parts(*(one(values) for values in zip(*all_parts, strict=True))) if all_parts else Parts()


def widened(all_parts: Sequence[Parts]) -> list[Tensor | None]:
    """The tokens of each part, as wide as the widest."""
    width = max((part.context.shape[-1] for part in all_parts if part.context is not None), default=0)
    return [
        part.context
        if part.context is None or part.context.shape[-1] == width
        else F.pad(part.context, (0, width - part.context.shape[-1]))
        for part in all_parts
    ]


def mask_of(part: Parts) -> Tensor | None:
    """The mask of its tokens, all true if it has none; None without tokens."""
    if part.context is None or part.mask is not None:
        return part.mask
    return torch.ones(part.context.shape[:2], dtype=torch.bool, device=part.context.device)


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
        context, vector, concat, mask = conditioning.given
        if concat is not None:
            x_t = torch.cat([x_t, concat.to(x_t)], 1)
        return self.unet(x_t, t, context, vector if self.unet.vector_dim is not None else None, mask)
