"""CacheConfig: every option, checked, from keywords, YAML or JSON."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xfuser_fastcache.config import composition, lightx2v, resolution
from xfuser_fastcache.config.budget import AUTO, QUALITIES
from xfuser_fastcache.config.capabilities import refuse_contradictions
from xfuser_fastcache.config.checks import (
    MOST,
    Check,
    CheckedOptions,
    choice,
    flag,
    integer,
    number,
    option,
    path,
    shown,
    text,
)
from xfuser_fastcache.config.flat import checked_flat, flat, flat_names
from xfuser_fastcache.config.mappings import read_mapping
from xfuser_fastcache.config.methods import Methods, methods_of
from xfuser_fastcache.config.other_names import renamed
from xfuser_fastcache.config.parts import parts_of

_CUTS = integer(1)


def _read_granularity(value: Any) -> int | str:
    if isinstance(value, str):
        return choice("stack", "block").read(value)
    return _CUTS.read(value)


def _read_mask(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise TypeError
    plain = all(isinstance(m, int) and not isinstance(m, bool) and m in (0, 1) for m in value)
    if not 1 <= len(value) <= MOST or not plain or not value[0]:
        raise ValueError
    return value


_COMPANION = "the backend's"


@dataclass(frozen=True, kw_only=True)
class CacheConfig(CheckedOptions):
    """Options of a step cache, as they were given; the tables in docs/configuration.md are theirs.

    What was left out is None where a backend or a calibration knows better: `resolved` fills it,
    and types are those that hold then. Options of a method stand in its mapping, or flat.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown key, a value out of range, or contradicting options.

    Example:
        >>> CacheConfig(cache_ratio_threshold=0.1).to_dict()["cache_ratio_threshold"]
        0.1
        >>> CacheConfig().quality, CacheConfig().resolved().quality
        (None, 'auto')
        >>> CacheConfig.from_dict({"num_step": 28})
        Traceback (most recent call last):
        ...
        ValueError: unknown cache option 'num_step'; did you mean 'num_steps'?
    """

    use_cache: str = option(
        "Fast",
        text("a registered gate's name"),
        "backend: this gate, with the forecaster and the limits that it brings",
    )
    gate: Any = option(
        None,
        composition.GATES_CHECK,
        "decides in place of the backend's gate: another by its name, or several together; its "
        "options, such as the threshold, stand inside it",
    )
    forecaster: Any = option(
        None,
        composition.FORECASTER_CHECK,
        "what stands in for a skipped span; output: for the whole forward pass",
        none=_COMPANION,
    )
    token_plan: Any = option(
        None, composition.TOKEN_PLAN_CHECK, "which tokens run through the blocks of computed steps"
    )
    granularity: int | str = option(
        "stack",
        Check(f"'stack', 'block' or {_CUTS.allowed}", _read_granularity),
        "spans decided together: the whole stack, every block, or that many cuts",
    )
    num_warmup_steps: int = option(
        None, integer(0), "first steps that are always computed", none=_COMPANION
    )
    max_consecutive_skips: int | None = option(
        None,
        integer(1),
        "a span is computed after so many skips in a row; without a limit where the backend has "
        "none",
        none=_COMPANION,
    )
    num_steps: int | None = option(
        None,
        integer(1),
        "steps of a generation, where no scheduler is at hand; its last step is always computed",
    )
    enable_block_approx: bool = option(
        True, flag(), "whether spans of blocks may be skipped at all"
    )
    stagger_stages: bool = option(
        False,
        flag(),
        "under PipeFusion with one span: stages skip a patch at neighbouring steps, so that the "
        "pipeline stays full",
    )
    patch_kv_slope: float = option(
        None,
        number(0, 1),
        "under PipeFusion, at computed steps behind a gap: how much of their last slope in sigma "
        "the other patches' keys and values follow; 0 leaves them as old as the gap",
        none="0.7, with stagger_stages 0",
    )
    sync_backend: str = option(
        "gloo",
        choice("gloo", "nccl"),
        "where decisions are reduced: on the host, or on the device",
    )
    sync_timeout_s: float = option(
        600.0,
        number(0.001, 604_800),
        "longest wait for another rank, also in xfuser's own collectives (seconds); then an error "
        "names it",
    )
    verify_consensus: bool = option(
        False, flag(), "compare all ranks' inputs and decisions in each generation"
    )
    return_hidden_states_first: bool | None = option(
        None,
        flag(),
        "as in xDiT: checked against the order in which the model's blocks return",
    )
    calibration: str | None = option(
        None,
        path(),
        "file of `fastcache calibrate`: fitted output forecasts, thresholds, masks; options that "
        "are not given take its values. A generation that it does not cover takes what moves",
    )
    computed_steps: int | None = option(
        None,
        integer(1),
        "budget: compute so many steps; with a calibration those that its search has found, else "
        "the first and evenly spaced ones. Only what cannot be forecast adds to them",
    )
    speedup: float | None = option(
        None, number(1), "budget: compute at most one step in so many (ratio)"
    )
    quality: str | None = option(
        None,
        choice(*QUALITIES, AUTO),
        "budget: compute 18, 15, 11 or 8 of 28 steps, and that share of other numbers; auto: "
        "medium, but all of fewer than 16. Fast takes it where nothing else says which steps",
    )
    linear_maps: str | None = option(
        None,
        path(),
        "file of `fastcache fit-maps`: fitted linear maps of the stack of blocks, in place of the "
        "slope fitted online; forecaster is then linear_taylor, or linear where that is given. "
        "With a motion/static split they are for static tokens, and the forecaster is as without",
    )
    shadow_audit: float = option(
        0.0,
        number(0, 1),
        "Fast: at this share of steps (ratio) a skipped span is computed as well, and "
        "get_cache_statistics says how many skips were wrong by cache_ratio_threshold or more; the "
        "pictures stay as they are",
    )
    steps_mask: list[int] | None = option(
        None,
        Check(f"list of 0 and 1 that begins with 1, at most {MOST} of them", _read_mask),
        "which steps are computed (1) and which skipped (0), one a step of the scheduler's plan; "
        "the gate is not asked then: thresholds (0 too), warm-up, last step and "
        "max_consecutive_skips do not count",
    )
    enable_spatial_approx: bool | None = option(
        None,
        flag(),
        "whether token_plan has motion_static; none: where one of its options is given",
    )
    enable_token_merge: bool | None = option(
        None, flag(), "whether token_plan has merging; none: where one of its options is given"
    )
    enable_adacorrection: bool | None = option(
        None, flag(), "whether the forecaster is the one given, corrected by adacorrection"
    )
    cache_ratio_threshold: float = flat("gate")
    significance_level: float = flat("gate")
    test: str = flat("gate")
    coefficients: list[float] | None = flat("gate")
    cache_interval: int = flat("gate")
    codebook: dict[float, int] = flat("gate")
    mag_ratios: list[float] = flat("gate")
    motion_threshold: float | None = flat("token_plan")
    adaptive_beta: list[float] | None = flat("token_plan")
    static_kv: str | None = flat("token_plan")
    token_merge_k: int | None = flat("token_plan")
    token_merge_lambda: float | None = flat("token_plan")
    num_stages: int | None = flat("token_plan")
    merge_ratio: float | None = flat("token_plan")
    adacorr_gamma: float | None = flat("forecaster")
    adacorr_lambda: float | None = flat("forecaster")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in checked_flat(self).items():
            object.__setattr__(self, name, value)
        refuse_contradictions(parts_of(self))

    def given_of(self, kind: str) -> dict[str, Any]:
        """Return the options of a kind of method that were given flat."""
        values = {name: getattr(self, name) for name in flat_names(type(self), kind)}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def methods(self) -> Methods:
        """The gate or gates, the forecaster and the token plans that are asked for, made."""
        return methods_of(self)

    def resolved(self, fitted: resolution.Calibrated | None = None) -> CacheConfig:
        """Return the config with every option filled: as given, else the calibration's, else the
        backend's own.

        Methods are spelled in one way, so that configs that mean the same are equal then.

        Args:
            fitted: the loaded file of `calibration`. Without it, what such a file knows stays open.

        Raises:
            ValueError: options that contradict the calibration.
        """
        return resolution.resolved(self, fitted)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> CacheConfig:
        """Build a config from a mapping; names of other caches are taken as in `renamed`."""
        options = renamed(options, options.get("use_cache", cls.use_cache))
        known = [found.name for found in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1) if isinstance(key, str) else []
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ValueError(f"unknown cache option {shown(key)}; {hint}")
        return cls(**options)

    @classmethod
    def from_file(cls, path: str | Path) -> CacheConfig:
        """Read a config from a YAML or JSON file.

        It is a mapping of options; or a config of generate.py, which holds them under
        `cache_config`, with `use_cache` beside it; or one of LightX2V, with `feature_caching`.
        """
        options = read_mapping(path)
        if lightx2v.MARK in options:
            return cls.from_dict(lightx2v.read(options, [o.name for o in dataclasses.fields(cls)]))
        if "cache_config" in options:
            nested = options["cache_config"]
            if not isinstance(nested, dict):
                raise ValueError(
                    f"'cache_config' in the config file {str(path)!r} must hold a mapping of "
                    f"options, not {type(nested).__name__}"
                )
            options = {key: options[key] for key in ("use_cache",) if key in options} | nested
        return cls.from_dict(options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a mapping that `from_dict` reads back."""
        return dataclasses.asdict(self)

    def to_lightx2v(self) -> dict[str, Any]:
        """Return the options as LightX2V's JSON files have them, which `from_file` reads back."""
        return lightx2v.write(self.to_dict())

    def digest(self) -> int:
        """Return 48 bits that are the same for options that mean the same, on every rank."""
        words = json.dumps(self.resolved().to_dict(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big")
