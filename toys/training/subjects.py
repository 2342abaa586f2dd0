"""What a toy draws, pictures or clips: its language, the way into latents, and how it is marked."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toys.captions import sample_captions
from toys.checker import check_caption
from toys.clip_checker import check_clip
from toys.clips import sample_clip_captions
from toys.training import text
from toys.training.vae import (
    measure_vae,
    picture_pool,
    train_decoder,
    train_vae,
)
from toys.training.video import (
    CLIP_PX,
    clip_pool,
    measure_clip_vae,
    train_clip_vae,
)


@dataclass(frozen=True)
class Subject:
    """What differs between pictures and clips.

    Args:
        language: of the captions.
        size_px: side of the finished toy's pictures or frames.
        train_vae: args -> (vae, stage).
        train_decoder: (args, vae) -> stage; None where the VAE is trained at once.
        measure_vae: (vae, seed) -> figures of its reconstructions.
        pool: (args, vae, size_px, iteration) -> a `LatentPool`.
        sample: (n, seed, split) -> captions.
        taken: a pipeline's output -> a list, an item a caption.
        check: (item, caption) -> a result with ``passed`` and a flag for each of ``marks``.
        marks: what of an item is marked.
        shown: an item -> one picture of it, (height, width, 3), for the sample sheet.
    """

    language: text.Language
    size_px: int
    train_vae: Callable
    train_decoder: Callable | None
    measure_vae: Callable
    pool: Callable
    sample: Callable
    taken: Callable
    check: Callable
    marks: tuple
    shown: Callable


def strip(clip):
    """The first, the middle and the last frame of a clip side by side."""
    return np.concatenate([clip[0], clip[len(clip) // 2], clip[-1]], axis=1)


PICTURES = Subject(
    language=text.PICTURES,
    size_px=128,
    train_vae=train_vae,
    train_decoder=train_decoder,
    measure_vae=measure_vae,
    pool=picture_pool,
    sample=sample_captions,
    taken=lambda output: output.images,
    check=check_caption,
    marks=tuple(text.PICTURES.values),
    shown=lambda picture: picture,
)
CLIPS = Subject(
    language=text.CLIPS,
    size_px=CLIP_PX,
    train_vae=train_clip_vae,
    train_decoder=None,
    measure_vae=measure_clip_vae,
    pool=clip_pool,
    sample=sample_clip_captions,
    taken=lambda output: list(output.frames),
    check=check_clip,
    marks=(*text.CLIPS.values, "motion"),
    shown=strip,
)
