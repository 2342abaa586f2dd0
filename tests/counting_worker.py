"""One rank that says how many tokens each decision rests on: pipelines' wrappers, and the runner's.

The runner's transformer is given all latents on every rank and cuts them by itself; a pipeline's
wrapper is given this rank's share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.counted import counted_tokens  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import latents_of, own_share, wrap  # noqa: E402

from diffusers_adapters.tiny import TINY_PIPELINES  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402
from xfuser_fastcache.xdit.runner_classes import as_the_runner_has_it  # noqa: E402

STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "linear": {"forecaster": "linear"},
    "output": {"forecaster": "output"},
    "split": {"motion_threshold": 0.3},
}
# Wan's own default is the output forecast. The first way must change nothing.
OF_WAN: dict[str, dict[str, Any]] = {
    "never": {"cache_ratio_threshold": 0},
    "output": {},
    "taylor": {"forecaster": "damped_taylor"},
    "split": {"motion_threshold": 0.3},
    # Attention exchanges tokens: ranks that do not hold equally many would not meet.
    "dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merged": {"enable_token_merge": True},
}


def cases(
    model: str, of_runner: bool, flags: dict[str, int], ways: Any = None, **sizes: int
) -> dict[str, Any]:
    """Run one model in some ways; `of_runner` says whose transformer it runs with."""
    from xfuser import xFuserArgs

    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    pipe, call = TINY_PIPELINES[model](**sizes)
    call["num_inference_steps"] = STEPS
    if of_runner:
        arguments = {"height": call["height"], "width": call["width"]}
        engine_config, _ = xFuserArgs(
            num_inference_steps=STEPS, output_type="latent", **arguments, **flags
        ).create_config()
        cpu_platform.prepare_engine_config(engine_config, pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe = as_the_runner_has_it(pipe, engine_config)
    else:
        pipe, _ = wrap(pipe, call, warmup_steps=1, **flags)
    found: dict[str, Any] = {}
    control = latents_of(pipe(**own_share(call, 1)))
    for way, options in (ways or WAYS).items():
        apply_cache_on_transformer(
            pipe.transformer,
            scheduler=pipe.scheduler,
            sync_timeout_s=60,
            verify_consensus=True,
            **{"cache_ratio_threshold": 2.0, **options},
        )
        with counted_tokens() as seen:
            output = latents_of(pipe(**own_share(call, 1)))
        statistics = get_cache_statistics(pipe.transformer)
        remove_cache(pipe.transformer)
        found[way] = {
            "tokens": sorted(seen),
            "hits": statistics["block_approx_ratio"],
            "nonfinite": statistics["nonfinite_steps"],
            # A pipeline's wrapper puts out nothing on all ranks but one.
            "finite": output is None or bool(output.isfinite().all()),
            "exact": None if output is None else bool((output == control).all()),
            "digest": statistics["decisions_digest"],
        }
    return found


def main() -> None:
    """Run every model, with each transformer that xDiT has for it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ulysses_degree", type=int, default=1)
    parser.add_argument("--ring_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    found = {
        "flux, pipeline": cases("flux", False, flags),
        "flux, runner": cases("flux", True, flags),
        "flux-kontext, runner": cases("flux-kontext", True, flags),
        "flux-fill, runner": cases("flux-fill", True, flags),
        "sd3, pipeline": cases("sd3", False, flags),
        # 27 tokens do not divide by two ranks.
        "wan": cases("wan", True, flags, OF_WAN, size=48),
        "wan-ti2v": cases("wan-ti2v", True, flags, OF_WAN, size=48),
    }
    report(dist.get_rank(), found=found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
