#!/usr/bin/env python3
"""`fastcache layouts` in a checkout; --help says what it takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser_fastcache.cli import main

if __name__ == "__main__":
    sys.exit(main(["layouts", *sys.argv[1:]]))
