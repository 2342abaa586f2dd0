"""Captions that say all that is in a picture, and the pictures.

One caption names one shape: ``a large red ring, top left, on dark blue``. The grammar has
3 sizes x 8 colours x 6 shapes x 9 places x 6 backgrounds = 7776 captions; a tenth of them, chosen
by hash, is held out from training.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass

import numpy as np

# Half the side of the shape's bounding box, as a fraction of the picture's side.
SIZES = {"small": 0.095, "medium": 0.145, "large": 0.2}
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 50),
    "green": (55, 190, 75),
    "cyan": (70, 210, 220),
    "blue": (55, 105, 235),
    "purple": (145, 60, 200),
    "pink": (250, 125, 190),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
# Centre of the shape's bounding box (x, y), as fractions of the picture's side, y downwards.
PLACES = {
    "top left": (0.24, 0.24),
    "top": (0.5, 0.24),
    "top right": (0.76, 0.24),
    "left": (0.24, 0.5),
    "center": (0.5, 0.5),
    "right": (0.76, 0.5),
    "bottom left": (0.24, 0.76),
    "bottom": (0.5, 0.76),
    "bottom right": (0.76, 0.76),
}
BACKGROUNDS = {
    "black": (18, 18, 20),
    "white": (242, 242, 242),
    "gray": (128, 128, 128),
    "dark blue": (20, 30, 90),
    "dark green": (15, 70, 40),
    "brown": (95, 60, 35),
}
VALUES = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}
ATTRIBUTES = tuple(VALUES)
SPLITS = ("train", "unseen", "all")


def pattern_of(form, values):
    """Return what matches captions, where `{name}` stands in `form` for the words in `values`."""
    # Longest first, so that "top left" is not read as "top".
    longest = {name: "|".join(sorted(v, key=len, reverse=True)) for name, v in values.items()}
    return re.compile(form.format(**longest))


class Worded:
    """What captions of every grammar do; a frozen dataclass of their attributes adds its grammar.

    Attributes:
        noun: what it is, in errors.
        form: of its text, in errors.
        values: attribute -> its words.
        pattern: of its text.
    """

    def __post_init__(self):
        for name, values in self.values.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"{name}={value!r} is not in the grammar; use one of {values}")

    @classmethod
    def parse(cls, text):
        """Read the text form.

        Args:
            text: a caption as ``str()`` writes it, in any case; an instance is returned as is.

        Returns:
            An instance of this class.

        Raises:
            ValueError: the text is not in the grammar.
        """
        if isinstance(text, cls):
            return text
        match = cls.pattern.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(
                f"{text!r} is not {cls.noun}; write '{cls.form}' with "
                + "; ".join(f"{name} from {list(words)}" for name, words in cls.values.items())
            )
        return cls(*match.groups())

    @property
    def split(self):
        """``"unseen"`` for the tenth held out from training, else ``"train"``."""
        digest = hashlib.sha256(str(self).encode()).digest()
        return "unseen" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def of_split(captions, split):
    """Return those of some captions that belong to a split, as `all_captions` does."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; use one of {list(SPLITS)}")
    return [c for c in captions if split in ("all", c.split)]


def sampled(captions, n, seed):
    """Return the text of `n` captions drawn at random, as `sample_captions` does."""
    if n < 0:
        raise ValueError(f"n={n} is negative; ask for 0 or more captions")
    order = np.random.default_rng(seed).permutation(len(captions))
    return [str(captions[order[i % len(order)]]) for i in range(n)]


@dataclass(frozen=True)
class Caption(Worded):
    """The five attributes of a caption; ``str()`` gives the text.

    Args:
        size: a key of ``SIZES``.
        colour: a key of ``COLOURS``.
        shape: a member of ``SHAPES``.
        place: a key of ``PLACES``.
        background: a key of ``BACKGROUNDS``.

    Example:
        >>> str(Caption("large", "red", "ring", "top left", "dark blue"))
        'a large red ring, top left, on dark blue'
        >>> Caption.parse("a small pink cross, center, on white").place
        'center'
    """

    noun = "a caption"
    form = "a SIZE COLOUR SHAPE, PLACE, on BACKGROUND"
    values = VALUES
    pattern = pattern_of("an? ({size}) ({colour}) ({shape}), ({place}), on ({background})", VALUES)

    size: str
    colour: str
    shape: str
    place: str
    background: str

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}, {self.place}, on {self.background}"


def all_captions(split="all"):
    """Every caption of a split, in a fixed order.

    Args:
        split: ``"train"``, ``"unseen"`` or ``"all"``.

    Returns:
        A list of `Caption`.

    Raises:
        ValueError: an unknown split.
    """
    return of_split([Caption(*values) for values in itertools.product(*VALUES.values())], split)


def sample_captions(n, seed=0, split="unseen"):
    """Draw captions at random, none twice unless `n` exceeds the split.

    Args:
        n: how many, at least 0.
        seed: seed of the choice; the same seed gives the same captions.
        split: ``"train"``, ``"unseen"`` or ``"all"``.

    Returns:
        A list of `n` strings.

    Raises:
        ValueError: a negative `n` or an unknown split.

    Example:
        >>> sample_captions(1, seed=3) == sample_captions(1, seed=3)
        True
    """
    return sampled(all_captions(split), n, seed)


def signed_distance(shape, x, y):
    """Signed distance to a shape whose bounding box is [-1, 1] x [-1, 1].

    Args:
        shape: a member of ``SHAPES``.
        x: horizontal coordinate, any array shape, in half-sides of the bounding box.
        y: vertical coordinate (downwards), same shape.

    Returns:
        The distance to the outline in half-sides, negative inside; close to exact near the outline,
        which is all that anti-aliasing needs.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "square":
        return np.maximum(ax, ay) - 1.0
    if shape == "triangle":
        # Apex (0, -1), base y = 1: each slanted side is 2|x| - y - 1 = 0.
        return np.maximum((2 * ax - y - 1.0) / np.sqrt(5.0), y - 1.0)
    if shape == "ring":
        return np.maximum(np.hypot(x, y) - 1.0, 0.55 - np.hypot(x, y))
    if shape == "cross":
        bar = 0.36
        return np.minimum(np.maximum(ax - 1.0, ay - bar), np.maximum(ay - 1.0, ax - bar))
    if shape == "diamond":
        return (ax + ay - 1.0) / np.sqrt(2.0)
    raise ValueError(f"shape={shape!r} is not in the grammar; use one of {list(SHAPES)}")


def paint(shape, centre, half, colour, background, slope, size_px):
    """One anti-aliased shape on a plain ground.

    Args:
        shape: a member of ``SHAPES``.
        centre: (x, y) of its bounding box, as fractions of the side, y downwards.
        half: half the side of its bounding box, as a fraction of the side.
        colour, background: RGB, 0..255 each.
        slope: (x, y) gradient of the background, in 1/255 a side.
        size_px: side of the picture in pixels.

    Returns:
        uint8 array of shape (size_px, size_px, 3), RGB.
    """
    axis = (np.arange(size_px) + 0.5) / size_px
    x, y = axis[None, :], axis[:, None]
    distance = signed_distance(shape, (x - centre[0]) / half, (y - centre[1]) / half)
    alpha = np.clip(0.5 - distance * half * size_px, 0.0, 1.0)[..., None]
    ground = background + (slope[0] * (x - 0.5) + slope[1] * (y - 0.5))[..., None]
    picture = alpha * colour + (1.0 - alpha) * ground
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def draw(caption, size_px=128, generator=None):
    """Draw a caption's picture, anti-aliased, with a little freedom within the caption's truth.

    Position moves by up to 1.2 % of the side, size by up to 4 %, each colour channel by up to
    8/255, and the background has a linear gradient of up to 5/255.

    Args:
        caption: a `Caption` or its text.
        size_px: side of the square picture in pixels, at least 16.
        generator: a `numpy.random.Generator`, or an int seed; None gives the middle of every range.

    Returns:
        uint8 array of shape (size_px, size_px, 3), RGB.

    Raises:
        ValueError: not a caption, or too small a picture.

    Example:
        >>> draw("a small pink cross, center, on white", 64, 0).shape
        (64, 64, 3)
    """
    caption = Caption.parse(caption)
    if size_px < 16:
        raise ValueError(f"size_px={size_px} is too small to show a shape; use 16 or more")
    if generator is None:
        jitter = np.zeros(11)
    else:
        jitter = np.random.default_rng(generator).uniform(-1.0, 1.0, size=11)
    centre = np.array(PLACES[caption.place]) + 0.012 * jitter[0:2]
    half = SIZES[caption.size] * (1.0 + 0.04 * jitter[2])
    colour = np.array(COLOURS[caption.colour]) + 8.0 * jitter[3:6]
    background = np.array(BACKGROUNDS[caption.background]) + 8.0 * jitter[6:9]

    slope = 5.0 * jitter[9:11]
    return paint(caption.shape, centre, half, colour, background, slope, size_px)
