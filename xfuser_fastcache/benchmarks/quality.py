"""What is measured on pictures: error, similarity, what a caption asks for, features."""

from __future__ import annotations

from typing import Any

import numpy as np

from xfuser_fastcache.calibration.checkout import toy_module
from xfuser_fastcache.reports.measured import ssim

# Drawings of each caption that stand for the truth in a Fréchet distance.
DRAWINGS = 8


def captions_of(prompts: list[str]) -> list[Any] | None:
    """The prompts as captions of the toys; None where one is none, or outside of a checkout."""
    captions = toy_module("captions")
    if captions is None:
        return None
    try:
        return [captions.Caption.parse(prompt) for prompt in prompts]
    except ValueError:
        return None


def squared_error(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared error of two pictures in [0, 1], in double precision."""
    return float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))


def marks(prompts: list[str], images: list[np.ndarray]) -> dict[str, Any]:
    """Whether pictures show their captions, and their features; {} unless all are captions."""
    captions = captions_of(prompts)
    checker, classifier = toy_module("checker"), toy_module("classifier")
    if captions is None or checker is None or classifier is None:
        return {}
    pairs = zip(images, captions, strict=True)
    return {
        "passed": [bool(checker.check_caption(image, caption).passed) for image, caption in pairs],
        "features": classifier.features(images).tolist(),
    }


def compare(
    images: list[np.ndarray], uncached: list[np.ndarray], converged: list[np.ndarray]
) -> dict[str, list[float]]:
    """Errors picture by picture against the uncached and the converged run."""
    triples = list(zip(images, uncached, converged, strict=True))
    return {
        "mse": [squared_error(image, reference) for image, reference, _ in triples],
        "ssim": [ssim(image, reference) for image, reference, _ in triples],
        "mse_converged": [squared_error(image, reference) for image, _, reference in triples],
        "ssim_converged": [ssim(image, reference) for image, _, reference in triples],
    }


def drawn_features(prompts: list[str]) -> np.ndarray | None:
    """Features of drawings of the captions, `(prompts x drawings, 32)`; None for other prompts."""
    captions, classifier = toy_module("captions"), toy_module("classifier")
    if captions_of(prompts) is None or captions is None or classifier is None:
        return None
    drawings = [
        captions.draw(prompt, 128, [index, repeat]) / 255.0
        for index, prompt in enumerate(prompts)
        for repeat in range(DRAWINGS)
    ]
    return classifier.features(drawings)


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
