"""What generations are drawn from: a file, captions of the embedded toys, or what is shipped here.

`calibrate.txt` and `audit.txt` hold a hundred general prompts each, and none of the other's.
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path

from xfuser_fastcache.calibration.checkout import is_toy, toy_module

CALIBRATE, AUDIT = "calibrate", "audit"
# Of the toys' captions, those that they were trained on calibrate.
_SPLITS = {CALIBRATE: "train", AUDIT: "unseen"}


def read_prompts(path: Path, count: int | None) -> list[str]:
    """Read one prompt a line; empty lines do not count.

    Raises:
        ValueError: the file holds fewer than `count`.
    """
    prompts = _lines(path.read_text(encoding="utf-8"))
    if count is not None and not 1 <= count <= len(prompts):
        raise ValueError(
            f"--num_prompts {count}, but {path} holds {len(prompts)}; give 1 to {len(prompts)}, "
            "or more prompts"
        )
    return prompts[:count]


def shipped(use: str) -> list[str]:
    """Return the prompts that the package brings along for `CALIBRATE` or `AUDIT`."""
    return _lines(resources.files(__name__).joinpath(f"{use}.txt").read_text(encoding="utf-8"))


def prompts_for(model: str, use: str, count: int, seed: int) -> list[str]:
    """Return prompts for a model where the user gives none.

    Captions for an embedded toy, else a selection of the shipped ones.

    Args:
        model: a folder or hub name.
        use: `CALIBRATE` or `AUDIT`; no prompt serves both.
        count: how many.
        seed: of the selection.

    Raises:
        ValueError: more than the package ships.
    """
    if is_toy(model):
        clips = draws_clips(model)
        language = toy_module("clips" if clips else "captions")
        assert language is not None
        sample = language.sample_clip_captions if clips else language.sample_captions
        found: list[str] = sample(count, seed=seed, split=_SPLITS[use])
        return found
    found = shipped(use)
    if not 1 <= count <= len(found):
        raise ValueError(
            f"{count} prompts are needed, and the package ships {len(found)} to {use}; give a "
            "file with --prompts"
        )
    return random.Random(seed).sample(found, count)


def draws_clips(toy: str) -> bool:
    """Say whether an embedded toy draws clips."""
    from xfuser_fastcache.xdit.loaded import call_arguments  # here: it imports torch

    return "num_frames" in call_arguments(toy)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
