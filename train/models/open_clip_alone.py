"""The only importer of open_clip: at first use, and without transformers and timm.

open_clip imports these two where they are installed, for models that are not built here: seconds, and timm brings
wandb. They are hidden from it while it is imported, as if they were not installed.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

NOT_NEEDED = ("transformers", "timm")


@functools.cache
def open_clip() -> ModuleType:
    """The package. torchvision is made importable beside a CPU torch first."""
    import train.models.torchvision_patch  # noqa: F401

    hidden = {name: sys.modules.get(name) for name in NOT_NEEDED}
    sys.modules.update(dict.fromkeys(NOT_NEEDED))  # None: an import of it is an ImportError
    try:
        import open_clip
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return open_clip
