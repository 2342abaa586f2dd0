#!/usr/bin/env python3
"""Simulate skip decisions whose harm is known, and print how often each test skips wrongly."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.simulate_tests import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
