"""Reads the caption off a picture by program, so that a generated picture can be marked.

The background is the colour of the border; what differs from it is the shape. Its bounding box
gives place and size, its median colour the colour, the template that it overlaps best the shape.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from skimage.measure import label, regionprops
from skimage.transform import resize

from toys.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Caption,
    signed_distance,
)

# A shape must stand out from the border by this RGB distance (0..441) to count as drawn.
MIN_CONTRAST = 40.0
# The largest connected region must hold this share of all foreground pixels.
MIN_SHARE = 0.85
# Overlap (intersection over union) with the best template below which there is no shape.
MIN_OVERLAP = 0.7
# RGB distance (0..441) to a named colour above which a colour has no name.
MAX_COLOUR_DISTANCE = 75.0
# A half side may differ from the nearest named one by this ratio.
MAX_SIZE_RATIO = 1.35
# Share of its convex hull that a cross fills at most (0.74 when drawn); a diamond fills all of it.
# Without this a small diamond that has lost the tips looks like a cross.
MAX_CROSS_SOLIDITY = 0.87
_TEMPLATE_PX = 48


@dataclass(frozen=True)
class Reading:
    """What the program sees; an attribute is None where it sees none.

    Args:
        size: a key of ``SIZES``.
        colour: a key of ``COLOURS``.
        shape: a member of ``SHAPES``.
        place: a key of ``PLACES``.
        background: a key of ``BACKGROUNDS``.
        centre: (x, y) of what stands out, as fractions of the side, y downwards.
    """

    size: str | None
    colour: str | None
    shape: str | None
    place: str | None
    background: str | None
    centre: tuple[float, float] | None = None


@dataclass(frozen=True)
class CheckResult:
    """Which attributes of a caption a picture shows.

    Args:
        size, colour, shape, place, background: whether the attribute is as the caption says.
        reading: what was seen instead or as well.
    """

    size: bool
    colour: bool
    shape: bool
    place: bool
    background: bool
    reading: Reading

    @property
    def passed(self):
        """Whether all five attributes are right."""
        return self.size and self.colour and self.shape and self.place and self.background


@cache
def _template(shape):
    axis = (np.arange(_TEMPLATE_PX) + 0.5) / _TEMPLATE_PX * 2.0 - 1.0
    return signed_distance(shape, axis[None, :], axis[:, None]) < 0.0


def _as_uint8_like(image):
    """(height, width, 3) float64 in 0..255 from a PIL image, a uint8 or a 0..1 float array."""
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[-1] != 3 or min(picture.shape[:2]) < 16:
        raise ValueError(
            f"the picture has shape {picture.shape}; give an RGB picture (height, width, 3) of at "
            "least 16 px: image.convert('RGB') for PIL, tensor.permute(1, 2, 0) for torch"
        )
    if picture.dtype == np.uint8:
        return picture.astype(np.float64)
    if not np.issubdtype(picture.dtype, np.floating):
        raise TypeError(f"the picture has dtype {picture.dtype}; give uint8 0..255 or floats 0..1")
    return np.nan_to_num(picture.astype(np.float64)).clip(0.0, 1.0) * 255.0


def _nearest(value, names):
    """Name whose value is nearest in Euclidean distance, and that distance."""
    distances = {k: float(np.linalg.norm(np.subtract(value, v))) for k, v in names.items()}
    name = min(distances, key=distances.get)
    return name, distances[name]


def _named_colour(value, names):
    name, distance = _nearest(value, names)
    return name if distance <= MAX_COLOUR_DISTANCE else None


def read_picture(image):
    """Read the five attributes off a picture.

    Args:
        image: a PIL image, or an array (height, width, 3), uint8 0..255 or float 0..1.

    Returns:
        A `Reading`.

    Raises:
        ValueError: not an RGB picture of at least 16 px.
        TypeError: an array that is neither uint8 nor floating.
    """
    picture = _as_uint8_like(image)
    height, width = picture.shape[:2]
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]], axis=0)
    ground = np.median(border, axis=0)
    background = _named_colour(ground, BACKGROUNDS)

    contrast = np.linalg.norm(picture - ground, axis=-1)
    peak = float(np.percentile(contrast, 99.0))
    if peak < MIN_CONTRAST:
        return Reading(None, None, None, None, background)
    # Half of the contrast is where an anti-aliased edge lies.
    mask = contrast > 0.5 * peak
    regions = label(mask, connectivity=2)
    region = max(regionprops(regions), key=lambda r: r.area)
    top, left, bottom, right = region.bbox
    inside = picture[top:bottom, left:right][region.image]
    strong = contrast[top:bottom, left:right][region.image] > 0.8 * peak
    colour = _named_colour(np.median(inside[strong], axis=0), COLOURS) if strong.any() else None

    extent = max((bottom - top) / height, (right - left) / width) / 2.0
    size = min(SIZES, key=lambda k: abs(SIZES[k] - extent))
    if not 1.0 / MAX_SIZE_RATIO < extent / SIZES[size] < MAX_SIZE_RATIO:
        size = None
    centre = ((left + right) / 2.0 / width, (top + bottom) / 2.0 / height)
    place, _ = _nearest(centre, PLACES)

    seen = resize(region.image.astype(float), (_TEMPLATE_PX, _TEMPLATE_PX), order=1) > 0.5
    overlap = {s: (seen & _template(s)).sum() / (seen | _template(s)).sum() for s in SHAPES}
    if region.solidity > MAX_CROSS_SOLIDITY:
        overlap["cross"] = 0.0
    shape = max(SHAPES, key=overlap.get)
    aspect = (bottom - top) / (right - left)
    one_piece = region.area >= MIN_SHARE * mask.sum()
    if size is None or not one_piece or overlap[shape] < MIN_OVERLAP or not 0.75 < aspect < 1.33:
        shape = None
    return Reading(size, colour, shape, place, background, centre)


def check_caption(image, caption):
    """Mark a picture against a caption.

    Args:
        image: a PIL image, or an array (height, width, 3), uint8 0..255 or float 0..1.
        caption: a `toys.captions.Caption` or its text.

    Returns:
        A `CheckResult`; ``.passed`` says whether all attributes are right.

    Raises:
        ValueError: not a caption, or not an RGB picture of at least 16 px.
        TypeError: an array that is neither uint8 nor floating.

    Example:
        >>> from toys.captions import draw
        >>> picture = draw("a small pink cross, center, on white", 64, 0)
        >>> check_caption(picture, "a small pink cross, center, on white").passed
        True
        >>> check_caption(picture, "a small red cross, center, on white").colour
        False
    """
    caption = Caption.parse(caption)
    reading = read_picture(image)
    right = {name: getattr(reading, name) == getattr(caption, name) for name in ATTRIBUTES}
    return CheckResult(**right, reading=reading)
