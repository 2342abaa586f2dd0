"""What the server of ranks has imported beside torch and diffusers; nothing is looked up yet."""

import gc
from importlib import import_module

from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

enable_cpu_platform()
for _name in (
    "xfuser.model_executor.models.runner_models",
    "xfuser_fastcache.apply",
    "xfuser_fastcache.xdit.mends",
    "xfuser_fastcache.xdit.pipeline",
):
    import_module(_name)

# Each rank would search all objects for pipelines, and copy their pages; there are none yet.
import_module("xfuser_fastcache.clock.pipelines").watch_pipelines()

# A round of a rank's garbage collector would go through all of it, and copy its pages.
gc.collect()
gc.freeze()
