"""How a feature is tried beside the cache, for compatibility.py and its tests.

A check runs one feature on an embedded toy. Where it works, the cache at threshold 0 repeats the
uncached latents to the bit, removal restores them, and a cache that skips repeats itself. Where it
is refused, or cannot run without an accelerator, the check meets that very error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.calibration.checkout import ROOT

WORKS, REFUSED, ELSEWHERE = "works", "refused", "needs an accelerator"


class Broken(AssertionError):
    """A feature does not keep what its row says."""


def require(holds: bool, what: str) -> None:
    """Raise `Broken` unless `holds`."""
    if not holds:
        raise Broken(what)


@dataclass(frozen=True)
class Scale:
    """How large the generations of a check are.

    Attributes:
        pixels: width and height.
        steps: denoising steps.
        threshold: relative change below which they may be skipped (ratio).
    """

    pixels: int
    steps: int
    threshold: float


@dataclass
class Subject:
    """A toy's pipeline that repeats its generation.

    Attributes:
        model: name of the toy.
        scale: of its generations.
        pipe: the pipeline, which a feature may exchange.
        call: arguments of its call, besides those of every call.
    """

    model: str
    scale: Scale
    pipe: Any
    call: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, model: str, scale: Scale) -> Subject:
        """Load a toy."""
        pipe = DiffusionPipeline.from_pretrained(ROOT / "toys" / model, local_files_only=True)
        return cls(model, scale, pipe)

    def __call__(self, **changes: Any) -> torch.Tensor:
        """Return the latents of one generation, or pixels where the call asks for them."""
        self.pipe.set_progress_bar_config(disable=True)
        known = inspect.signature(self.pipe.__call__).parameters
        wanted = {
            "prompt": "a large red ring, top left, on dark blue",
            "height": self.scale.pixels,
            "width": self.scale.pixels,
            "num_inference_steps": self.scale.steps,
            "max_sequence_length": 32,
            "clean_caption": False,
            "use_resolution_binning": False,
            "output_type": "latent",
            **self.call,
            **changes,
        }
        arguments = {name: value for name, value in wanted.items() if name in known}
        return self.pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    def cache(self, **options: Any) -> None:
        """Put the cache on, with the scale's threshold where nothing else gives one."""
        if "calibration" not in options:
            options = {"cache_ratio_threshold": self.scale.threshold, **options}
        apply_cache_on_transformer(self.pipe.transformer, scheduler=self.pipe.scheduler, **options)

    def uncache(self) -> None:
        """Take it off."""
        remove_cache(self.pipe.transformer)

    @property
    def hits(self) -> float:
        """Share of the blocks that were skipped (ratio)."""
        return get_cache_statistics(self.pipe.transformer)["block_approx_ratio"]


Change = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Attributes:
        group: heading that it stands under.
        feature: in words, Markdown.
        model: name of the toy.
        run: returns what was measured, or the message; raises `Broken`.
        outcome: `WORKS`, `REFUSED` or `ELSEWHERE`.
        slow: whether it takes more than a few seconds.
    """

    group: str
    feature: str
    model: str
    run: Callable[[Subject], str]
    outcome: str = WORKS
    slow: bool = False

    @property
    def name(self) -> str:
        """Model and feature, for messages."""
        return f"{self.model}: {self.feature}"

    def __call__(self, scale: Scale) -> str:
        """Run it on a toy of its own."""
        return self.run(Subject.load(self.model, scale))


def psnr_db(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, against the range of `wanted`."""
    found, wanted = found.double(), wanted.double()
    span = wanted.max() - wanted.min()
    return (10 * torch.log10(span**2 / (found - wanted).square().mean())).item()


def beside(
    subject: Subject,
    before: Change | None = None,
    after: Change | None = None,
    wanted: torch.Tensor | None = None,
    idle: bool = False,
    **options: Any,
) -> str:
    """Run a feature uncached, at threshold 0, after removal, and twice with skips.

    Args:
        subject: a fresh toy.
        before: switches the feature on before the cache is applied.
        after: switches it on when the cache has been applied and has run.
        wanted: what the feature gives uncached; left out, it is found out.
        idle: whether this cache is to skip nothing here.
        **options: of the cache that skips.

    Returns:
        What was measured.
    """
    if before is not None:
        before(subject)
    if wanted is None:
        twin = subject
        if after is not None:
            twin = Subject.load(subject.model, subject.scale)
            after(twin)
        wanted = twin()
    gated = {name: value for name, value in options.items() if name != "steps_mask"}
    subject.cache(**{**gated, "cache_ratio_threshold": 0})
    if after is not None:
        subject()
        after(subject)
    require(torch.equal(subject(), wanted), "threshold 0 is not uncached to the bit")
    require(subject.hits == 0, "threshold 0 skips")
    subject.uncache()
    require(torch.equal(subject(), wanted), "removal does not restore")
    subject.cache(**options)
    found, again = subject(), subject()
    statistics = get_cache_statistics(subject.pipe.transformer)
    require(statistics["generations"] == 2, f"{statistics['generations']} generations, not 2")
    require(torch.equal(found, again), "the second generation is not the first to the bit")
    require(bool(found.isfinite().all()), "the latents are not finite")
    if idle:
        require(subject.hits == 0, f"{subject.hits:.1%} skipped, where nothing was to be")
        return "nothing skipped"
    require(subject.hits > 0, "nothing is skipped")
    require(not torch.equal(found, wanted), "skipping changes nothing")
    return f"{subject.hits:.0%} skipped, {psnr_db(found, wanted):.1f} dB"


def works(**how: Any) -> Callable[[Subject], str]:
    """Return a run of `beside` with these arguments."""
    return lambda subject: beside(subject, **how)


def meets(
    action: Change, error: type[Exception], words: str, shown: int = 2
) -> Callable[[Subject], str]:
    """Return a run that has to meet an error with these words, and gives its first sentences."""

    def run(subject: Subject) -> str:
        try:
            action(subject)
        except error as caught:
            text = " ".join(str(caught).split())
            require(words in text, f"another message: {text}")
            return ". ".join(text.split(". ")[:shown])
        raise Broken(f"no {error.__name__}, though its row says so")

    return run


def in_turn(*changes: Change) -> Change:
    """Return one change after another."""

    def action(subject: Subject) -> None:
        for change in changes:
            change(subject)

    return action


def generating(*changes: Change) -> Change:
    """Return one change after another, then a generation."""

    def generate(subject: Subject) -> None:
        subject()

    return in_turn(*changes, generate)


def with_cache(**options: Any) -> Change:
    """Return a change that puts the cache on."""
    return lambda subject: subject.cache(**options)
