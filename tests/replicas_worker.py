"""One rank of a job in which not all ranks decide together.

`replicas_worker.py replicas --ulysses_degree N`: two data-parallel replicas with a prompt each.
`replicas_worker.py vae`: two ranks run the transformer, the third is xDiT's separate VAE rank.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import own_share, wrap  # noqa: E402

from diffusers_adapters.tiny.sd3 import tiny_sd3  # noqa: E402
from xfuser_fastcache import (  # noqa: E402
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.groups import XDiTLayout  # noqa: E402

STEPS = 10
# The two prompts of `tiny_sd3` differ in which steps change less than this.
THRESHOLD = 0.17
SYNC_TIMEOUT_S = 20.0
# How long a rank waits at the store for the others' turn to end.
TURN_S = 90.0


def apply(pipe: Any) -> None:
    """Put the cache on with a short limit, so that whoever waits for nobody says so soon."""
    apply_cache_on_transformer(
        pipe.transformer,
        scheduler=pipe.scheduler,
        cache_ratio_threshold=THRESHOLD,
        sync_timeout_s=SYNC_TIMEOUT_S,
        verify_consensus=True,
    )


def digest(pipe: Any, call: dict[str, Any]) -> str | None:
    """Generate once and return the digest of the latents; None on a rank without output."""
    output = pipe(**call)
    if output is None:
        return None
    return hashlib.sha256(output.images.contiguous().numpy().tobytes()).hexdigest()


def cached(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Apply the cache, generate once, remove it."""
    apply(pipe)
    found: dict[str, Any] = {"latents": digest(pipe, call)}
    statistics = get_cache_statistics(pipe.transformer)
    remove_cache(pipe.transformer)
    found["decisions"] = statistics["decisions_digest"]
    found["hits"] = statistics["block_approx_ratio"]
    return found


def replicas(flags: dict[str, Any]) -> dict[str, Any]:
    """Both replicas at once with a prompt each, with the same prompt, and in turn."""
    from xfuser.core.distributed import get_data_parallel_rank

    pipeline, both = tiny_sd3(batch=2)
    both["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipeline, both, data_parallel_degree=2, **flags)
    replica = get_data_parallel_rank()
    found: dict[str, Any] = {
        "replica": replica,
        "group": XDiTLayout().decision_group().ranks,
        "uncached": digest(pipe, own_share(both, 2)),
        "own": cached(pipe, own_share(both, 2)),
    }
    # Every replica gets the same prompt and noise: first replica 0's, then replica 1's.
    found["same"] = [
        cached(pipe, {**sample(both, item), "generator": generator(item)}) for item in (0, 1)
    ]

    store = dist.distributed_c10d._get_default_store()
    apply(pipe)
    turns = []
    for turn in (0, 1):
        if replica == turn:
            turns = [digest(pipe, own_share(both, 2)) for _ in range(3)]
            store.add(f"turn {turn}", 1)
        else:
            store.wait([f"turn {turn}"], timedelta(seconds=TURN_S))
    found["turns"] = turns
    remove_cache(pipe.transformer)
    return found


def generator(item: int) -> list[torch.Generator]:
    """The noise that `own_share` gives to a sample."""
    return [torch.Generator("cpu").manual_seed(1000 + item)]


def sample(call: dict[str, Any], item: int) -> dict[str, Any]:
    """The arguments of one sample of a batch."""
    return {
        name: value[item : item + 1] if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


def vae() -> dict[str, Any]:
    """Two ranks of Ulysses 2 generate with a cache; the VAE rank waits at the store meanwhile."""
    from xfuser.core.distributed import init_distributed_environment

    pipeline, call = tiny_sd3()
    call["num_inference_steps"] = STEPS
    flags = {"ulysses_degree": 2, "dit_parallel_size": 2, "vae_parallel_size": 1}
    init_distributed_environment()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 2:
        found = as_vae_rank(pipeline, call, flags)
        store.wait(["generated"], timedelta(seconds=TURN_S))
        return found
    pipe, _ = wrap(pipeline, call, **flags)
    uncached = digest(pipe, own_share(call, 1))
    found = {"group": XDiTLayout().decision_group().ranks, **cached(pipe, own_share(call, 1))}
    store.add("generated", 1)
    return {**found, "uncached": uncached}


def as_vae_rank(pipeline: Any, call: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What befalls a VAE rank: in xDiT's set-up of all groups, and with the VAE group alone.

    The latter is what xDiT's `VAEWorker` sets up, here with gloo.
    """
    from xfuser.core.distributed import init_vae_group

    found = {}
    try:
        wrap(pipeline, call, **flags)
    except AssertionError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found["control"] = f"{Path(last.filename).name}, {last.name}: {last.line}"
    init_vae_group(flags["dit_parallel_size"], flags["vae_parallel_size"], "gloo")
    try:
        apply(pipeline)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def main() -> None:
    """Run a case and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["replicas", "vae"])
    parser.add_argument("--ulysses_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    case = flags.pop("case")
    cpu_platform.enable_cpu_platform()
    found = vae() if case == "vae" else replicas(flags)
    report(dist.get_rank(), **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
