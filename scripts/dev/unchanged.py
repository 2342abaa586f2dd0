#!/usr/bin/env python3
"""Record what every backend does on the toys in every layout of one and two ranks; compare later.

    python scripts/dev/unchanged.py record runs/before.json
    python scripts/dev/unchanged.py compare runs/before.json

A record holds, for each toy, layout and case of the list below, the digest of all decisions, a
hash of the final latents and the counters of `get_cache_statistics`. A change that should change
nothing is compared with the record of the commit before it. Hashes of latents are those of one
machine and one torch: record and compare on the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

TOYS = ("flux", "sd3", "pixart")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "ulysses 2": (2, {"ulysses_degree": 2}),
    "ring 2": (2, {"ring_degree": 2}),
    "pipefusion 2": (2, {"pipefusion_parallel_degree": 2}),
    "cfg 2": (2, {"use_cfg_parallel": True}),
    "data 2": (2, {"data_parallel_degree": 2}),
}
PROMPTS = ["a large red ring, top left, on dark blue", "a small green square, center, on black"]
MASK = [1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1]
SHORT, PLANNED = len(MASK), 28  # steps without a calibration; those that calibrations are for

_SPLIT = {"cache_ratio_threshold": 0.3, "motion_threshold": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "Fast, never": {"cache_ratio_threshold": 0},
    "Fast": {"cache_ratio_threshold": 0.3},
    "Fast, xDiT's name": {"rel_l1_thresh": 0.3},
    "Fast, paper": {"test": "paper"},
    "Fast, reuse, 3 spans": {
        "cache_ratio_threshold": 0.8,
        "forecaster": "reuse",
        "granularity": 3,
    },
    "Fast, linear, blocks": {
        "cache_ratio_threshold": 0.8,
        "forecaster": "linear",
        "granularity": "block",
    },
    "Fast, linear_taylor": {"cache_ratio_threshold": 0.3, "forecaster": "linear_taylor"},
    "Fast, taylor": {"cache_ratio_threshold": 0.3, "forecaster": "taylor"},
    "Fast, taylor2, 3 spans": {
        "cache_ratio_threshold": 0.8,
        "forecaster": "taylor2",
        "granularity": 3,
    },
    "Fast, output": {"cache_ratio_threshold": 0.3, "forecaster": "output"},
    "Fast, output, mask": {"forecaster": "output", "steps_mask": MASK},
    "Fast, mask, staggered": {"steps_mask": MASK, "stagger_stages": True},
    "Fast, staggered": {"cache_ratio_threshold": 0.3, "stagger_stages": True},
    "Fast, adacorrection": {"cache_ratio_threshold": 0.3, "enable_adacorrection": True},
    "Fast, audited": {"cache_ratio_threshold": 0.3, "shadow_audit": 0.5},
    "Fast, num_steps, no scheduler": {"cache_ratio_threshold": 0.3, "num_steps": SHORT},
    "Fast, split": _SPLIT,
    "Fast, split, dropped": {**_SPLIT, "static_kv": "drop"},
    "Fast, split, beta": {"cache_ratio_threshold": 0.3, "adaptive_beta": [0.3, 0.01, 0.0, 0.0]},
    "Fast, merge": {"cache_ratio_threshold": 0.3, "enable_token_merge": True},
    "Fast, split, merge": {**_SPLIT, "merge_ratio": 0.5, "num_stages": 2},
    "Fb": {"use_cache": "Fb", "cache_ratio_threshold": 0.3},
    "Tea": {"use_cache": "Tea"},
    "TaylorSeer": {"use_cache": "TaylorSeer", "cache_interval": 3},
    "Ada": {"use_cache": "Ada", "codebook": "fast"},
    "Custom": {"use_cache": "Custom"},
    "all of": {
        "gate": {
            "all_of": [
                {"name": "Fast", "cache_ratio_threshold": 0.4},
                {"name": "Fb", "cache_ratio_threshold": 0.4},
            ]
        }
    },
    "any of": {"gate": {"any_of": ["TaylorSeer", {"name": "Tea", "cache_ratio_threshold": 0.3}]}},
    "calibrated": {"calibration": True},
    "calibrated, chi2": {"calibration": True, "test": "chi2"},
    "calibrated, never": {"calibration": True, "cache_ratio_threshold": 0},
    "calibrated, 7 steps": {"calibration": True, "computed_steps": 7},
    "calibrated, 10 steps, staggered": {
        "calibration": True,
        "computed_steps": 10,
        "stagger_stages": True,
    },
}


def generate(pipe: Any, toy: str, steps: int) -> torch.Tensor | None:
    """Return the latents of one generation; None on a rank that holds none."""
    call: dict[str, Any] = {
        "prompt": PROMPTS,
        "height": 128,
        "width": 128,
        "num_inference_steps": steps,
        "max_sequence_length": 32,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if toy != "flux":
        call["guidance_scale"] = 2.5
    if toy == "pixart":
        call |= {"use_resolution_binning": False, "clean_caption": False}
    output = pipe(**call)
    return None if output is None else output.images


def hash_of(latents: torch.Tensor | None) -> str | None:
    """Return the SHA-256 of a tensor's bytes."""
    return None if latents is None else hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def run_case(pipe: Any, toy: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what one case leaves behind after two generations."""
    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    options = dict(options)
    steps = SHORT
    if options.get("calibration"):
        steps, options["calibration"] = PLANNED, f"toys/{toy}/fastcache.safetensors"
    scheduler = None if "num_steps" in options else pipe.scheduler
    try:
        apply_cache_on_transformer(
            pipe.transformer, scheduler=scheduler, sync_timeout_s=120, **options
        )
    except ValueError as error:
        return {"refused": type(error).__name__}
    try:
        latents = [generate(pipe, toy, steps) for _ in range(2)]
        statistics = get_cache_statistics(pipe.transformer)
    finally:
        remove_cache(pipe.transformer)
    del statistics["consensus_wait_s"]
    found = [
        None if x is None else hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in latents
    ]
    return {"latents": found, **statistics}


def work(flags: dict[str, Any], folder: Path) -> None:
    """Be one rank of a layout: run all cases of all toys, and write what they left."""
    from xfuser_fastcache.xdit import cpu_platform
    from xfuser_fastcache.xdit.mends import mend_xfuser

    cpu_platform.enable_cpu_platform()
    from diffusers import DiffusionPipeline
    from xfuser import xFuserArgs
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    mend_xfuser()
    found: dict[str, Any] = {}
    for toy in TOYS:
        if toy == "flux" and flags.get("use_cfg_parallel"):
            continue  # FLUX is distilled: one call a step, no second branch
        engine_config, _ = xFuserArgs(
            height=128,
            width=128,
            num_inference_steps=PLANNED,
            max_sequence_length=32,
            warmup_steps=1,
            **flags,
        ).create_config()
        pipeline = DiffusionPipeline.from_pretrained(
            ROOT / "toys" / toy, torch_dtype=torch.float32, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        cpu_platform.prepare_engine_config(engine_config, pipeline)
        pipe = xFuserPipelineWrapperRegister.get_class(pipeline)(pipeline, engine_config)
        generate(pipe, toy, 3)
        for name, options in CASES.items():
            found[f"{toy} | {name}"] = run_case(pipe, toy, options)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    cpu_platform.finish()


def record_all(layouts: list[str]) -> dict[str, Any]:
    """Run every layout as real ranks; return what they left, by layout, toy, case and rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = {}
    for layout in layouts:
        ranks, flags = LAYOUTS[layout]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}", __file__, "work", folder, json.dumps(flags)]
            subprocess.run(command, check=True, cwd=ROOT, env=environment)
            for rank in range(ranks):
                cells = json.loads((Path(folder) / f"{rank}.json").read_text())
                found |= {f"{layout} | {cell} | rank {rank}": v for cell, v in cells.items()}
        print(f"{layout}: done", flush=True)
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each value of a cell that is not what it was; new keys may be added."""
    lines = [f"{cell}: not run" for cell in before if cell not in now]
    for cell in before.keys() & now.keys():
        for key, value in before[cell].items():
            if now[cell].get(key) != value:
                lines.append(f"{cell}: {key} was {value}, is {now[cell].get(key)}"[:400])
    return sorted(lines)


def main(arguments: list[str]) -> int:
    """Record or compare; return the exit status, 1 where something has changed."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("action", choices=("record", "compare"))
    flags.add_argument("file", type=Path)
    flags.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = flags.parse_args(arguments)
    now = record_all(options.layouts)
    if options.action == "record":
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        print(f"{len(now)} cells recorded in {options.file}")
        return 0
    before = json.loads(options.file.read_text())
    before = {k: v for k, v in before.items() if k.split(" | ")[0] in options.layouts}
    changed = differences(before, now)
    print("\n".join(changed))
    cells = len({line.split(": ")[0] for line in changed})
    print(f"{len(before)} cells compared, {len(before) - cells} equal, {cells} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    if sys.argv[1:2] == ["work"]:
        work(json.loads(sys.argv[3]), Path(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
