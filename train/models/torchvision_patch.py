"""Makes a CUDA-linked torchvision importable with a CPU torch, when this module is imported. Otherwise a no-op.

PyPI's torchvision fails on import there (`operator torchvision::nms does not exist`), and so do open_clip, timm and
diffusers. Declaring the schemas of two operators is enough for everything except `ops.nms` and `io.decode_*`, which
still raise.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the declarations last as long as this reference


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
