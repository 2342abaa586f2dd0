"""One rank of plain torch.distributed, without xfuser: each runs FLUX on its own prompt.

The ranks share their decisions, as ranks that split one forward pass would.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402

from diffusers_adapters.tiny.flux import tiny_flux  # noqa: E402
from xfuser_fastcache import (  # noqa: E402
    ConsensusError,
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)


def main() -> None:
    """Generate uncached, with a threshold of 0, cached, and with prompts compared."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    call["prompt_embeds"] = call["prompt_embeds"] * (1 + rank)

    def generate() -> torch.Tensor:
        noise = torch.Generator().manual_seed(rank)
        return pipe(**{**call, "num_inference_steps": 8, "generator": noise}).images

    control = generate()
    found = {}
    for name, threshold in (("never", 0.0), ("ever", 3.0)):
        apply_cache_on_transformer(
            pipe.transformer,
            scheduler=pipe.scheduler,
            cache_ratio_threshold=threshold,
            sync_timeout_s=30,
        )
        exact = torch.equal(generate(), control)
        found[name] = {"exact": exact, **get_cache_statistics(pipe.transformer)}
        remove_cache(pipe.transformer)
    apply_cache_on_transformer(
        pipe.transformer, scheduler=pipe.scheduler, sync_timeout_s=30, verify_consensus=True
    )
    try:
        generate()
    except ConsensusError as error:
        found["other prompts"] = str(error)
    remove_cache(pipe.transformer)
    report(rank, xfuser="xfuser" in sys.modules, **found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
