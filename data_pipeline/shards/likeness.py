"""What the data sets of a mix, or of a folder of buckets, must have in common to be read as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import named
from data_pipeline.shards.data_sets import BUCKETS, DataSets
from data_pipeline.shards.manifest import Manifest

# fingerprint -> option that sets it
ENCODERS = {"autoencoder": "autoencoder.path", "text_encoder": "clip.path", "text_encoder_2": "text_encoder.path"}
# Fields whose shape does not depend on the size of the picture, and the option that sets it.
OF_ANY_SIZE = {
    "text.npy": "clip.path",
    "pooled.npy": "clip.path",
    "text_length.npy": "conditions.text.mask",
    "text_t5.npy": "text_encoder.path",
    "text_t5_pooled.npy": "text_encoder.path",
    "text_t5_length.npy": "conditions.text_t5.mask",
    "image_embedding.npy": "clip.path",
    "label.npy": "conditions",
    "boxes.npy": "conditions",
    "box_label.npy": "conditions",
}
SHOWN = 60  # characters of a value in a message


class Difference(NamedTuple):
    """A property that two data sets must share and do not; option: what both must be made with."""

    what: str
    one: Any
    other: Any
    option: str


def refuse_unlike(data: DataSets) -> None:
    """UserError for data sets that can't be read as one; it names two of them and all their differences. How many
    captions a sample has may differ, within a set and between sets: each sample draws from its own."""
    first = data.sets[0]
    if empty := [each.root for each in data if not each.manifest.samples and len(data) > 1]:
        raise DataError(f"{empty[0]} has no samples: leave it out, or make it again.")
    if data.layout == BUCKETS and data.kind != "latents":
        raise UserError(f"{first.root} contains pictures: only latents can be trained on in buckets.")
    for other in data.sets[1:]:
        if found := list(differences(first.manifest, other.manifest, data.layout)):
            told = "; ".join(
                f"{d.what} is {_short(d.one)} in the first and {_short(d.other)} in the second" for d in found
            )
            options = " ".join(dict.fromkeys(f"{d.option}=" for d in found))
            script = "precompute_latents.py" if data.kind == "latents" else "make_shards.py"
            remedy = f"make both by {script} with the same {options}" if found[0].option else "use sets of one kind"
            raise UserError(f"{first.root} and {other.root} can't be read as one: {told}: {remedy}.")


def differences(one: Manifest, other: Manifest, layout: str) -> Iterator[Difference]:
    """The properties that must be equal and are not."""
    if one.kind != other.kind:
        yield Difference("the kind", one.kind, other.kind, "")
        return
    if one.kind != "latents":
        yield from _unequal("the size of pictures", one.info.get("size"), other.info.get("size"), "size")
        return
    for name, option in ENCODERS.items():
        yield from _unequal(f"the {name}", one.fingerprints.get(name), other.fingerprints.get(name), option)
    for name in sorted(one.fields.keys() | other.fields.keys()):
        yield from _of_field(name, one.fields.get(name), other.fields.get(name), layout)
    ours, theirs = (named(dict(of.info.get("conditions") or {})) for of in (one, other))
    for name in sorted(ours.keys() & theirs.keys()):
        for key in sorted(ours[name].keys() | theirs[name].keys()):
            option = f"conditions.{name}.{key}"
            yield from _unequal(option, ours[name].get(key), theirs[name].get(key), option)
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield from _unequal(
            f"the condition {name}", *("there" if name in of else None for of in (ours, theirs)), "conditions"
        )


def _unequal(what: str, one: Any, other: Any, option: str) -> Iterator[Difference]:
    if one != other:
        yield Difference(what, *("none" if value is None else value for value in (one, other)), option)


def _of_field(name: str, one: Any, other: Any, layout: str) -> Iterator[Difference]:
    """Different dtypes or shapes of a field, or a field that only one of two sets has."""
    ours, theirs = _described(name, one, layout), _described(name, other, layout)
    if ours != theirs:
        same_shape = one and other and one.get("shape") == other.get("shape")
        made_by = "flips" if name.endswith("_flip.npy") else OF_ANY_SIZE.get(name, "size")
        missing = "flips" if name.endswith("_flip.npy") else "conditions"
        option = missing if one is None or other is None else "dtype" if same_shape else made_by
        yield from _unequal(name, ours, theirs, option)


def _described(name: str, field: Mapping[str, Any] | None, layout: str) -> str | None:
    """dtype and shape of a field; in buckets without the height and width of what has the picture's proportions."""
    if field is None or "shape" not in field:
        return None if field is None else "there"
    shape = list(field["shape"])
    if layout == BUCKETS and name not in OF_ANY_SIZE and len(shape) > 1:
        shape[-2:] = ["height", "width"]
    return f"{field.get('dtype')} [{', '.join(map(str, shape))}]"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
