"""One rank of Ulysses 2 with xDiT's parallel VAE on the toy FLUX: pictures uncached and cached."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.toy import THRESHOLD, generate, load, psnr, same  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402


def cases(pipe: Any) -> dict[str, Any]:
    """Run all cases and return what the test asserts on."""
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    def cached(threshold: float) -> tuple[Any, float]:
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, cache_ratio_threshold=threshold
        )
        picture = generate(pipe, output_type="pt")
        hits = get_cache_statistics(pipe.transformer)["block_approx_ratio"]
        remove_cache(pipe.transformer)
        return picture, hits

    control = generate(pipe, output_type="pt")
    exact, idle_hits = cached(0)
    found, hits = cached(THRESHOLD)
    return {
        "decoder": type(pipe.module.vae.decoder).__name__,
        "has_output": control is not None,
        "threshold_0_exact": same(control, exact) and idle_hits == 0,
        "hits": hits,
        "psnr": psnr(found, control),
    }


def main() -> None:
    """Build the layout, run the cases, report."""
    cpu_platform.enable_cpu_platform()
    pipe = load(ulysses_degree=2, use_parallel_vae=True, warmup_steps=1)
    report(dist.get_rank(), **cases(pipe))
    cpu_platform.finish()


if __name__ == "__main__":
    main()
