"""Reads a clip's caption off its frames by program, so that a generated clip can be marked.

`toys.checker` reads the first, the middle and the last frame; what moved where is read off the
centres of the three shapes.
"""

from dataclasses import dataclass, fields

import numpy as np

from toys.captions import PLACES
from toys.checker import read_picture
from toys.clips import ATTRIBUTES, ClipCaption

# In the middle frame the shape may be off the middle of its way by this share of the side.
MAX_DETOUR = 0.08
# The direction of motion may differ from the caption's by this angle, in degrees.
MAX_TURN = 25.0


@dataclass(frozen=True)
class ClipReading:
    """What the program sees; an attribute is None where it sees none, or where frames differ.

    Args:
        size, colour, shape, background: as `toys.checker.Reading` has them, alike in all frames.
        start: a key of ``PLACES``, in the first frame.
        end: a key of ``PLACES``, in the last frame.
        centres: (3, 2) x and y of the shape in the first, the middle and the last frame, as
            fractions of the side; None where a frame shows none.
    """

    size: str | None
    colour: str | None
    shape: str | None
    start: str | None
    end: str | None
    background: str | None
    centres: tuple | None


@dataclass(frozen=True)
class ClipResult:
    """Which attributes of a caption a clip shows.

    Args:
        size, colour, shape, start, end, background: whether the attribute is as the caption says.
        motion: whether the shape goes the caption's way, and is half way in the middle frame.
        reading: what was seen instead or as well.
    """

    size: bool
    colour: bool
    shape: bool
    start: bool
    end: bool
    background: bool
    motion: bool
    reading: ClipReading

    @property
    def passed(self):
        """Whether all attributes and the motion are right."""
        return all(getattr(self, f.name) for f in fields(self) if f.name != "reading")


def read_clip(clip):
    """Read the six attributes and the way of the shape off a clip.

    Args:
        clip: at least 3 frames, each as `toys.checker.read_picture` takes it.

    Returns:
        A `ClipReading`.

    Raises:
        ValueError: fewer than 3 frames, or frames that are no RGB pictures of at least 16 px.
    """
    if len(clip) < 3:
        raise ValueError(f"the clip has {len(clip)} frames; give 3 or more, to see it move")
    frames = [read_picture(clip[i]) for i in (0, len(clip) // 2, len(clip) - 1)]

    def common(name):
        seen = {getattr(frame, name) for frame in frames}
        return seen.pop() if len(seen) == 1 else None

    centres = tuple(frame.centre for frame in frames)
    return ClipReading(
        size=common("size"),
        colour=common("colour"),
        shape=common("shape"),
        start=frames[0].place,
        end=frames[-1].place,
        background=common("background"),
        centres=None if None in centres else centres,
    )


def _moves_along(centres, caption):
    """Whether three centres lie on a caption's way, the second in its middle."""
    if centres is None:
        return False
    first, middle, last = np.array(centres)
    way, asked = last - first, np.subtract(*(PLACES[p] for p in (caption.end, caption.start)))
    lengths = np.linalg.norm(way) * np.linalg.norm(asked)
    if lengths == 0 or way @ asked / lengths < np.cos(np.radians(MAX_TURN)):
        return False
    return bool(np.linalg.norm(middle - (first + last) / 2) <= MAX_DETOUR)


def check_clip(clip, caption):
    """Mark a clip against a caption.

    Args:
        clip: at least 3 frames, (frames, height, width, 3), uint8 0..255 or float 0..1.
        caption: a `toys.clips.ClipCaption` or its text.

    Returns:
        A `ClipResult`; ``.passed`` says whether everything is right.

    Raises:
        ValueError: not a caption, too few frames, or no RGB pictures of at least 16 px.

    Example:
        >>> from toys.clips import draw_clip
        >>> caption = "a small pink cross moves from top to left, on white"
        >>> clip = draw_clip(caption, 64, 0)
        >>> check_clip(clip, caption).passed, check_clip(clip[::-1], caption).motion
        (True, False)
    """
    caption = ClipCaption.parse(caption)
    reading = read_clip(clip)
    right = {name: getattr(reading, name) == getattr(caption, name) for name in ATTRIBUTES}
    return ClipResult(**right, motion=_moves_along(reading.centres, caption), reading=reading)
