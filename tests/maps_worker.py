"""One rank of one xDiT layout on the toy FLUX with fitted linear maps; started by `run_world`.

Arguments: the degree of Ulysses, that of PipeFusion, a file of maps, another one for the last rank,
and a folder for the latents.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.toy import MASK, generate, load  # noqa: E402
from support.worlds import report  # noqa: E402

from xfuser_fastcache import (  # noqa: E402
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.hooks import hook_on  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402


def main() -> None:
    """Build the layout, run with one file on all ranks, then with two files."""
    ulysses, stages, ours, theirs, folder = sys.argv[1:]
    cpu_platform.enable_cpu_platform()
    pipe = load(ulysses_degree=int(ulysses), pipefusion_parallel_degree=int(stages), warmup_steps=1)
    rank, found = dist.get_rank(), dict[str, Any]()

    def cached(path: str) -> str:
        """Put the cache on; return the error, or "" where there is none."""
        try:
            apply_cache_on_transformer(
                pipe.transformer, scheduler=pipe.scheduler, sync_timeout_s=60, steps_mask=MASK,
                linear_maps=path,
            )  # fmt: skip
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found["error"] = cached(ours)
    if not found["error"]:
        latents = generate(pipe)
        found["statistics"] = get_cache_statistics(pipe.transformer)
        remove_cache(pipe.transformer)
        if latents is not None:
            torch.save(latents, Path(folder) / "latents.pt")
        found["two files"] = cached(theirs if rank else ours)
    found["left"] = hook_on(pipe.transformer) is not None
    report(rank, **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
