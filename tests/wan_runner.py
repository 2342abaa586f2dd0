"""One rank of xDiT's runner in a folder in which models lie by the names of xDiT's registry.

The first argument is that folder.
"""

from __future__ import annotations

import os
import sys

from xfuser_fastcache.xdit import cpu_platform, runner

if __name__ == "__main__":
    os.chdir(sys.argv.pop(1))
    cpu_platform.enable_cpu_platform()
    runner.run()
