"""Pictures and clips of captions that the training has not seen, marked."""

import json
import math
import time
from dataclasses import asdict

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from toys.training.record import update_record
from toys.training.stages import ROOT


def generate(pipe, family, captions, steps, seed, batch):
    """What captions say, each with a seed of its own so that the batch size does not matter."""
    items = []
    for start in range(0, len(captions), batch):
        chosen = captions[start : start + batch]
        output = pipe(
            prompt=chosen,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))],
            **family.call_kwargs,
        )
        items += family.subject.taken(output)
    return items


def sample_sheet(path, subject, items, captions, results):
    """A table of pictures with their captions, wrong ones marked, as a PNG."""
    pictures = [np.asarray(subject.shown(item)) for item in items]
    height, width = pictures[0].shape[:2]
    columns = max(1, 8 * height // width)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(1.55 * columns * width / height, 2.25 * rows))
    axes = figure.subplots(rows, columns)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption, result in zip(axes.flat, pictures, captions, results, strict=False):
        axis.imshow(picture)
        wrong = [name for name in subject.marks if not getattr(result, name)]
        axis.set_title(
            str(caption).replace(", ", "\n") + (f"\nwrong: {', '.join(wrong)}" if wrong else ""),
            fontsize=6,
            color="firebrick" if wrong else "black",
        )
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90)
    # 128 colours do, and take a third of the space.
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def wilson(passed, count, z=1.96):
    """95 % interval of a proportion."""
    ratio = passed / count
    centre = ratio + z * z / (2 * count)
    spread = z * math.sqrt(ratio * (1 - ratio) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [round((centre - spread) / scale, 4), round((centre + spread) / scale, 4)]


def time_one(pipe, family, caption, steps, runs=3):
    """Median wall time in seconds of one picture, batch 1, after a warm-up."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        generate(pipe, family, [caption], steps, seed=0, batch=1)
        seconds.append(time.perf_counter() - start)
    return round(float(np.median(seconds[1:])), 2)


def evaluate(args, family):
    """Generate unseen captions with the saved pipeline, mark them, print and record the result."""
    folder = ROOT / "toys" / args.model
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"toys/{args.model} holds no pipeline; train one first: "
            f"python scripts/train_toy.py --model {args.model}"
        )
    pipe = family.pipeline_class.from_pretrained(folder).to(args.device)
    pipe.set_progress_bar_config(desc="evaluate")
    subject = family.subject
    captions = subject.sample(args.captions, seed=args.seed, split="unseen")
    items = generate(pipe, family, captions, args.steps, args.seed, batch=16)
    results = [subject.check(item, c) for item, c in zip(items, captions, strict=True)]
    passed = sum(r.passed for r in results)
    pipe.set_progress_bar_config(disable=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    summary = {
        "command": f"python scripts/train_toy.py --model {args.model} --evaluate"
        f" --captions {args.captions} --steps {args.steps} --seed {args.seed}",
        "captions": args.captions,
        "split": "unseen",
        "steps": args.steps,
        "size_px": subject.size_px,
        "passed": passed,
        "accuracy": round(passed / args.captions, 4),
        "interval_95": wilson(passed, args.captions),
        "attributes": {
            a: round(sum(getattr(r, a) for r in results) / args.captions, 4) for a in subject.marks
        },
        "one_picture_s": {
            "seconds": time_one(pipe, family, captions[0], args.steps),
            "threads": torch.get_num_threads(),
        },
        "failures": {
            c: {"seen": {k: v for k, v in asdict(r.reading).items() if k in subject.marks}}
            for c, r in zip(captions, results, strict=True)
            if not r.passed
        },
    }
    print(json.dumps(summary, indent=2))
    (folder / "training").mkdir(exist_ok=True)
    sample_sheet(folder / "training" / "samples.png", subject, items[:32], captions, results)
    update_record(args, evaluation=summary | {"folder_bytes": size})
    return summary
