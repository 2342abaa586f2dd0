"""One rank of one xDiT layout on the toy FLUX: every case of that layout in one world.

Started by `worlds.run_world`; arguments are xDiT's flags.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support import toy  # noqa: E402
from support.calibrations import fitted_on  # noqa: E402
from support.toy import MASK, PROMPTS, STEPS, THRESHOLD, load, psnr, same  # noqa: E402
from support.worlds import report  # noqa: E402

from diffusers_adapters.flux import FluxAdapter  # noqa: E402
from xfuser_fastcache.artifacts.calibration import Fitted, fingerprint  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.groups import XDiTLayout  # noqa: E402


def module_state(transformer: torch.nn.Module) -> list[str]:
    """Everything that a hook could leave behind: classes, instance attributes, state_dict keys."""
    found = list(transformer.state_dict())
    for name, module in transformer.named_modules():
        found += [f"{name}: {type(module).__name__}.{key}" for key in sorted(module.__dict__)]
    return found


def generate(pipe: Any, **changes: Any) -> torch.Tensor | None:
    """Draw small pictures: a quarter of the tokens tells the same."""
    return toy.generate(pipe, **{"height": 64, "width": 64, **changes})


def cases(pipe: Any) -> dict[str, Any]:
    """Run all cases of a layout and return what the test asserts on."""
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    transformer = pipe.transformer
    found: dict[str, Any] = {}
    started = time.perf_counter()
    control = generate(pipe)
    found["uncached_s"] = time.perf_counter() - started
    # After the first run: xfuser and diffusers add attributes of their own in it.
    before = module_state(transformer)
    found["has_output"] = control is not None
    found["uncached_repeats"] = same(control, generate(pipe))

    def apply(**options: Any) -> None:
        options = {"cache_ratio_threshold": THRESHOLD, "verify_consensus": True, **options}
        apply_cache_on_transformer(
            transformer, scheduler=pipe.scheduler, sync_timeout_s=60, **options
        )

    apply(cache_ratio_threshold=0)
    found["state_dict_unchanged"] = list(transformer.state_dict()) == _keys(pipe)
    found["threshold_0_exact"] = same(control, generate(pipe))
    found["threshold_0_hits"] = get_cache_statistics(transformer)["block_approx_ratio"]
    remove_cache(transformer)
    found["left_behind"] = sorted(set(module_state(transformer)) ^ set(before))
    found["restored_exact"] = same(control, generate(pipe))

    apply()
    started = time.perf_counter()
    cached = generate(pipe)
    found["cached_s"] = time.perf_counter() - started
    first = get_cache_statistics(transformer)
    found["second_generation_exact"] = same(cached, generate(pipe))
    others = {
        "steps": {"num_inference_steps": STEPS - 3},
        "size": {"height": 64, "width": 96},
        "batch": {"prompt": PROMPTS * 2},
    }
    after = {name: generate(pipe, **change) for name, change in others.items()}
    found["back_again_exact"] = same(cached, generate(pipe))
    found["statistics"] = get_cache_statistics(transformer)
    found["first_statistics"] = first
    remove_cache(transformer)
    found["psnr"] = psnr(cached, control)
    found["changed"] = control is None or not same(control, cached)
    for name, change in others.items():
        apply()
        found[f"other_{name}_exact"] = same(after[name], generate(pipe, **change))
        remove_cache(transformer)
        found[f"other_{name}_psnr"] = psnr(after[name], generate(pipe, **change))

    if XDiTLayout().decision_group().stages > 1:
        apply(patch_kv_slope=0)
        found["aged_psnr"] = psnr(generate(pipe), control)
        found["aged_carried"] = get_cache_statistics(transformer)["carried_keys"]
        remove_cache(transformer)

    spans = {"granularity": 5}
    for forecaster, options in {"reuse": spans, "linear": spans, "output": {}}.items():
        apply(forecaster=forecaster, **options)
        spans = generate(pipe)
        found[f"{forecaster}_digest"] = get_cache_statistics(transformer)["decisions_digest"]
        found[f"{forecaster}_hits"] = get_cache_statistics(transformer)["block_approx_ratio"]
        found[f"{forecaster}_repeats"] = same(spans, generate(pipe))
        remove_cache(transformer)
        found[f"{forecaster}_psnr"] = psnr(spans, control)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/calibration.safetensors"
        calibration(pipe).save(path)
        apply_cache_on_transformer(
            transformer, scheduler=pipe.scheduler, sync_timeout_s=60, calibration=path,
            computed_steps=sum(MASK),
        )  # fmt: skip
        calibrated = generate(pipe)
        statistics = get_cache_statistics(transformer)
        found["calibrated_digest"] = statistics["decisions_digest"]
        found["calibrated_hits"] = statistics["block_approx_ratio"]
        found["calibrated_repeats"] = same(calibrated, generate(pipe))
        remove_cache(transformer)
        found["calibrated_psnr"] = psnr(calibrated, control)
    apply(stagger_stages=True)
    staggered = generate(pipe)
    found["staggered_digest"] = get_cache_statistics(transformer)["decisions_digest"]
    found["staggered_repeats"] = same(staggered, generate(pipe))
    remove_cache(transformer)
    found["staggered_psnr"] = psnr(staggered, control)
    found["staggered_as_before"] = same(staggered, cached)
    return found


def budget(pipe: Any) -> dict[str, Any]:
    """Draw with a budget alone; return the latents, and what the scheduler has kept of it."""
    from xfuser_fastcache import apply_cache_on_transformer

    generate(pipe)
    before = set(vars(pipe.scheduler))
    apply_cache_on_transformer(pipe.transformer, sync_timeout_s=60, computed_steps=sum(MASK))
    latents = generate(pipe)
    return {
        "latents": None if latents is None else latents.flatten().tolist(),
        "left_behind": sorted(set(vars(pipe.scheduler)) ^ before),
    }


def calibration(pipe: Any) -> Fitted:
    """Return a calibration for this generation, as one rank would have made it."""
    levels = [step.noise_level for step in FluxAdapter.plan(pipe.scheduler)]
    model = XDiTLayout().model_of(pipe.transformer)
    blocks = model.config.num_layers + model.config.num_single_layers
    made = fitted_on(
        levels,
        lags=4,
        masks={sum(MASK): MASK},
        steering=np.full((1, len(MASK), 5), 0.01, np.float32),
    )
    metadata = fingerprint(model, FluxAdapter.model_class, FluxAdapter.embedder, blocks)
    return replace(made, metadata={**made.metadata, **metadata})


def _keys(pipe: Any) -> list[str]:
    return [key for key, _ in pipe.transformer.named_parameters()]


def main() -> None:
    """Build the layout, run the cases, report."""
    parser = argparse.ArgumentParser()
    for flag in ("ulysses", "ring", "pipefusion_parallel", "data_parallel"):
        parser.add_argument(f"--{flag}_degree", type=int, default=1)
    parser.add_argument("--num_pipeline_patch", type=int)
    parser.add_argument("--budget", action="store_true", help="draw with a budget alone")
    options = parser.parse_args()
    of_layout = {name: value for name, value in vars(options).items() if name != "budget"}
    cpu_platform.enable_cpu_platform()
    pipe = load(**of_layout, warmup_steps=1)
    from xfuser.core.distributed import get_model_replica_group

    stages = options.pipefusion_parallel_degree
    found = budget(pipe) if options.budget else cases(pipe)
    report(dist.get_rank(), group=get_model_replica_group().ranks, stages=stages, **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
