"""What is measured on pictures and clips: error, similarity, what a caption asks for, features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from xfuser_fastcache.calibration.checkout import toy_module
from xfuser_fastcache.reports.clips import are_clips, flicker
from xfuser_fastcache.reports.measured import ssim

# Drawings of each caption that stand for the truth in a Fréchet distance.
DRAWINGS = 8


class Drawn(NamedTuple):
    """What the toys know of prompts that are captions of theirs, of pictures or of clips.

    Attributes:
        captions: the prompts, parsed.
        check: (item, caption) -> a result with `passed`.
        draw: (caption, side in pixels, seed) -> a true picture `(height, width, 3)` or clip
            `(frames, height, width, 3)`, uint8.
        size_px: side of what is drawn.
    """

    captions: list[Any]
    check: Callable[[np.ndarray, Any], Any]
    draw: Callable[[Any, int, list[int]], np.ndarray]
    size_px: int


def drawn_by_toys(prompts: list[str]) -> Drawn | None:
    """What the toys know of prompts; None where one is no caption, or outside of a checkout."""
    captions, checker = toy_module("captions"), toy_module("checker")
    clips, clip_checker = toy_module("clips"), toy_module("clip_checker")
    if captions is None or checker is None or clips is None or clip_checker is None:
        return None
    for parse, check, draw, size_px in (
        (captions.Caption.parse, checker.check_caption, captions.draw, 128),
        (clips.ClipCaption.parse, clip_checker.check_clip, clips.draw_clip, 64),
    ):
        try:
            parsed = [parse(prompt) for prompt in prompts]
        except ValueError:
            continue
        return Drawn(parsed, check, draw, size_px)
    return None


def features_of(items: list[np.ndarray]) -> np.ndarray:
    """Features of the toys' classifier, `(items, features)`.

    A clip has those of its first, its middle and its last frame in a row, so that a Fréchet
    distance also sees whether frames go together.
    """
    classifier = toy_module("classifier")
    assert classifier is not None, "asked for outside of a checkout"
    if not are_clips(items):
        return np.asarray(classifier.features(items))
    frames = [clip[i] for clip in items for i in (0, len(clip) // 2, len(clip) - 1)]
    return np.asarray(classifier.features(frames)).reshape(len(items), -1)


def squared_error(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error of two pictures in [0, 1], in double precision."""
    return float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))


def marks(prompts: list[str], images: list[np.ndarray]) -> dict[str, Any]:
    """Whether pictures or clips show their captions, and their features; {} for other prompts."""
    toys = drawn_by_toys(prompts)
    if toys is None:
        return {}
    pairs = zip(images, toys.captions, strict=True)
    return {
        "passed": [bool(toys.check(image, caption).passed) for image, caption in pairs],
        "features": features_of(images).tolist(),
    }


def compare(
    images: list[np.ndarray], uncached: list[np.ndarray], converged: list[np.ndarray]
) -> dict[str, list[float]]:
    """Errors picture by picture against the uncached and the converged run; clips flicker too."""
    triples = list(zip(images, uncached, converged, strict=True))
    found = {
        "mse": [squared_error(image, reference) for image, reference, _ in triples],
        "ssim": [similarity(image, reference) for image, reference, _ in triples],
        "mse_converged": [squared_error(image, reference) for image, _, reference in triples],
        "ssim_converged": [similarity(image, reference) for image, _, reference in triples],
    }
    if are_clips(images):
        found["flicker"] = [flicker(image, reference) for image, reference, _ in triples]
    return found


def similarity(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two pictures, or the mean of two clips' frames."""
    if image.ndim == 3:
        return ssim(image, reference)
    return float(np.mean([ssim(*pair) for pair in zip(image, reference, strict=True)]))


def drawn_features(prompts: list[str]) -> np.ndarray | None:
    """Features of drawings of the captions, `(prompts x drawings, features)`; None for others."""
    toys = drawn_by_toys(prompts)
    if toys is None:
        return None
    return features_of(
        [
            toys.draw(caption, toys.size_px, [index, repeat]) / 255.0
            for index, caption in enumerate(toys.captions)
            for repeat in range(DRAWINGS)
        ]
    )


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features, `(pictures, features)` each.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of Gaussians with the sets' moments.

    Source: Heusel et al. 2017 (arXiv 1706.08500), there on features of Inception.
    """
    means = first.mean(axis=0) - second.mean(axis=0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # (C1 C2)^(1/2) has the trace of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ two @ root), 0)).sum()
    return float(means @ means + np.trace(one) + np.trace(two) - 2 * cross)
