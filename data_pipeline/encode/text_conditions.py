"""Conditions on the caption: the states of one text encoder or of two, with masks or without (docs/conditioning.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import UserError
from data_pipeline.encode.conditions import Condition, PlainCondition, Sample, Tools
from data_pipeline.encode.encoders import TEXT_ENCODERS, TextEncoder, TextStates, first


class Text(PlainCondition):
    """text (B, T, D), one state a token, and pooled (B, P) if wanted; each different caption is encoded once.

    With masks also text_length (B,): how many of the states are the caption's own, at least one. The others are zero,
    and the U-Net does not attend to them. mask: None is the encoder's way (`masked`), None in a saved file is False.
    """

    options, made_from = ("prompts",), ("caption",)
    prefix, usual_encoder = "text", "clip"

    def __init__(self, pooled: bool = True, encoder: str | None = None, mask: bool | None = None) -> None:
        if encoder not in (None, *TEXT_ENCODERS):
            raise UserError(
                f"conditions.{self.prefix}.encoder={encoder} must be one of {', '.join(TEXT_ENCODERS)}, or null."
            )
        self.pooled, self.given_encoder, self.mask = pooled, encoder, mask
        self.encoder = encoder or self.usual_encoder

    @property
    def names(self) -> dict[str, str]:
        """What is stored: part of TextStates -> field."""
        pooled = "pooled" if self.prefix == "text" else f"{self.prefix}_pooled"
        found = {"tokens": self.prefix, "lengths": f"{self.prefix}_length", "pooled": pooled}
        left_out = ([] if self.pooled else ["pooled"]) + ([] if self.mask else ["lengths"])
        return {part: name for part, name in found.items() if part not in left_out}

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def config(self) -> dict[str, Any]:
        changed = {
            **({} if self.pooled else {"pooled": False}),
            **({} if self.encoder == self.usual_encoder else {"encoder": self.encoder}),
            **({"mask": True} if self.mask else {}),
        }
        return super().config() | changed

    def settle(self, tools: Tools) -> None:
        if self.mask is None:
            self.mask = bool(getattr(self.of(tools), "masked", False))

    def of(self, tools: Tools) -> TextEncoder:
        """Its encoder."""
        return tools.text if self.encoder == "clip" else tools.text_encoder

    def states(self, captions: Sequence[str], tools: Tools) -> TextStates:
        """The states of captions; zero at padding, if that is masked."""
        made = self.of(tools).encode_text(captions)
        if not self.mask:
            return made
        if made.lengths is None:
            raise UserError(f"conditions.{self.prefix}.mask=true: this text encoder gives no lengths: leave it null.")
        kept = first(made.lengths, made.tokens.shape[1])
        return TextStates(made.tokens * kept[..., None], made.pooled, made.lengths)

    def encode(self, samples: Sequence[Sample], images: Tensor | None, tools: Tools) -> dict[str, Tensor]:
        captions = list(dict.fromkeys(sample["caption"] for sample in samples))
        states = self.states(captions, tools)
        rows = torch.tensor([captions.index(sample["caption"]) for sample in samples], device=states.tokens.device)
        return {name: getattr(states, part)[rows] for part, name in self.names.items()}

    def null(self, tools: Tools) -> dict[str, Tensor]:
        states = self.states([""], tools)
        return {name: getattr(states, part)[0] for part, name in self.names.items()}

    def as_sample(self, prompts: str) -> dict[str, Any]:
        return {"caption": prompts}


class SecondText(Text):
    """The same of a second encoder: text_t5 (B, T, D), text_t5_length (B,), text_t5_pooled (B, P)."""

    prefix, usual_encoder = "text_t5", "text_encoder"


def choose_encoders(conditions: Mapping[str, Condition], given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The text encoders that the conditions use, by their groups in conf/; one that is used without a path is refused.

    `text` uses text_encoder=, if that is given and no other condition uses it. given: the configuration of each group.
    """
    taken = {condition.encoder for name, condition in conditions.items() if name != "text"}
    text = conditions.get("text")
    if isinstance(text, Text) and text.given_encoder is None:
        another = given.get("text_encoder", {}).get("path") is not None and "text_encoder" not in taken
        text.encoder = "text_encoder" if another else text.usual_encoder
    return encoders_used(conditions, given)


def encoders_used(conditions: Mapping[str, Condition], given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The text encoders that these conditions use, with their groups' configuration checked."""
    used = []
    for group in TEXT_ENCODERS:
        using = [name for name, condition in conditions.items() if condition.encoder == group]
        if using and given.get(group, {"path": None}).get("path", "") is None:
            raise UserError(
                f"{group}.path must be given, as conditions=[{','.join(using)}] needs it: add "
                f"{'' if group == 'clip' else 'text_encoder=hf '}{group}.path=...."
            )
        used += [group] if using else []
    return used
