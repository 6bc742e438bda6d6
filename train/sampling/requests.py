"""Turns the options of sample_images.py (prompts, labels, layouts, images, holes) into samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.common.errors import UserError
from data_pipeline.images.decode import PictureError, decode_picture
from data_pipeline.shards.json_fields import is_pair
from train.sampling.trained_run import TrainedRun

REQUEST_OPTIONS = ("prompts", "labels", "layouts", "images", "holes")
PROMPT_NAMES = ("prompt", "caption", "text")  # names of the prompt in a .jsonl
SIZE_PARTS = ("original", "crop", "target")


def size_options(given: Any, name: str = "size") -> dict[str, Any]:
    """The option `size` (or negative_size) as its parts: size.original, size.crop, size.target."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not set(given) <= set(SIZE_PARTS):
        parts = ", ".join(f"{name}.{part}=" for part in SIZE_PARTS)
        raise UserError(f"{name}={given} is no size: set {parts}, each two numbers, as {name}.original=[512,512].")
    return {f"size.{part}": given.get(part) for part in SIZE_PARTS}


def request_rows(options: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Options, each one value or a list -> one dictionary per picture. A single value is used for all pictures."""
    lists = {name: as_list(name, value) for name, value in options.items() if value is not None}
    if any(not values for values in lists.values()):
        empty = next(name for name, values in lists.items() if not values)
        raise UserError(f"{empty} is empty: add values, such as prompts='[red heart,grinning face]'.")
    count = max((len(values) for values in lists.values()), default=1)
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise UserError(
                f"{name} has {len(values)} entries, but another option has {count}: use one entry, or the same number."
            )
    rows = [{name: values[i % len(values)] for name, values in lists.items()} for i in range(count)]
    return [row for row in rows for _ in range(repeats)]


def prompts_in(path: str) -> list[str]:
    """The prompts in a file, one per line; blank lines are skipped. In .jsonl: texts, or rows with one of
    PROMPT_NAMES."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"prompts_file={path} can't be read: {why}.") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts_file={path} is empty: write one prompt a line.")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [_prompt_of(line, f"prompts_file={path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    """The prompt in one line of a .jsonl."""
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f'{where} is not JSON: write a text in double quotes, or {{"prompt": ...}}.') from None
    found = next((row[name] for name in PROMPT_NAMES if name in row), None) if isinstance(row, dict) else row
    if not isinstance(found, str):
        raise UserError(f'{where} has no text as {", ".join(PROMPT_NAMES)}: write {{"prompt": "a red fox"}}.')
    return found


def as_list(name: str, value: Any) -> list[Any]:
    """`value` as a list of values: a single layout is itself a list of boxes, a single hole a list of four numbers, a
    single size a list of two."""
    nested = 2 if name == "layouts" else int(name == "holes" or name.startswith("size."))
    probe = value
    for _ in range(nested):
        probe = probe[0] if isinstance(probe, list) and probe else None
    return value if isinstance(probe, list) else [value]


def negative_rows(negative_prompt: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with the negative prompt as their prompt; no rows without a negative prompt."""
    if negative_prompt is None:
        return []
    if "prompts" not in rows[0]:
        raise UserError("this run is not conditioned on prompts: leave negative_prompt= out.")
    if isinstance(negative_prompt, list | dict):
        raise UserError("negative_prompt must be a single text, which applies to all pictures.")
    return [row | {"prompts": str(negative_prompt)} for row in rows]


def with_negative_size(
    size: Mapping[str, Any], run: TrainedRun, away: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows to steer away from, with the given parts of the negative size; without a negative prompt, the rows of
    the empty prompt."""
    given = {name: value for name, value in size.items() if value is not None}
    if not given:
        return away
    for name, value in given.items():
        if not is_pair(value):
            raise UserError(f"negative_{name}={value} is not two numbers of pixels: use one size for all pictures.")
    if "size" not in run.conditions:
        raise UserError("this run is not conditioned on sizes: leave negative_size out.")
    if run.config["conditioning"]["size"].get("drop", False):
        raise UserError("this run was trained with conditioning.size.drop=true: leave negative_size out.")
    empty = [{**row, "prompts": ""} if "prompts" in row else row for row in rows]
    return [{**row, **given} for row in away or empty]


def refuse_unused_options(run: TrainedRun, row: Mapping[str, Any], also: Sequence[str] = ()) -> None:
    """UserError for missing options, and for options that the run is not conditioned on, except those in `also`."""
    wanted = list(dict.fromkeys(option for name in run.config["conditioning"] for option in options_of(run, name)))
    for name in wanted:
        if name not in row:
            raise UserError(f"this run is conditioned on {', '.join(wanted)}: add {name}=....")
    optional = [option for condition in run.conditions.values() for option in condition.optional]
    for name in row:
        if name not in (*wanted, *optional, *also):
            known = ", ".join([*wanted, *optional])
            known = f"only on {known}" if known else "on nothing"
            raise UserError(f"this run is conditioned {known}: leave {name}= out.")


def options_of(run: TrainedRun, conditioner: str) -> tuple[str, ...]:
    """The options that specify a conditioner's condition; a joint text encoder reads the prompt itself."""
    return run.conditions[conditioner].options if conditioner in run.conditions else ("prompts",)


def as_sample(run: TrainedRun, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of options as a sample, in the form that precompute reads from a shard."""
    values = dict(row)
    if "images" in values:
        values["images"] = load_picture(str(values["images"]), run.picture_size)
    sample: dict[str, Any] = {"caption": str(values.get("prompts", "")), "meta": {}}
    for name, condition in run.conditions.items():
        if name in run.config["conditioning"]:
            options = [*condition.options, *(option for option in condition.optional if option in values)]
            parts = condition.as_sample(**{option: values[option] for option in options})
            sample["meta"] |= parts.pop("meta", {})
            sample |= parts
    return {**sample, "key": title(row)}  # last, because the conditions refuse what is not a layout


def load_picture(path: str, size: tuple[int, int]) -> np.ndarray:
    """The picture's centre crop, (H, W, 3) uint8 on white, at the run's picture size, as in its training shards.

    Smaller pictures are enlarged by repeating pixels, so super-resolution shrinks them back to the same small picture.
    """
    try:
        picture = decode_picture(Path(path))
    except PictureError as error:
        raise UserError(f"images: {path} can't be used: {error}.") from None
    for change in picture.converted:
        print(f"images: {path}: {change}")
    image = Image.fromarray(picture.pixels)
    smaller = image.height <= size[0] and image.width <= size[1]
    method = Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS
    return np.array(ImageOps.fit(image, size[::-1], method))


def title(row: Mapping[str, Any]) -> str:
    """The requested conditions in a few words."""
    words = [str(row[name]) for name in ("prompts", "labels") if name in row]
    words += [" and ".join(str(box[0]) for box in row["layouts"])] if "layouts" in row else []
    words += [Path(str(row["images"])).stem] if "images" in row and not words else []
    sizes = {part: row[f"size.{part}"] for part in SIZE_PARTS if f"size.{part}" in row}
    words += [f"{part} {'x'.join(map(str, size))}" for part, size in sizes.items() if isinstance(size, list)]
    return ", ".join(words)


def file_stem(prompt: str) -> str:
    """The characters of a prompt that a file name can contain."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:40].strip("-") or "empty"
