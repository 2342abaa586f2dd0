#!/usr/bin/env python3
"""Train a toy pipeline on pictures drawn from captions, and mark what it generates."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.dev.train_toy import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
