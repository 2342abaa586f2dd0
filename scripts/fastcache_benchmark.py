#!/usr/bin/env python3
"""Time a model uncached, with FastCache, with TeaCache and with First-Block-Cache."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.fastcache_benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
