#!/usr/bin/env python3
"""Measure what the cache costs: the never-skip ratio, and where it goes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.overhead import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
