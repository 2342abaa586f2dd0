"""Captions of clips in which one shape moves, and the clips.

    a small red ring moves from top left to center, on dark blue

3 sizes x 8 colours x 6 shapes x 9 starts x 8 other ends x 6 backgrounds = 62208 captions; a tenth
of them, chosen by hash, is held out from training.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from toys.captions import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Worded,
    of_split,
    paint,
    pattern_of,
    sampled,
)

FRAMES = 9
VALUES = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "start": tuple(PLACES),
    "end": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}
ATTRIBUTES = tuple(VALUES)


@dataclass(frozen=True)
class ClipCaption(Worded):
    """The six attributes of a clip's caption; ``str()`` gives the text.

    Args:
        size: a key of ``SIZES``.
        colour: a key of ``COLOURS``.
        shape: a member of ``SHAPES``.
        start: a key of ``PLACES``, where the shape is in the first frame.
        end: another key of ``PLACES``, where it is in the last frame.
        background: a key of ``BACKGROUNDS``.

    Example:
        >>> str(ClipCaption("small", "red", "ring", "top left", "center", "dark blue"))
        'a small red ring moves from top left to center, on dark blue'
        >>> ClipCaption.parse("a small pink cross moves from top to left, on white").end
        'left'
    """

    noun = "a clip's caption"
    form = "a SIZE COLOUR SHAPE moves from START to END, on BACKGROUND"
    values = VALUES
    pattern = pattern_of(
        "an? ({size}) ({colour}) ({shape}) moves from ({start}) to ({end}), on ({background})",
        VALUES,
    )

    size: str
    colour: str
    shape: str
    start: str
    end: str
    background: str

    def __post_init__(self):
        super().__post_init__()
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.start!r}; a shape moves to elsewhere")

    def __str__(self):
        return (
            f"a {self.size} {self.colour} {self.shape} moves from {self.start} to {self.end},"
            f" on {self.background}"
        )


def all_clip_captions(split="all"):
    """Every caption of a split, in a fixed order.

    Args:
        split: ``"train"``, ``"unseen"`` or ``"all"``.

    Returns:
        A list of `ClipCaption`.

    Raises:
        ValueError: an unknown split.
    """
    rows = itertools.product(*VALUES.values())
    return of_split([ClipCaption(*row) for row in rows if row[3] != row[4]], split)


def sample_clip_captions(n, seed=0, split="unseen"):
    """Draw captions at random, none twice unless `n` exceeds the split.

    Args:
        n: how many, at least 0.
        seed: seed of the choice; the same seed gives the same captions.
        split: ``"train"``, ``"unseen"`` or ``"all"``.

    Returns:
        A list of `n` strings.

    Raises:
        ValueError: a negative `n` or an unknown split.
    """
    return sampled(all_clip_captions(split), n, seed)


def draw_clip(caption, size_px=64, generator=None):
    """Draw a caption's clip: the shape moves on a straight line at a constant speed.

    The freedom within the caption's truth is that of `toys.captions.draw`, one draw for the clip.

    Args:
        caption: a `ClipCaption` or its text.
        size_px: side of the square frames in pixels, at least 16.
        generator: a `numpy.random.Generator`, or an int seed; None gives the middle of every range.

    Returns:
        uint8 array of shape (``FRAMES``, size_px, size_px, 3), RGB.

    Raises:
        ValueError: not a caption, or too small a frame.

    Example:
        >>> draw_clip("a small pink cross moves from top to left, on white", 32, 0).shape
        (9, 32, 32, 3)
    """
    caption = ClipCaption.parse(caption)
    if size_px < 16:
        raise ValueError(f"size_px={size_px} is too small to show a shape; use 16 or more")
    if generator is None:
        jitter = np.zeros(13)
    else:
        jitter = np.random.default_rng(generator).uniform(-1.0, 1.0, size=13)
    start = np.array(PLACES[caption.start]) + 0.012 * jitter[0:2]
    end = np.array(PLACES[caption.end]) + 0.012 * jitter[11:13]
    half = SIZES[caption.size] * (1.0 + 0.04 * jitter[2])
    colour = np.array(COLOURS[caption.colour]) + 8.0 * jitter[3:6]
    background = np.array(BACKGROUNDS[caption.background]) + 8.0 * jitter[6:9]
    return np.stack(
        [
            paint(
                caption.shape,
                start + (end - start) * moment,
                half,
                colour,
                background,
                5.0 * jitter[9:11],
                size_px,
            )
            for moment in np.linspace(0.0, 1.0, FRAMES)
        ]
    )
