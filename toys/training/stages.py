"""Stages of a training that go on where they stopped, and their learning rates."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "toys"


@dataclass
class Stage:
    """What a stage remembers between runs.

    Args:
        path: checkpoint file.
        iteration: iterations done.
        seconds: wall time spent, in seconds, over all runs of the stage.
        losses: (iteration, loss) pairs, a mean over 20 iterations each.
    """

    path: Path
    iteration: int = 0
    seconds: float = 0.0
    losses: list | None = None

    def load(self, **modules):
        """Fill the modules and counters from the checkpoint, if there is one."""
        self.losses = []
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            self.iteration, self.seconds = saved["iteration"], saved["seconds"]
            self.losses = [tuple(pair) for pair in saved["losses"]]
            for name, module in modules.items():
                module.load_state_dict(saved[name])

    def save(self, **modules):
        """Write the checkpoint so that an interrupted write leaves the former one whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"iteration": self.iteration, "seconds": self.seconds, "losses": self.losses}
        state |= {name: module.state_dict() for name, module in modules.items()}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)

    def loop(self, total, step, title, save_every=200, on_save=None, **modules):
        """Run ``step(iteration) -> loss`` up to `total` iterations, with bar and checkpoints."""
        if self.iteration >= total:
            return
        recent, start = [], time.perf_counter()
        bar = tqdm(range(self.iteration, total), initial=self.iteration, total=total, desc=title)
        for iteration in bar:
            recent.append(float(step(iteration)))
            self.iteration = iteration + 1
            if len(recent) == 20 or self.iteration == total:
                self.losses.append((self.iteration, sum(recent) / len(recent)))
                bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
                recent = []
            if self.iteration % save_every == 0 or self.iteration == total:
                now = time.perf_counter()
                self.seconds, start = self.seconds + now - start, now
                self.save(**modules)
                if on_save is not None:
                    on_save()
                    start = time.perf_counter()


def cosine(iteration, total, peak, floor, warmup=50):
    """Learning rate at an iteration: linear warm-up to `peak`, then a cosine to `floor`."""
    if iteration < warmup:
        return peak * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_cycles(iteration, lengths, peak, floor, warmup=20):
    """Learning rate where one cosine cycle of `lengths` iterations follows another."""
    for length in lengths[:-1]:
        if iteration < length:
            return cosine(iteration, length, peak, floor, warmup)
        iteration -= length
    return cosine(iteration, lengths[-1], peak, floor, warmup)


def set_rate(optimiser, rate):
    """Set the learning rate of every parameter group."""
    for group in optimiser.param_groups:
        group["lr"] = rate
