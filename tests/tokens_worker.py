"""One rank of one layout: token plans on tiny pipelines, also where a rank's tokens stand still."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.calibrations import fitted_for  # noqa: E402
from support.matrix import SIZES, STEPS, build, same  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import own_share  # noqa: E402

from diffusers_adapters.tiny import TINY_PIPELINES  # noqa: E402
from xfuser_fastcache.apply import adapter_of  # noqa: E402
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps  # noqa: E402
from xfuser_fastcache.artifacts.linear_maps import FittedMaps  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402

# What moves on random weights changes by less than this.
STILL = 1e4
PLANS: dict[str, dict[str, Any]] = {
    "all move": {"motion_threshold": 0, "enable_block_approx": False},
    "reuse": {"motion_threshold": STILL, "static_kv": "reuse"},
    "drop": {"motion_threshold": STILL, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
    "merge and reuse": {"motion_threshold": STILL, "static_kv": "reuse", "num_stages": 2},
    "merge and drop": {"motion_threshold": STILL, "static_kv": "drop", "num_stages": 2},
    "adaptive": {"adaptive_beta": [0.0, 0.3, 0.0, 0.0]},
    "block cache too": {"motion_threshold": STILL, "cache_ratio_threshold": 12.0},
    "three spans": {"motion_threshold": STILL, "granularity": 3, "cache_ratio_threshold": 12.0},
}


def plans_of(place: int, in_turn: bool) -> list[str]:
    """Return the plans that run on the model in this place; in turn all run on the first alone."""
    return [p for i, p in enumerate(PLANS) if not in_turn or place == 0 or (place + i) % 2 == 0]


Latents = Callable[[torch.Tensor, int], torch.Tensor]


def a_half(x: torch.Tensor) -> torch.Tensor:
    """Return every second token, or the left half of a picture, as a view."""
    return x[:, ::2] if x.dim() == 3 else x[..., : x.shape[-1] // 2]


def hold(moving: bool) -> Latents:
    """Hold the latents still, but for half of the tokens where `moving`."""

    def latents(first: torch.Tensor, call: int) -> torch.Tensor:
        held = first.clone()
        if moving:
            half = a_half(held)
            half += torch.randn(half.shape, generator=torch.Generator().manual_seed(call))
        return held

    return latents


def drift(first: torch.Tensor, call: int) -> torch.Tensor:
    """Turn half of the latents round at every call and let the others drift, on any shard alike."""
    held = first * (1 + 0.01 * (call % 4))
    a_half(held).mul_((-1) ** call)
    return held


@contextmanager
def latents_are(transformer: torch.nn.Module, latents: Latents) -> Iterator[None]:
    """Give the transformer what `latents` makes of those of its first call, at calls 1, 2, ..."""
    given: list[torch.Tensor] = []

    def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        held = latents(given[0], len(given))
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": held}
        return (held, *args[1:]), kwargs

    handle = transformer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def maps_file(model: str, folder: str) -> str:
    """Write linear maps of a model's stack, of two buckets, and return the path."""
    pipe, _ = TINY_PIPELINES[model](**SIZES.get(model, {}))
    dim = adapter_of(pipe.transformer).dim(pipe.transformer)
    slope, constant = torch.randn(2, dim, generator=torch.Generator().manual_seed(2))
    used = LinearMap(diagonal=slope, bias=constant), LinearMap(bias=-constant)
    of = {"linear": SpanMaps((0.15, 1.0), used, (None, None))}
    path = f"{folder}/{model}.safetensors"
    FittedMaps(of, fitted_for(pipe, STEPS).metadata).save(path)
    return path


def some_numbers(images: torch.Tensor | None) -> list[float]:
    """Return a few pixels; none on a rank without output."""
    return [] if images is None else images.flatten()[:: images.numel() // 40].tolist()


def main() -> None:
    """Run the models named on the command line and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--in_turn", action="store_true", help="not all plans on each model")
    parser.add_argument("--use_cfg_parallel", action="store_true")
    for name in ("ulysses", "ring", "pipefusion_parallel"):
        parser.add_argument(f"--{name}_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    models, in_turn = flags.pop("model"), flags.pop("in_turn")
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("xfuser_fastcache").addHandler(handler)

    def cases(model: str) -> dict[str, Any]:
        pipe, call = build(model, 1, **flags)

        def generate() -> torch.Tensor | None:
            output = pipe(**own_share(call, 1))
            return None if output is None else output.images

        def cached(run: Callable[[], Any], **options: Any) -> tuple[Any, Any, dict[str, Any]]:
            options = {"cache_ratio_threshold": 0, **options}
            apply_cache_on_transformer(
                pipe.transformer, scheduler=pipe.scheduler, sync_timeout_s=60, **options
            )
            first, second = run(), run()
            statistics = get_cache_statistics(pipe.transformer)
            remove_cache(pipe.transformer)
            return first, second, statistics

        control = generate()
        found: dict[str, Any] = {}
        for plan in plans_of(models.index(model), in_turn):
            images, again, statistics = cached(generate, **PLANS[plan])
            found[plan] = {
                "exact": same(images, control),
                "repeats": same(images, again),
                "finite": images is None or bool(images.isfinite().all()),
                "has_output": images is not None,
                "digest": statistics["decisions_digest"],
                "spatial": statistics["spatial_approx_ratio"],
                "blocks": statistics["block_approx_ratio"],
                "collectives": statistics["collectives_per_step"],
            }
        if flags["ulysses_degree"] * flags["ring_degree"] > 1:
            found["uneven"] = []
            for kept in ("reuse", "drop"):
                options = {"motion_threshold": 1e-3, "static_kv": kept}
                with latents_are(pipe.transformer, hold(moving=dist.get_rank() == 0)):
                    *_, statistics = cached(generate, **options)
                found["uneven"].append(statistics["spatial_approx_ratio"])
        if flags["pipefusion_parallel_degree"] == 1:
            with tempfile.TemporaryDirectory() as folder:
                path = maps_file(model, folder)
                for name, given in (("last residual", {}), ("mapped", {"linear_maps": path})):
                    with latents_are(pipe.transformer, drift):
                        images, _, statistics = cached(generate, motion_threshold=0.01, **given)
                    found[name] = [statistics["spatial_approx_ratio"], *some_numbers(images)]
        found["restored"] = same(generate(), control)
        return found

    found = {model: cases(model) for model in models}
    warnings = sum("Token plans do nothing" in message for message in said)
    report(dist.get_rank(), models=found, warnings=warnings)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
