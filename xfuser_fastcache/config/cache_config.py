"""CacheConfig: every option, checked, from keywords, YAML or JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xfuser_fastcache.config import composition, lightx2v, published
from xfuser_fastcache.config.checks import CheckedOptions, is_number
from xfuser_fastcache.config.mappings import read_mapping

TESTS = ("chi2", "paper", "conformal")
FORECASTERS = ("reuse", "linear", "taylor", "damped_taylor", "taylor2", "linear_taylor", "output")
# Forecasters that take fitted linear maps; the first one is the default where they are given.
MAPPED = ("linear_taylor", "linear")
STATIC_KV = ("reuse", "drop")


def _option(default: Any, allowed: str, meaning: str) -> Any:
    """A field with its documentation."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


def _published(allowed: str, meaning: str) -> Any:
    """A field whose default is the backend's own; see `published.py`."""
    return field(
        default=None,
        metadata={"allowed": allowed, "meaning": meaning, "published": True},
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig(CheckedOptions):
    """Options of a step cache; the table in docs/configuration.md is generated from this class.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown key, a value out of range, or contradicting options.

    Example:
        >>> CacheConfig(cache_ratio_threshold=0.1).to_dict()["cache_ratio_threshold"]
        0.1
        >>> CacheConfig.from_dict({"num_step": 28})
        Traceback (most recent call last):
        ...
        ValueError: unknown cache option 'num_step'; did you mean 'num_steps'?
    """

    use_cache: str = _option("Fast", "a registered backend", "backend: gate x forecaster")
    gate: Any = _option(
        None,
        "a gate's name, a mapping with `name` and its options, or `all_of` or `any_of` with a list "
        "of these; or none",
        "decides in place of the backend's gate: a backend's by its name, another package's, or "
        "several together; its options, such as the threshold, stand inside it",
    )
    cache_ratio_threshold: float = _published(
        "number >= 0; 0 never skips",
        "relative change below which may be skipped (ratio): of a span's input (Fast: epsilon), of "
        "the first block's residual (Fb), accumulated, of its modulated input (Tea, Custom); "
        "xDiT's `rel_l1_thresh`",
    )
    significance_level: float = _published(
        "0 < number < 1", "Fast: alpha of the test (ratio); smaller is safer with test='chi2'"
    )
    test: str | None = _option(
        None,
        "chi2 | conformal | paper, or none",
        "Fast's test. chi2: equivalence test with a scale; conformal: alpha bounds the share of "
        "harmful skips, needs a calibration and is the default with one (else chi2); paper: "
        "FastCache's literal rule, which accepts nearly any change below 100 %",
    )
    forecaster: str = _published(
        "reuse | linear | taylor | damped_taylor | taylor2 | linear_taylor | output",
        "what stands in for a skipped span; output: for the whole forward pass",
    )
    granularity: int | str = _option(
        "stack",
        "'stack', 'block' or int >= 1",
        "spans decided together: the whole stack, every block, or that many cuts",
    )
    num_warmup_steps: int = _published("int >= 0", "first steps that are always computed")
    max_consecutive_skips: int | None = _published(
        "int >= 1", "a span is computed after so many skips in a row; without a limit where none"
    )
    coefficients: list[float] | None = _published(
        "list of numbers, highest power first",
        "Tea, Custom: polynomial from relative change of the modulated input to that of the "
        "output; left out: the one published for the model, or the identity",
    )
    cache_interval: int = _published(
        "int >= 1; 1 never skips", "TaylorSeer: steps from one computed step to the next"
    )
    codebook: dict[float, int] = _published(
        "slow | fast, or mapping of numbers > 0 to ints >= 1",
        "Ada: upper end of a rate of change (ratio a step) -> steps to the next computed step",
    )
    num_steps: int | None = _option(
        None,
        "int >= 1, or none",
        "steps of a generation, where no scheduler is at hand; its last step is always computed",
    )
    enable_block_approx: bool = _option(
        True, "true | false", "whether spans of blocks may be skipped at all"
    )
    stagger_stages: bool = _option(
        False,
        "true | false",
        "under PipeFusion with one span: stages skip a patch at neighbouring steps, so that the "
        "pipeline stays full",
    )
    sync_backend: str = _option(
        "gloo", "gloo | nccl", "where decisions are reduced: on the host, or on the device"
    )
    sync_timeout_s: float = _option(
        600.0,
        "finite number > 0",
        "longest wait for another rank, also in xfuser's own collectives (seconds); then an error "
        "names it",
    )
    verify_consensus: bool = _option(
        False, "true | false", "compare all ranks' decisions after each generation"
    )
    return_hidden_states_first: bool | None = _option(
        None,
        "true | false | none",
        "as in xDiT: checked against the order in which the model's blocks return",
    )
    enable_spatial_approx: bool | None = _option(
        None,
        "true | false | none",
        "motion/static split: at computed steps only tokens that moved run through the blocks; "
        "none: on where motion_threshold, adaptive_beta or static_kv is given",
    )
    motion_threshold: float | None = _option(
        None,
        "number >= 0, or none",
        "a token moves when its squared relative change since it was last computed reaches it "
        "(ratio); 0: every token; none: 0.01",
    )
    adaptive_beta: list[float] | None = _option(
        None,
        "four finite numbers, or none",
        "in place of motion_threshold: b0 + b1 * the largest saliency + b2 * t + b3 * t^2, with t "
        "from 1 at the first step to 0",
    )
    static_kv: str | None = _option(
        None,
        "reuse | drop, or none",
        "keys and values of static tokens; reuse, which none means: the last ones stay in "
        "attention; drop: none, FastCache to the letter",
    )
    enable_token_merge: bool | None = _option(
        None,
        "true | false | none",
        "at computed steps the later blocks run on clusters of tokens; none: on where one of the "
        "next four is given",
    )
    token_merge_k: int | None = _option(
        None, "int >= 1, or none", "neighbours that tell how dense a token stands; none: 5"
    )
    token_merge_lambda: float | None = _option(
        None,
        "finite number >= 0, or none",
        "weight of a token's relative change beside its density; none: 1.0",
    )
    num_stages: int | None = _option(
        None,
        "int >= 1, or none",
        "equal parts of the blocks; each but the first merges once more; none: 3",
    )
    merge_ratio: float | None = _option(
        None, "0 < number < 1, or none", "tokens that a merge leaves (ratio); none: 0.5"
    )
    enable_adacorrection: bool = _option(
        False,
        "true | false",
        "correct forecasts of spans by what the last one was wrong by (AdaCorrection)",
    )
    adacorr_gamma: float = _option(
        1.0, "number >= 0; 0 corrects nothing", "AdaCorrection: sensitivity (ratio)"
    )
    adacorr_lambda: float = _option(
        1.0, "number >= 0", "AdaCorrection: weight of the spatial variation (ratio)"
    )
    calibration: str | None = _option(
        None,
        "path, or none",
        "file of scripts/calibrate.py: fitted output forecasts, thresholds, masks; options left at "
        "their default take its values",
    )
    computed_steps: int | None = _option(
        None,
        "int >= 1, or none",
        "with a calibration: compute so many steps, those that its search has found",
    )
    linear_maps: str | None = _option(
        None,
        "path, or none",
        "file of scripts/fit_maps.py: fitted linear maps of the stack of blocks, in place of the "
        "slope fitted online; forecaster is then linear_taylor, or linear where that is given. "
        "With a motion/static split they are for static tokens, and the forecaster is as without",
    )
    shadow_audit: float = _option(
        0.0,
        "0 <= number <= 1",
        "Fast: at this share of steps (ratio) a skipped span is computed as well, and "
        "get_cache_statistics says how many skips were wrong by cache_ratio_threshold or more; the "
        "pictures stay as they are",
    )
    steps_mask: list[int] | None = _option(
        None,
        "list of 0 and 1 that begins with 1, or none",
        "which steps are computed (1) and which skipped (0), one a step of the scheduler's plan; "
        "the gate is not asked then: thresholds (0 too), warm-up, last step and "
        "max_consecutive_skips do not count",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.use_cache, str):
            self._refuse("use_cache", TypeError)
        self._published_options()
        if self.cache_ratio_threshold is not None:
            self._number("cache_ratio_threshold", lambda v: v >= 0)
        if self.significance_level is not None:
            self._number("significance_level", lambda v: 0 < v < 1)
        self._number("adacorr_gamma", lambda v: 0 <= v < math.inf)
        self._number("adacorr_lambda", lambda v: 0 <= v < math.inf)
        self._number("sync_timeout_s", lambda v: 0 < v < math.inf)
        self._number("shadow_audit", lambda v: 0 <= v <= 1)
        self._integer("num_warmup_steps", 0)
        if self.max_consecutive_skips is not None:
            self._integer("max_consecutive_skips", 1)
        if self.num_steps is not None:
            self._integer("num_steps", 1)
        if self.test is not None:
            self._choice("test", TESTS)
        if self.calibration is not None and not isinstance(self.calibration, str):
            self._refuse("calibration", TypeError)
        if self.computed_steps is not None:
            self._integer("computed_steps", 1)
        self._token_options()
        self._choice("forecaster", FORECASTERS)
        self._choice("sync_backend", ("gloo", "nccl"))
        for name in (
            "enable_block_approx",
            "stagger_stages",
            "verify_consensus",
            "enable_adacorrection",
            "return_hidden_states_first",
            "enable_spatial_approx",
            "enable_token_merge",
        ):
            value = getattr(self, name)
            may_be_none = self.__dataclass_fields__[name].type == "bool | None"
            if not isinstance(value, bool) and not (value is None and may_be_none):
                self._refuse(name, TypeError)
        if isinstance(self.granularity, str):
            self._choice("granularity", ("stack", "block"))
        else:
            self._integer("granularity", 1)
        if self.forecaster == "output" and self.granularity != "stack":
            raise ValueError(
                f"granularity={self.granularity!r} does not go with forecaster='output', which "
                "stands in for the whole forward pass; leave granularity out, or choose another "
                "forecaster"
            )
        if self.enable_adacorrection and (self.forecaster == "output" or self.calibration):
            raise ValueError(
                "enable_adacorrection corrects the tokens of spans, not the output of the whole "
                "forward pass, which forecaster='output' and a calibration forecast; choose "
                "another forecaster"
            )
        if self.enable_adacorrection and (self.splits_tokens or self.merges_tokens):
            raise ValueError(
                "enable_adacorrection does not go with token plans, whose tokens were computed at "
                "different steps: what the last forecast was wrong by is not known of each. Leave "
                "it out, or enable_spatial_approx, enable_token_merge and their options"
            )
        if self.shadow_audit:
            self._audited_options()
        self._calibrated_options()
        if self.linear_maps is not None:
            self._mapped_options()
        mask = self.steps_mask
        if mask is not None:
            if not isinstance(mask, list):
                self._refuse("steps_mask", TypeError)
            if not mask or any(m not in (0, 1) or isinstance(m, bool) for m in mask) or not mask[0]:
                self._refuse("steps_mask", ValueError)

    def _token_options(self) -> None:
        """Check the options of token plans, and refuse them where blocks are out of their reach."""
        if self.motion_threshold is not None:
            self._number("motion_threshold", lambda v: 0 <= v < math.inf)
        if self.adaptive_beta is not None:
            self._four_numbers("adaptive_beta")
        if self.static_kv is not None:
            self._choice("static_kv", STATIC_KV)
        for name in ("token_merge_k", "num_stages"):
            if getattr(self, name) is not None:
                self._integer(name, 1)
        if self.token_merge_lambda is not None:
            self._number("token_merge_lambda", lambda v: 0 <= v < math.inf)
        if self.merge_ratio is not None:
            self._number("merge_ratio", lambda v: 0 < v < 1)
        plans = self.splits_tokens or self.merges_tokens
        if plans and (self.forecaster == "output" or self.calibration is not None):
            cause = "a calibration" if self.calibration is not None else "forecaster='output'"
            raise ValueError(
                f"token plans do not go with {cause}, which stands in for the whole forward pass "
                "and leaves single blocks alone; choose another forecaster, or leave out "
                "enable_spatial_approx, enable_token_merge and their options"
            )

    @property
    def splits_tokens(self) -> bool:
        """Whether static tokens are kept out of the blocks."""
        return self._asked_for(
            self.enable_spatial_approx, "motion_threshold", "adaptive_beta", "static_kv"
        )

    @property
    def merges_tokens(self) -> bool:
        """Whether tokens are merged."""
        names = ("token_merge_k", "token_merge_lambda", "num_stages", "merge_ratio")
        return self._asked_for(self.enable_token_merge, *names)

    def _asked_for(self, switch: bool | None, *options: str) -> bool:
        if switch is None:
            return any(getattr(self, name) is not None for name in options)
        return switch

    def _published_options(self) -> None:
        """Fill options that were left out with the backend's own, and check those of some backends.

        Raises:
            ValueError: an option that the backend does not have.
        """
        defaults = dict(published.DEFAULTS.get(self.use_cache, published.DEFAULTS["Fast"]))
        own = published.OWN.get(self.use_cache, {})
        place = (
            f"no option of use_cache={self.use_cache!r}; leave it out, or choose another backend"
        )
        if self.gate is not None:
            composition.check(self.gate)
            defaults["cache_ratio_threshold"], own = None, {}
            place = "an option of a gate; give it inside gate={'name': NAME, ...}"
        for name in published.OF_GATES:
            known = name in own or defaults.get(name) is not None
            if getattr(self, name) is not None and not known:
                raise ValueError(f"{name}={getattr(self, name)!r} is {place}")
        if self.linear_maps is not None and not self.splits_tokens:
            defaults["forecaster"] = MAPPED[0]
        for name, value in {**defaults, **own}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.cache_interval is not None:
            self._integer("cache_interval", 1)
        if self.coefficients is not None:
            if not isinstance(self.coefficients, list) or not self.coefficients:
                self._refuse("coefficients", TypeError)
            if not all(is_number(value) and math.isfinite(value) for value in self.coefficients):
                self._refuse("coefficients", ValueError)
        if self.codebook is not None:
            book = published.read_codebook(self.codebook)
            if book is None:
                self._refuse("codebook", ValueError)
            object.__setattr__(self, "codebook", book)

    def _calibrated_options(self) -> None:
        """Refuse options that need a calibration where there is none, or that none fits."""
        if self.calibration is None:
            for name, wants in (("test", self.test == "conformal"), ("computed_steps", True)):
                if wants and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs a calibration; give "
                        "calibration='FILE', made by scripts/calibrate.py"
                    )
        elif self.gate is not None:
            raise ValueError(
                f"gate={self.gate!r} takes no calibration, which is for use_cache='Fast' alone; "
                "leave one of them out"
            )
        elif self.use_cache in published.DEFAULTS and self.use_cache != "Fast":
            raise ValueError(
                f"use_cache={self.use_cache!r} takes no calibration, which is for use_cache='Fast'"
            )
        elif self.test == "paper":
            raise ValueError("test='paper' takes no calibration; leave one of them out")
        elif self.linear_maps is not None:
            raise ValueError(
                "linear_maps do not go with a calibration, which forecasts the whole forward pass; "
                "leave one of them out"
            )
        elif self.forecaster not in ("output", published.DEFAULTS["Fast"]["forecaster"]):
            raise ValueError(
                f"forecaster={self.forecaster!r} does not go with a calibration, which is for "
                "forecaster='output'; leave forecaster out"
            )

    def _audited_options(self) -> None:
        """Refuse options that do not go with audits."""
        if self.gate is not None or self.use_cache != "Fast":
            raise ValueError(
                f"shadow_audit={self.shadow_audit!r} counts skips that are wrong by "
                "cache_ratio_threshold, which means an error with use_cache='Fast' alone; leave "
                "shadow_audit out"
            )
        if self.splits_tokens or self.merges_tokens:
            raise ValueError(
                f"shadow_audit={self.shadow_audit!r} does not go with token plans, which remember "
                "what blocks compute; leave it out, or enable_spatial_approx, enable_token_merge "
                "and their options"
            )

    def _mapped_options(self) -> None:
        """Refuse options that do not go with linear maps of the whole stack of blocks."""
        if not isinstance(self.linear_maps, str):
            self._refuse("linear_maps", TypeError)
        if self.forecaster not in MAPPED and not self.splits_tokens:
            raise ValueError(
                f"forecaster={self.forecaster!r} takes no linear_maps; choose "
                f"{' or '.join(MAPPED)}, or leave forecaster or linear_maps out"
            )
        if self.granularity != "stack":
            raise ValueError(
                f"granularity={self.granularity!r} does not go with linear_maps, which are fitted "
                "for the whole stack of blocks; leave one of them out"
            )
        if self.merges_tokens and not self.splits_tokens:
            raise ValueError(
                "enable_token_merge does not go with linear_maps, which are fitted where no tokens "
                "were merged; leave one of them out, or set enable_spatial_approx, whose static "
                "tokens take the maps"
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> CacheConfig:
        """Build a config from a mapping; `rel_l1_thresh` is xDiT's name for the threshold."""
        import difflib

        options = dict(options)
        if "rel_l1_thresh" in options:
            given = options.pop("rel_l1_thresh")
            other = options.setdefault("cache_ratio_threshold", given)
            if other != given:
                raise ValueError(
                    f"rel_l1_thresh={given!r} and cache_ratio_threshold={other!r} are two names of "
                    "one option; give one of them"
                )
        known = [option.name for option in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ValueError(f"unknown cache option {key!r}; {hint}")
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
        """Return 48 bits that are the same for equal options, on every rank and machine."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
