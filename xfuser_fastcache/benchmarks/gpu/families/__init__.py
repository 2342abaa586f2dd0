"""The families of models that are measured: real shapes, what a call is given, and its scheduler.

Another family is another file, and another row of `FAMILIES`. Weights and inputs are random, so
that nothing is downloaded; a pipeline's own conventions of time steps and guidance hold.
"""

from __future__ import annotations

from xfuser_fastcache.benchmarks.gpu.families.base import Family
from xfuser_fastcache.benchmarks.gpu.families.flux import FLUX
from xfuser_fastcache.benchmarks.gpu.families.pixart import PIXART
from xfuser_fastcache.benchmarks.gpu.families.qwen_image import QWEN_IMAGE
from xfuser_fastcache.benchmarks.gpu.families.sd3 import SD3
from xfuser_fastcache.benchmarks.gpu.families.wan import WAN_1_3B, WAN_14B

FAMILIES: dict[str, Family] = {
    "flux": FLUX,
    "sd3": SD3,
    "pixart": PIXART,
    "qwen-image": QWEN_IMAGE,
    "wan-1.3b": WAN_1_3B,
    "wan-14b": WAN_14B,
}
