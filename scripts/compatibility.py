#!/usr/bin/env python3
"""Run every feature of diffusers and xDiT beside the cache, and write down what came out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.compatibility import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
