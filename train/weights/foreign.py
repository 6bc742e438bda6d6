"""Other tools' weights: reads files without running code from them, maps names in both directions, reports all errors
at once.

Modules with foreign names describe them as a list of `TensorMapping`; this module contains no foreign names.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_pipeline.common.errors import DataError, UserError
from train.checkpointing.safetensors_io import save_tensors

NAMED_AT_MOST = 20


class Form(NamedTuple):
    """Conversion of our tensors to the foreign tensor, and back."""

    to_foreign: Callable[[Sequence[Tensor]], Tensor]
    from_foreign: Callable[[Tensor], Sequence[Tensor]]


AS_IT_IS = Form(lambda ours: ours[0], lambda theirs: [theirs])


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """Our parameters `ours` correspond to the foreign parameter `theirs`."""

    ours: tuple[str, ...]
    theirs: str
    form: Form = AS_IT_IS


def to_foreign(carried: Iterable[TensorMapping], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state with foreign names and shapes."""
    return {one.theirs: one.form.to_foreign([state[name] for name in one.ours]) for one in carried}


def from_foreign(
    carried: Sequence[TensorMapping], state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path
) -> dict[str, Tensor]:
    """A foreign state with our names and shapes; UserError unless it matches our state `expected` exactly."""
    shapes = {name: torch.empty_like(value, device="meta") for name, value in expected.items()}
    refuse_mismatch(to_foreign(carried, shapes), state, where)
    found = {}
    for one in carried:
        found |= dict(zip(one.ours, one.form.from_foreign(state[one.theirs]), strict=True))
    return found


def refuse_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str | Path) -> None:
    """One UserError for all keys that are missing, unknown or of another shape: nothing is loaded partially."""
    if listed := mismatches(expected, found):
        raise UserError(f"{where} does not fit this model ({listed}): use the configuration that it was made with.")


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], named: int = NAMED_AT_MOST) -> str:
    """The keys that are missing, unknown or of another shape, in words, up to `named` of them; "" if there are none."""
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        has, needs = tuple(found[name].shape), tuple(expected[name].shape)
        if has != needs:
            faults.append(f"{name} is {has}, not {needs}")
    more = len(faults) - named
    return "; ".join(faults[:named]) + (f"; and {more} more" if more > 0 else "")


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Loads `state` into the model, in the model's dtypes; a model on the meta device moves to the CPU."""
    own = model.state_dict()
    refuse_mismatch(own, state, where)
    on_meta = any(value.is_meta for value in own.values())
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, assign=on_meta)


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled one (.ckpt, .bin, .pt, .pth) read with weights_only=True."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: use the path of the weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, wanted)
    state = _read_pickled(path)
    while isinstance(state.get("state_dict"), Mapping):  # a trainer's checkpoint
        state = state["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and wanted(name)}


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error}): download or save it again.") from error


def tensor_shapes(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors on the meta device, and the metadata of its header; for safetensors, only the header is read."""
    if path.suffix != ".safetensors":
        return {name: value.to("meta") for name, value in read_tensors(path).items()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error}): download or save it again.") from error


class _Ignored:
    """Placeholder for a trainer's own objects in old checkpoints: accepts any arguments and state, does nothing."""

    def __new__(cls, *arguments: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STOOD_IN_FOR = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


def _read_pickled(path: Path) -> Mapping[str, Any]:
    """torch.load can't run code here: other objects than tensors and containers become placeholders or are refused."""
    stand_ins = [(_Ignored, name) for name in _STOOD_IN_FOR]
    try:
        with torch.serialization.safe_globals(stand_ins):
            # Memory-mapped, since SD's training checkpoints contain the weights twice, and optimizer state.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise DataError(f"{path} can't be read as tensors: download or save it again, as .safetensors.") from error
        raise UserError(
            f"{path} contains {named[1]} besides tensors, and no code in it is run: convert it to .safetensors where "
            "you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, AssertionError) as error:
        raise DataError(f"{path} can't be read ({type(error).__name__}): download or save it again.") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} contains a {type(state).__name__}, not named tensors: use a state dict.")
    return state


def read_folder(folder: Path, stems: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of <stem>.safetensors or .bin, in one file or in shards with an index; safetensors is preferred."""
    for ending in ("safetensors", "bin"):
        for stem in stems:
            if (folder / f"{stem}.{ending}").exists():
                return read_tensors(folder / f"{stem}.{ending}")
            if (folder / f"{stem}.{ending}.index.json").exists():
                return _read_shards(folder, folder / f"{stem}.{ending}.index.json")
    raise UserError(f"{folder} has no {stems[0]}.safetensors: use a complete folder.")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map", {})
    state = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names {file}, which is not in the same folder: download the folder again.")
        state |= read_tensors(folder / file)
    refuse_mismatch({name: state.get(name, torch.empty(0)) for name in places}, state, index)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DataError if the file holds none."""
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(path.read_text())
        if isinstance(about, dict):
            return about
    raise DataError(f"{path} can't be read as JSON: download or save it again.")


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes safetensors like diffusers and transformers; the same tensors give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()}, path, {"format": "pt"})
