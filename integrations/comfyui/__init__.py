"""Nodes that put xfuser-fastcache's step cache on a model of ComfyUI: see docs/comfyui.md."""

from xfuser_fastcache.plugins import ADAPTERS

from .adapters import FAMILIES
from .nodes import FastCache, FastCacheReport

for _name, _adapter in FAMILIES.items():
    ADAPTERS.add(_name, _adapter)

NODE_CLASS_MAPPINGS = {"FastCache": FastCache, "FastCacheReport": FastCacheReport}
NODE_DISPLAY_NAME_MAPPINGS = {"FastCache": "Fast cache", "FastCacheReport": "Fast cache: decisions"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
