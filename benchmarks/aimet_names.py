"""Imported before AIMET where torchvision is missing: the names that AIMET asks it for, empty.

torchvision has no build for every torch; none of what is measured here uses it.
"""

import contextlib
import importlib
import sys
from types import ModuleType

NAMES = {"datasets": (), "transforms": ("Resize",), "ops": ("RoIPool", "roi_align", "nms")}

with contextlib.suppress(ImportError):
    importlib.import_module("torchvision")

if "torchvision" not in sys.modules:
    package = sys.modules["torchvision"] = ModuleType("torchvision")
    for name, members in NAMES.items():
        module = sys.modules[f"torchvision.{name}"] = ModuleType(f"torchvision.{name}")
        for member in members:
            setattr(module, member, type(member, (), {}))
        setattr(package, name, module)
