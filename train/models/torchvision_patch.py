"""Lets a CUDA-linked torchvision be imported beside a CPU torch; importing this module does it. Elsewhere a no-op.

The registry's torchvision dies on import there (`operator torchvision::nms does not exist`) and takes open_clip, timm,
and diffusers with it. Declaring the two operators' schemas is enough for everything but `ops.nms` and `io.decode_*`,
which still raise.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the declarations live as long as this reference


def _import_torchvision() -> None:
    global _library
    try:
        import torchvision
    except (RuntimeError, OSError) as error:
        if "torchvision::nms" not in str(error) or torch.cuda.is_available():
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision  # noqa: F401


_import_torchvision()
