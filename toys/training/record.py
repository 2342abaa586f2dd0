"""What a training leaves behind: the pipeline, loss curves, and a record of how it was made."""

import json
import os
import platform
import shutil

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from matplotlib.figure import Figure

from toys.training.stages import ROOT


def export(args, family, transformer, text, vae):
    """Save the pipeline in half precision and swap it in, keeping the training record."""
    target, fresh = ROOT / "toys" / args.model, args.runs / f"{args.model}-export"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = family.pipeline(transformer, text, vae)
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    for module in modules:
        module.half()
    pipe.save_pretrained(fresh, safe_serialization=True)
    for module, state in zip(modules, kept, strict=True):
        module.float()
        module.load_state_dict(state)
    for config in fresh.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # the folder that a part came from says nothing
        if "dtype" in values:
            # transformers loads in the dtype named here; float32 agrees with diffusers' default.
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    # What a call needs besides prompt and steps; `fastcache` reads it beside the weights.
    (fresh / "call.json").write_text(json.dumps(family.call_kwargs, indent=2) + "\n")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if (target / "training").exists():
        shutil.copytree(target / "training", fresh / "training")
    if target.exists():
        former = args.runs / f"{args.model}-former"
        shutil.rmtree(former, ignore_errors=True)
        shutil.move(target, former)
    shutil.move(fresh, target)


def update_record(args, **entries):
    """Merge entries into toys/MODEL/training/record.json."""
    folder = ROOT / "toys" / args.model / "training"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record.update(entries)
    path.write_text(json.dumps(record, indent=2) + "\n")


def versions():
    """Versions of what a result depends on."""
    packages = (torch, diffusers, transformers, tokenizers, np)
    return {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages}


def write_training_record(args, family, stages, vae):
    """Loss curves as JSON and PNG, and the record of the run."""
    folder = ROOT / "toys" / args.model / "training"
    folder.mkdir(parents=True, exist_ok=True)
    curves = {name: [[i, round(v, 5)] for i, v in s.losses] for name, s in stages.items()}
    (folder / "losses.json").write_text(json.dumps(curves) + "\n")
    figure = Figure(figsize=(4 * len(stages), 3), layout="constrained")
    axes = figure.subplots(1, len(stages))
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.semilogy(*zip(*curve, strict=True), linewidth=1)
        axis.set(title=name, xlabel="iteration", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "losses.png", dpi=80)
    scales = [k for k in ("scaling_factor", "shift_factor") if k in vae.config]
    settings = {k: v for k, v in vars(args).items() if k.endswith(("iterations", "batch", "pool"))}
    update_record(
        args,
        command=f"python scripts/train_toy.py --model {args.model} --seed {args.seed}",
        seed=args.seed,
        settings=settings,
        versions=versions(),
        hardware=f"{os.cpu_count()} CPU cores, no GPU" if not torch.cuda.is_available() else "GPU",
        stages={
            name: {
                "iterations": s.iteration,
                "seconds": round(s.seconds),
                "final_loss": round(float(np.mean([v for _, v in s.losses[-5:]])), 5),
            }
            for name, s in stages.items()
        },
        vae=family.subject.measure_vae(vae, args.seed) | {k: vae.config[k] for k in scales},
    )
