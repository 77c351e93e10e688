"""A checkout of sd-scripts made importable, for the scripts that derive numbers from it.

Import it as ``from sd_scripts import ...``: these scripts are run by path, so their own folder is
where Python looks first.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import types

__all__ = ["enable_imports"]


def enable_imports() -> None:
    """Put the checkout at ``$SD_SCRIPTS_DIR`` on the path; torchvision need not be installed.

    Call it after importing diffusers and transformers, which look for the real torchvision.
    """
    sys.path.insert(0, os.environ["SD_SCRIPTS_DIR"])
    try:
        importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError):  # missing, or built for another torch
        _stand_in_for_torchvision()


def _stand_in_for_torchvision() -> None:
    """Name the modules that are imported; nothing that these scripts run uses what is in them."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    package, transforms = types.ModuleType("torchvision"), types.ModuleType("transforms")
    for name in ("Compose", "ToTensor", "Normalize"):
        setattr(transforms, name, lambda *_: None)
    package.transforms = transforms
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    sys.modules.update({"torchvision": package, "torchvision.transforms": transforms})
