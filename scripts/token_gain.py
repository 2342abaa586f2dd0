#!/usr/bin/env python3
"""Measure what a token plan saves in time where most tokens stand still."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.token_gain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
