"""A toy with its weights held in several ways, in one layout: uncached, threshold 0, and a mask.

Arguments: the toy, then JSON: the layout's flags, and lists of flags, a way each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch.distributed as dist
from support.worlds import ROOT, report

from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.xdit.loaded import finish, start

STEPS = 6
ZERO = CacheConfig(use_cache="Fast", cache_ratio_threshold=0)
MASK = CacheConfig(forecaster="damped_taylor", steps_mask=[1, 1, 0, 1, 0, 1])


def tried(model: str, flags: list[str]) -> dict[str, Any]:
    """Load the toy, and draw by it."""
    from xfuser_fastcache.benchmarks.field.run import described
    from xfuser_fastcache.xdit.generator import Generator
    from xfuser_fastcache.xdit.loaded import load_in_layout, xdit_parser

    given = ["--model", model, "--prompt", "a large red ring, top left, on dark blue"]
    given += ["--height", "64", "--width", "64", "--num_inference_steps", str(STEPS)]
    options = xdit_parser().parse_args([*given, "--max_sequence_length", "32", *flags])
    options.no_use_resolution_binning = True
    pipe = load_in_layout(options, "float32")
    generator = Generator(pipe, options)
    plain, zero, again, masked = (generator.run("", config) for config in (None, ZERO, None, MASK))
    # A rank that decodes nothing has nothing to compare.
    pairs = zip(plain.images, zero.images, again.images, masked.images, strict=True)
    return {
        "formats": described(pipe)["formats"],
        "identical": [np.array_equal(p, z) for p, z, _, _ in pairs],
        "restored": all(map(np.array_equal, plain.images, again.images)),
        "differs": not all(map(np.array_equal, plain.images, masked.images)) or not plain.images,
        "skipped": masked.statistics["block_approx_ratio"],
        "digest": masked.statistics["decisions_digest"],
        "finite": all(bool(np.isfinite(image).all()) for image in masked.images),
    }


def main() -> None:
    """Try all ways in turn."""
    toy, layout, ways = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    start()
    found = {" ".join(way): tried(str(ROOT / "toys" / toy), [*layout, *way]) for way in ways}
    report(dist.get_rank(), found=found)
    finish()


if __name__ == "__main__":
    main()
