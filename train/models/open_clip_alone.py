"""The only module that imports open_clip: at first use, and without transformers and timm.

If they are installed, open_clip imports both for models that are not used here. That takes seconds, and timm imports
wandb. While open_clip is imported, they are hidden as if they were not installed.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

NOT_NEEDED = ("transformers", "timm")


@functools.cache
def open_clip() -> ModuleType:
    """The package. First makes torchvision importable with a CPU torch."""
    import train.models.torchvision_patch  # noqa: F401

    hidden = {name: sys.modules.get(name) for name in NOT_NEEDED}
    sys.modules.update(dict.fromkeys(NOT_NEEDED))  # None: importing it raises ImportError
    try:
        import open_clip
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return open_clip
