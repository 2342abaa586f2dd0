#!/usr/bin/env python3
"""`fastcache generate` in a checkout, also for torchrun; --help says what it takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser_fastcache.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
