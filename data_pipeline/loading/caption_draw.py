"""Which of a sample's captions a training step takes: a pure function of seed, step, stream and position."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.common.option_checks import NotNegative
from data_pipeline.shards.caption_edits import CaptionEdits
from data_pipeline.shards.manifest import Manifest

RANGE = 2**64  # of a draw


def draws_of(seed: int, step: int, streams: Sequence[int], per_stream: int) -> list[int]:
    """A number below RANGE for each sample of a step, in the order of EpochPlan.step: independent of the number of
    ranks and workers."""
    seed &= RANGE - 1
    return [
        int.from_bytes(hashlib.blake2b(struct.pack("<QQQQ", seed, step, stream, i), digest_size=8).digest(), "little")
        for stream in streams
        for i in range(per_stream)
    ]


class Chosen(NamedTuple):
    """A sample's caption for one step: its text, and its name ("" for the first, whose members have no suffix)."""

    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class CaptionOptions(CaptionEdits):
    """weights: name -> how often that caption is drawn from a sample with several. A name also stands for all names
    that begin with it and a dot, which share its weight. None: all captions of a sample equally often.

    The edits, and shuffle_tags (another order in each step), apply to pictures that are encoded during training.
    """

    weights: Mapping[str, NotNegative] | None = None
    shuffle_tags: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):  # captions of a list have numbers for names, which YAML reads as numbers
            object.__setattr__(self, "weights", {str(name): weight for name, weight in self.weights.items()})
        CaptionEdits.__post_init__(self)
        if self.weights is not None and not sum(self.weights.values()):
            raise UserError(f"captions.weights={self.weights} is not valid: one of them must be above 0.")

    def refuse_unfit(self, root: str, manifests: Sequence[Manifest]) -> None:
        """UserError for weights of captions that no sample has, and for edits of captions that are already encoded.
        root: of the data sets, for messages."""
        names = list(dict.fromkeys(name for each in manifests for name in each.info.get("captions") or ()))
        unknown = [each for each in self.weights or () if not any(covers(each, name) for name in names)]
        if unknown:
            there = f"of {', '.join(names)}" if names else "one caption a sample, without a name"
            have = "has" if len(manifests) == 1 else "have"
            raise UserError(f"captions: {root} {have} no caption {' and no '.join(unknown)}, but {there}: use those.")
        edits = [name for name in self.changed() if name != "weights"]
        if edits and any(each.kind == "latents" for each in manifests):
            raise UserError(
                f"data.captions.{edits[0]} can't change captions that are encoded already, as those of {root}: run "
                f"precompute_latents.py with captions.{'tag_orders=4' if edits[0] == 'shuffle_tags' else edits[0]}."
            )

    def chosen(self, captions: Mapping[str, str], draw: int | None = None) -> Chosen:
        """The caption of a step. draw: the sample's number from draws_of; None: the first caption, tags in order."""
        first = next(iter(captions), "")
        name = first if draw is None or len(captions) < 2 else drawn(shares(captions, self.weights), draw)
        order = str(draw) if self.shuffle_tags and draw is not None else None
        text = captions.get(name, "")
        return Chosen(self.edited(text, order) if text else "", "" if name == first else name)


def covers(weight: str, caption: str) -> bool:
    """Whether a weight's name applies to this caption: it is the caption's name, or its beginning up to a dot."""
    return caption == weight or caption.startswith(f"{weight}.")


def shares(captions: Mapping[str, str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """How often each of a sample's captions is drawn, by name; equally often if none of them has a weight."""
    named = {name: max((w for w in weights or () if covers(w, name)), key=len, default=None) for name in captions}
    sharing = Counter(named.values())
    found = {name: weights[w] / sharing[w] if w is not None else 0.0 for name, w in named.items()}
    return found if sum(found.values()) else dict.fromkeys(captions, 1.0)


def drawn(weights: Mapping[str, float], draw: int) -> str:
    """The name of the caption that a draw selects."""
    names = [name for name, weight in weights.items() if weight > 0]
    ends = list(accumulate(weights[name] for name in names))
    return names[min(bisect_right(ends, draw / RANGE * ends[-1]), len(names) - 1)]
