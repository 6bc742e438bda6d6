"""LPIPS' weights from files: VGG16 and the linear heads, in the published layouts. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from train.models.perceptual import LPIPS, WIDTHS, BlurPool, PerceptualTerm
from train.weights.foreign import mismatches, read_tensors
from train.weights.saved import fingerprint

PACKAGE = "package"  # in place of a file: that of stlpips-pytorch
IN_PACKAGE = "weights/vST0.0/vgg_shift_tolerant.pth"
UNUSED = ("classifier.", "scaling_layer.", "lins.")  # VGG16's last layers; constants; the heads a second time
HEADS = tuple(f"lin{i}.model.1.weight" for i in range(len(WIDTHS)))
NAMED = 3  # tensors that a message names


def perceptual_loss(weights: str | Sequence[str], weight: float = 1.0) -> PerceptualTerm:
    """The perceptual term of an objective: `objective.perceptual` in conf/."""
    return PerceptualTerm(load_lpips(weights, "objective.perceptual.weights"), weight)


def load_lpips(weights: str | Sequence[str], option: str) -> LPIPS:
    """The distance whose weights lie in one file or in two, or in the package. `option` names the weights in messages.

    Layouts: torchvision's VGG16 (features.N.weight) with LPIPS' heads (lin0.model.1.weight ...); all weights of an
    LPIPS of the package lpips; all weights of a shift-tolerant LPIPS of the package stlpips-pytorch.
    """
    found: dict[str, Tensor] = {}
    for one in [weights] if isinstance(weights, str) else weights:
        found |= read_tensors(package_file() if one == PACKAGE else Path(one), lambda name: not name.startswith(UNUSED))
    where = f"{option}={weights}"
    in_slices = any(name.startswith("net.slice") for name in found)
    _refuse_incomplete(found, "net.slice1.0.weight" if in_slices else "features.0.weight", where)
    model = LPIPS(blurred=any(name.endswith(".filt") for name in found))
    names = published_names(model, in_slices)
    if faults := mismatches({names[name]: value for name, value in model.state_dict().items()}, found, NAMED):
        raise UserError(f"{where} is not LPIPS' VGG16 ({faults}): use torchvision's vgg16 and LPIPS' vgg.pth.")
    state = {name: found[theirs].float() for name, theirs in names.items()}
    model.load_state_dict(state)
    model.fingerprint = fingerprint({"space": model.space}, state)
    return model


def published_names(model: LPIPS, in_slices: bool) -> dict[str, str]:
    """Our names of parameters and buffers -> those of the files: a layer's number counts all layers before it."""
    names = {f"heads.{i}": name for i, name in enumerate(HEADS)}
    count = itertools.count()
    for number, stage in enumerate(model.trunk.stages):
        for at, layer in enumerate(stage):
            where = f"net.slice{number + 1}.{next(count)}" if in_slices else f"features.{next(count)}"
            parts = {nn.Conv2d: ("weight", "bias"), BlurPool: ("filt",)}.get(type(layer), ())
            names |= {f"trunk.stages.{number}.{at}.{part}": f"{where}.{part}" for part in parts}
    return names


def package_file() -> Path:
    """The weights that stlpips-pytorch carries; its code is neither imported nor run."""
    spec = importlib.util.find_spec("stlpips_pytorch")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(
            "weights=package needs the package stlpips-pytorch: pip install --no-deps stlpips-pytorch==0.0.2, or use "
            "files, as weights=[vgg16.pth,lpips_vgg.pth]."
        )
    return Path(places[0]) / IN_PACKAGE


def _refuse_incomplete(found: Mapping[str, Tensor], first: str, where: str) -> None:
    if first not in found:
        raise UserError(
            f"{where} contains no VGG16 (neither features.0.weight nor net.slice1.0.weight): add torchvision's "
            "vgg16 weights, as weights=[vgg16.pth,lpips_vgg.pth]."
        )
    if not any(name in found for name in HEADS):
        raise UserError(
            f"{where} has VGG16, but not LPIPS' linear heads ({HEADS[0]} ...): add them, as "
            "weights=[vgg16.pth,lpips_vgg.pth]."
        )
