"""One rank of one layout: models that run there, uncached and under the backends asked for.

Tiny pipelines with random weights: what is tested is that ranks agree and that nothing hangs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.backend_options import NEVER, OFTEN  # noqa: E402
from support.calibrations import fitted_for  # noqa: E402
from support.matrix import STEPS, build, same, variants  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import describe, latents_of, own_share  # noqa: E402

from diffusers_adapters.registry import adapters  # noqa: E402
from diffusers_adapters.tiny import TINY_MODELS  # noqa: E402
from xfuser_fastcache.apply import (  # noqa: E402
    adapter_of,
    apply_cache_on_pipeline,
    denoisers_of,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.artifacts.calibration import OTHERS, fingerprint  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.groups import XDiTLayout  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402


def synchronous(generate: Callable[[], torch.Tensor | None]) -> dict[str, Any]:
    """Describe what the layout computes with all of PipeFusion's steps synchronous."""
    from xfuser.core.distributed import get_runtime_state

    runtime = get_runtime_state().runtime_config
    before, runtime.warmup_steps = runtime.warmup_steps, STEPS
    try:
        return describe(generate())
    finally:
        runtime.warmup_steps = before


def corrected(
    pipe: Any, call: dict[str, Any], generate: Callable[[], torch.Tensor | None]
) -> dict[str, Any]:
    """Describe a mask whose corrections differ from step to step and with the guidance branch.

    Without guidance there are none of a branch's own: diffusers names such a call as the one with
    the prompt, and xDiT does not.
    """
    guided = any(name.startswith("negative") for name in call)
    mask = [1, 1, 0, 1, 0, 1, 0, 0]
    weights = np.random.default_rng(0).normal(0.0, 0.1, (1, STEPS, 3, 5)).astype(np.float32)
    model, *others = map(XDiTLayout().model_of, denoisers_of(pipe).values())
    adapter = adapter_of(model)
    plan = adapter.plan(pipe.scheduler)
    blocks = sum(len(getattr(model, name)) for name in adapter.block_lists)
    known = [fingerprint(o, adapter.model_class, adapter.embedder, blocks) for o in others]
    fitted = fitted_for(
        SimpleNamespace(transformer=model),
        STEPS,
        levels=[step.noise_level for step in plan],
        masks={sum(mask): mask},
        steering=weights[:, :, 0],
        steering_guided=weights[: int(guided), :, 1:],
        metadata={OTHERS: known} if known else {},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/fitted.safetensors"
        fitted.save(path)
        apply_cache_on_pipeline(pipe, calibration=path, steps_mask=mask)
    found = describe(generate())
    remove_cache_from_pipeline(pipe)
    return found


def cases(
    model: str, backends: list[str], slow: bool, turn: int, flags: dict[str, Any]
) -> dict[str, Any]:
    """Run one model under some backends in this world's layout."""
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    replicas = flags["data_parallel_degree"]
    pipe, call = build(model, replicas, **flags)
    denoisers = list(denoisers_of(pipe).values())

    def generate() -> torch.Tensor | None:
        return latents_of(pipe(**own_share(call, replicas)))

    def apply(**options: Any) -> None:
        for denoiser in denoisers:
            apply_cache_on_transformer(
                denoiser,
                scheduler=pipe.scheduler,
                sync_timeout_s=60,
                verify_consensus=True,
                **options,
            )

    def remove() -> None:
        for denoiser in denoisers:
            remove_cache(denoiser)

    found: dict[str, Any] = {"group": XDiTLayout().decision_group(denoisers[0]).ranks}
    found["denoisers"] = len(denoisers)
    if flags["pipefusion_parallel_degree"] > 1:
        found["synchronous"] = synchronous(generate)
        control = generate()
    else:
        control = generate()
        found["synchronous"] = describe(control)
        if not adapters()[TINY_MODELS[model].adapter].branches_apart:
            found["corrected"] = corrected(pipe, call, generate)
    found["has_output"] = control is not None
    found["backends"] = {}
    for name in backends:
        apply(use_cache=name, **NEVER[name])
        found["backends"][name] = {"threshold_0_exact": same(control, generate())}
        remove()
        for variant, options in variants(model, name, slow, turn).items():
            apply(use_cache=name, **OFTEN[name], **options)
            cached = generate()
            repeats = same(cached, generate())
            statistics = [get_cache_statistics(denoiser) for denoiser in denoisers]
            remove()
            steps = [of["steps"] for of in statistics]
            hits = [of["block_approx_ratio"] * of["steps"] for of in statistics]
            found["backends"][name][variant] = {
                "repeats": repeats,
                "changed": control is None or not same(control, cached),
                "finite": cached is None or bool(cached.isfinite().all()),
                "digest": " ".join(of["decisions_digest"] for of in statistics),
                "hits": sum(hits) / sum(steps),
                "collectives_per_step": max(of["collectives_per_step"] for of in statistics),
                "steps": sum(steps),
                "forced_beyond_budget": sum(of["forced_beyond_budget"] for of in statistics),
            }
    # Each backend began on what the one before had left.
    found["restored_exact"] = same(control, generate())
    return found


def references(model: str, batches: list[int]) -> dict[str, Any]:
    """Describe what one rank computes of larger batches: what the layouts are compared with."""
    found = {}
    for batch in [] if TINY_MODELS[model].alone else batches:
        pipe, call = build(model, batch)

        def generate(pipe: Any = pipe, call: dict[str, Any] = call, batch: int = batch) -> Any:
            return latents_of(pipe(**own_share(call, batch)))

        found[str(batch)] = {"synchronous": describe(generate())}
        if not adapters()[TINY_MODELS[model].adapter].branches_apart:
            found[str(batch)]["corrected"] = corrected(pipe, call, generate)
    return found


def main() -> None:
    """Run the cases named on the command line and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="+", required=True, help="MODEL:BACKEND,BACKEND...")
    parser.add_argument("--slow", action="store_true", help="all ways in which a backend runs")
    parser.add_argument("--turn", type=int, default=0, help="of the layout, for its ways")
    parser.add_argument("--use_cfg_parallel", action="store_true")
    parser.add_argument("--reference_batch", type=int, nargs="+", default=[], help="on one rank")
    for name in ("ulysses", "ring", "pipefusion_parallel", "data_parallel"):
        parser.add_argument(f"--{name}_degree", type=int, default=1)
    flags = vars(parser.parse_args())
    named, batches = flags.pop("case"), flags.pop("reference_batch")
    slow, turn = flags.pop("slow"), flags.pop("turn")
    models = {model: names.split(",") for model, names in (case.split(":") for case in named)}
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    found = {m: cases(m, backends, slow, turn, flags) for m, backends in models.items()}
    for model in models:
        found[model]["references"] = references(model, batches)
    report(dist.get_rank(), models=found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
