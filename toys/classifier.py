"""A small classifier of the toys' pictures; its features are what Fréchet distances are taken on.

    python -m toys.classifier      # trains and marks it, writes toys/classifier.safetensors

Trained on pictures drawn from captions of the training split, blurred, faded and noisy to
different degrees, so that its features also see flaws that a generated picture has.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from toys.captions import ATTRIBUTES, VALUES, Caption, all_captions, draw, sample_captions

WEIGHTS = Path(__file__).with_suffix(".safetensors")
RECORD = Path(__file__).with_suffix(".json")
SIZE_PX = 64
FEATURES = 32


class CaptionClassifier(nn.Module):
    """Pictures `(batch, 3, 64, 64)` in [0, 1] to one row of logits per attribute of a caption."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES))
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, len(v)) for k, v in VALUES.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {attribute: logits `(batch, values)`}."""
        features = F.silu(self.body(pictures - 0.5))
        return {name: head(features) for name, head in self.heads.items()}


@cache
def load_classifier() -> CaptionClassifier:
    """The shipped classifier, in float32 on the CPU.

    Raises:
        FileNotFoundError: the weights are missing; the message says how to make them.
    """
    if not WEIGHTS.exists():
        raise FileNotFoundError(f"{WEIGHTS.name} is missing; make it: python -m toys.classifier")
    model = CaptionClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


def as_input(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures `(height, width, 3)` in [0, 1] to the classifier's `(batch, 3, 64, 64)`."""
    stacked = torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2)
    return F.interpolate(stacked, (SIZE_PX, SIZE_PX), mode="area")


@torch.no_grad()
def features(pictures: list[np.ndarray]) -> np.ndarray:
    """Features of the last hidden layer before its nonlinearity, `(pictures, 32)`.

    Example:
        >>> features([draw("a small pink cross, center, on white", 128, 0) / 255.0]).shape
        (1, 32)
    """
    return load_classifier().body(as_input(pictures) - 0.5).numpy()


def _batch(
    captions: list[Caption], rng: np.random.Generator, size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    chosen = [captions[i] for i in rng.integers(len(captions), size=size)]
    drawn = torch.from_numpy(np.stack([draw(c, SIZE_PX, rng) for c in chosen])).float() / 255
    pictures = drawn.permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False)
    pictures = pictures.lerp(blurred, torch.from_numpy(rng.random((size, 1, 1, 1))).float())
    mean = pictures.mean(dim=(2, 3), keepdim=True)
    pictures = pictures.lerp(mean, torch.from_numpy(rng.uniform(0, 0.3, (size, 1, 1, 1))).float())
    noise = rng.normal(size=pictures.shape) * rng.uniform(0, 0.1, (size, 1, 1, 1))
    labels = {
        name: torch.tensor([VALUES[name].index(getattr(c, name)) for c in chosen])
        for name in ATTRIBUTES
    }
    return (pictures + torch.from_numpy(noise).float()).clamp(0, 1), labels


def train(iterations: int = 1500, batch: int = 64, seed: int = 0) -> dict[str, object]:
    """Train, write weights and record, return the record.

    Args:
        iterations: of AdamW.
        batch: pictures an iteration.
        seed: of weights and pictures.
    """
    from rich.progress import track

    torch.manual_seed(seed)
    captions = all_captions("train")
    model = CaptionClassifier().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=iterations)
    for iteration in track(range(iterations), "classifier"):
        pictures, labels = _batch(captions, np.random.default_rng([seed, iteration]), batch)
        logits = model(pictures)
        loss = torch.stack([F.cross_entropy(logits[k], labels[k]) for k in labels]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, WEIGHTS)
    WEIGHTS.chmod(0o644)
    load_classifier.cache_clear()
    record = {
        "command": "python -m toys.classifier",
        "iterations": iterations,
        "batch": batch,
        "seed": seed,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_loss": round(loss.item(), 4),
        "unseen_captions_all_five_right": evaluate(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return record


@torch.no_grad()
def evaluate(captions: int = 512, seed: int = 1) -> float:
    """Share of clean drawings of unseen captions of which all five attributes are read right."""
    texts = sample_captions(captions, seed=seed, split="unseen")
    drawn = [draw(text, 128, seed + i) / 255.0 for i, text in enumerate(texts)]
    read = {k: v.argmax(-1).tolist() for k, v in load_classifier()(as_input(drawn)).items()}
    right = [
        all(VALUES[name][read[name][i]] == getattr(Caption.parse(text), name) for name in read)
        for i, text in enumerate(texts)
    ]
    return round(float(np.mean(right)), 4)


if __name__ == "__main__":
    print(json.dumps(train(), indent=2))
