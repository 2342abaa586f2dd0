#!/usr/bin/env python3
"""Ask a running `fastcache serve` for a picture, and watch its steps. Needs nothing but Python.

python examples/draw.py "a large red ring, top left" ring.png --seed 3
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def events(url: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Post a request and yield the service's events: a word and what goes with it."""
    asked = urllib.request.Request(
        f"{url}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Accept": "text/event-stream"},
    )
    with urllib.request.urlopen(asked) as answer:
        word = ""
        for line in answer:
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                word = value
            elif key == "data":
                yield word, json.loads(value)


def main() -> int:
    """Draw one picture; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, help="denoising steps")
    given = parser.parse_args()
    body = {"prompt": given.prompt, "seed": given.seed, "num_inference_steps": given.steps}
    try:
        for word, found in events(given.url, {k: v for k, v in body.items() if v is not None}):
            if word == "progress":
                skipped = found["block_approx_ratio"]
                print(f"step {found['step']} of {found['steps']}, {skipped:.0%} skipped")
            elif word == "error":
                print(found["detail"], file=sys.stderr)
                return 1
            elif word == "done":
                given.picture.write_bytes(base64.b64decode(found["image"]))
                print(f"{given.picture}: seed {found['seed']}, {found['seconds']:.2f} s")
    except urllib.error.HTTPError as error:
        print(f"{error.code}: {error.read().decode()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
