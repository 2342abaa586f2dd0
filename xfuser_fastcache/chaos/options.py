"""Configurations that no one should give: refused by name, or harmless.

A trial holds where the options are refused with a ValueError or TypeError that names one of their
keys, or where a generation with them ends, without an error, in finite latents.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from xfuser_fastcache.apply import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.chaos.hostile import ALIASED, LINES, LIVE, PLAIN
from xfuser_fastcache.chaos.specimens import MASK, STEPS, calibration, maps, subject
from xfuser_fastcache.chaos.trials import Verdict
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.config.checks import shown
from xfuser_fastcache.config.lightx2v import write
from xfuser_fastcache.config.other_names import OTHER_NAMES
from xfuser_fastcache.plugins import FORECASTERS, GATES, TOKEN_PLANS

# A generation takes well below a second.
LIMIT_S = 60.0
NAMES = [*(field.name for field in dataclasses.fields(CacheConfig)), *OTHER_NAMES]


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with the files that sane options name; it goes when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="fastcache-chaos-")
    calibration().save(Path(made.name) / "calibration")
    maps().save(Path(made.name) / "maps")
    return made


def _sane(draw: random.Random, name: str) -> Any:
    """Return a value that an option may have, to its bounds and now and then a step beyond them."""
    methods = {"use_cache": GATES, "gate": GATES, "forecaster": FORECASTERS}
    if name in methods:
        found: Any = draw.choice(list(methods[name]))
        if name == "gate" and draw.random() < 0.3:
            found = {draw.choice(["all_of", "any_of"]): [found, draw.choice(list(GATES))]}
        elif name == "forecaster" and draw.random() < 0.3:
            found = {"name": "adacorrection", "of": found, "gamma": draw.choice([0, 1, 1e9])}
        return found
    numbers = [0, 1e-300, 5e-324, 1e-9, 0.05, 0.3, 0.5, 1 - 2**-53, 1.0, 3, 40, 1e6, 1e9, 1.01e9]
    ints = [0, 1, 2, 3, 4, STEPS, 99, 100, 101, 10_000, 10_001]
    special: dict[str, list[Any]] = {
        "token_plan": [*TOKEN_PLANS, list(TOKEN_PLANS), [{"name": "merging", "num_stages": 100}]],
        "granularity": ["stack", "block", *ints],
        "steps_mask": [MASK, [1], [1] * 10_000, [1] * 10_001, [1, 0] * STEPS],
        "calibration": [str(Path(_folder().name) / "calibration"), "missing", _folder().name],
        "linear_maps": [str(Path(_folder().name) / "maps"), "missing", "/dev/zero"],
        "codebook": ["slow", "fast", {1e9: 10_000}, {5e-324: 1}, {0.1: 4, 1: 2}],
        "mag_ratios": ["flux", [1.0, 0.9], [1e9] * 1000, [0.0]],
        "coefficients": [[1.0, 0.0], [1e9] * 16, [-1e9, 1e9], [0.0]],
        "adaptive_beta": [[1e9, -1e9, 1e9, -1e9], [0.01, 0.1, 0.0, 0.0]],
        "static_kv": ["reuse", "drop"],
        "test": ["chi2", "conformal", "paper"],
        "sync_backend": ["gloo", "nccl"],
        "sync_timeout_s": [0.001, 60, 604_800],
    }
    whole = ("num_", "max_", "computed_", "cache_interval", "token_merge_k")
    flags = ("enable_", "stagger", "verify", "return")
    if name in special:
        return draw.choice(special[name])
    if name.startswith(flags):
        return draw.random() < 0.5
    return draw.choice(ints if name.startswith(whole) else numbers)


class Given(NamedTuple):
    """Options, on their way to a config.

    Attributes:
        door: by which they come.
        keys: of which an error must name one, or the file that they stand in.
        make: returns the config.
    """

    door: str
    keys: list[Any]
    make: Callable[[], CacheConfig]


def _drawn(draw: random.Random, hostile: list[Callable[[], Any]]) -> dict[str, Any]:
    """Return one to four options, of which one in four is hostile."""
    names = draw.sample(NAMES, draw.choice([1, 1, 2, 3, 4]))
    # Without a cache that does something the others would not be asked for anything.
    options = {"num_warmup_steps": 1} if draw.random() < 0.5 else {}
    for name in names:
        options[name] = draw.choice(hostile)() if draw.random() < 0.25 else _sane(draw, name)
    return options


def _by_keywords(draw: random.Random) -> Given:
    options = _drawn(draw, PLAIN + ALIASED + LIVE)
    if draw.random() < 0.1:
        options[draw.choice(["num_stepz", "use_cache ", "x" * 100_000])] = 1
    return Given("keywords", list(options), lambda: CacheConfig.from_dict(options))


def _by_keys(draw: random.Random) -> Given:
    keys = [1, 10**5000, None, ("use_cache",), b"use_cache", float("nan"), np.int64(1)]
    options: dict[Any, Any] = {draw.choice(keys): 1, **_drawn(draw, PLAIN + ALIASED)}
    return Given("keys", list(options), lambda: CacheConfig.from_dict(options))


def _by_file(draw: random.Random) -> Given:
    path = Path(_folder().name) / "config"
    kind = draw.choice(["yaml", "json", "lightx2v", "lines"])
    if kind == "lines":
        names = [draw.choice(NAMES)]
        text = draw.choice(LINES).format(*names * 2)
    else:
        options = _drawn(draw, PLAIN + ALIASED if kind == "yaml" else PLAIN)
        names = list(options)
        if kind == "lightx2v":
            retained = draw.choice([True, False, None, "no", 5])
            options = {**write({"use_cache": "Tea", **options}), "use_ret_steps": retained}
            names += options
        elif draw.random() < 0.3:
            options = {"cache_config": options}
        text = yaml.safe_dump(options) if kind == "yaml" else json.dumps(options)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return Given(kind, [*names, str(path)], lambda: CacheConfig.from_file(path))


class _Endless(Exception):
    """A trial took longer than `LIMIT_S`."""


@contextmanager
def _limited() -> Iterator[None]:
    """End what runs for too long, and keep warnings of absurd options from the reader."""

    def stop(*_: Any) -> None:
        raise _Endless

    logger = logging.getLogger("xfuser_fastcache")
    level, before = logger.level, signal.signal(signal.SIGALRM, stop)
    logger.setLevel(logging.ERROR)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        logger.setLevel(level)


def _names_one(message: str, keys: list[Any]) -> bool:
    """Say whether a message names one of the keys, under any of its names."""
    also = {**OTHER_NAMES, "use_cache": "cache backend"}
    names = [key if isinstance(key, str) and len(key) < 100 else shown(key) for key in keys]
    return any(name in message for key in names for name in (key, also.get(key, key)))


def _refused(error: Exception, keys: list[Any]) -> tuple[bool, str, str]:
    named = _names_one(str(error), keys)
    return named, "refused by name" if named else "refused without a name", repr(error)


def _ended(given: Given) -> tuple[bool, str, str]:
    """Return whether it held, how it ended, and what was said."""
    made = subject()
    try:
        config = given.make()
        config.digest()
        apply_cache_on_transformer(made.model, config=config, scheduler=made.scheduler)
    except (ValueError, TypeError) as error:
        return _refused(error, given.keys)
    steps: list[int] = []
    try:
        finite = bool(made.denoise(each_step=steps.append).isfinite().all())
    except ValueError as error:
        # A mask of another plan is refused where the plan is known, before anything has run.
        if len(steps) > 1:
            raise
        return _refused(error, given.keys)
    finally:
        remove_cache(made.model)
    return finite, "drawn" if finite else "not finite", repr(config)


def trial(seed: int) -> Verdict:
    """Give a cache the options that a seed stands for."""
    draw, began = random.Random(seed), time.monotonic()
    given = draw.choices([_by_keywords, _by_keys, _by_file], [6, 1, 5])[0](draw)
    try:
        with _limited():
            held, ending, detail = _ended(given)
    except _Endless:
        held, ending, detail = False, "endless", f"{given.keys} after {LIMIT_S:g} s"
    except Exception:
        held, ending, detail = False, "internal error", traceback.format_exc(limit=-3)
    return Verdict(seed, given.door, held, ending, detail[:2000], time.monotonic() - began)
