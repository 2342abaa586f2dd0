"""CacheConfig: every option, checked, from keywords, YAML or JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TESTS = ("chi2", "paper", "conformal")
FORECASTERS = ("reuse", "linear", "taylor", "taylor2", "linear_taylor", "output")
STATIC_KV = ("reuse", "drop")


def _option(default: Any, allowed: str, meaning: str, later: str = "") -> Any:
    """A field with its documentation; `later` names what is missing until the option is built."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning, "later": later})


def _later(allowed: str, meaning: str, missing: str) -> Any:
    return _option(None, allowed, meaning, missing)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Options of a step cache; the table in docs/configuration.md is generated from this class.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown key, a value out of range, or contradicting options.
        NotImplementedError: an option whose machinery is not built yet.

    Example:
        >>> CacheConfig(cache_ratio_threshold=0.1).to_dict()["cache_ratio_threshold"]
        0.1
        >>> CacheConfig.from_dict({"num_step": 28})
        Traceback (most recent call last):
        ...
        ValueError: unknown cache option 'num_step'; did you mean 'num_steps'?
    """

    use_cache: str = _option("Fast", "a registered backend", "backend: gate x forecaster")
    cache_ratio_threshold: float = _option(
        0.05,
        "number >= 0; 0 never skips",
        "epsilon: relative change of a span's input below which the span may be skipped (ratio)",
    )
    significance_level: float = _option(
        0.05, "0 < number < 1", "alpha of the test (ratio); smaller is safer with test='chi2'"
    )
    test: str | None = _option(
        None,
        "chi2 | conformal | paper, or none",
        "chi2: equivalence test with a scale; conformal: alpha bounds the share of harmful skips, "
        "needs a calibration and is the default with one (else chi2); paper: FastCache's literal "
        "rule, which accepts nearly any change below 100 %",
    )
    forecaster: str = _option(
        "taylor",
        "reuse | linear | taylor | taylor2 | linear_taylor | output",
        "what stands in for a skipped span; output: for the whole forward pass",
    )
    granularity: int | str = _option(
        "stack",
        "'stack', 'block' or int >= 1",
        "spans decided together: the whole stack, every block, or that many cuts",
    )
    num_warmup_steps: int = _option(2, "int >= 0", "first steps that are always computed")
    max_consecutive_skips: int = _option(
        4, "int >= 1", "a span is computed after so many skips in a row"
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
    enable_adacorrection: bool | None = _later(
        "true | false | none", "correct forecasts", "AdaCorrection"
    )
    adacorr_gamma: float | None = _later("number, or none", "gamma", "AdaCorrection")
    adacorr_lambda: float | None = _later("number, or none", "lambda", "AdaCorrection")
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
    shadow_audit: float | None = _later(
        "0 to 1, or none", "fraction of skips that are computed as well", "the audit"
    )
    steps_mask: list[int] | None = _option(
        None,
        "list of 0 and 1 that begins with 1, or none",
        "which steps are computed (1) and which skipped (0), one a step of the scheduler's plan; "
        "the gate is not asked then: thresholds (0 too), warm-up, last step and "
        "max_consecutive_skips do not count",
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            # A switch that is off asks for nothing, so it is no request for what is missing.
            idle = value is None or (value is False and option.type == "bool | None")
            if option.metadata["later"] and not idle:
                raise NotImplementedError(
                    f"{option.name}={value!r} needs {option.metadata['later']}, which this version "
                    f"does not have yet. Leave {option.name} out."
                )
        self._number("cache_ratio_threshold", lambda v: v >= 0)
        self._number("significance_level", lambda v: 0 < v < 1)
        self._number("sync_timeout_s", lambda v: 0 < v < math.inf)
        self._integer("num_warmup_steps", 0)
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
            "return_hidden_states_first",
            "enable_spatial_approx",
            "enable_token_merge",
        ):
            value = getattr(self, name)
            may_be_none = self.__dataclass_fields__[name].type == "bool | None"
            if not isinstance(value, bool) and not (value is None and may_be_none):
                self._refuse(name, TypeError)
        if not isinstance(self.use_cache, str):
            self._refuse("use_cache", TypeError)
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
        self._calibrated_options()
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

    def _calibrated_options(self) -> None:
        """Refuse options that need a calibration where there is none, or that none fits."""
        if self.calibration is None:
            for name, wants in (("test", self.test == "conformal"), ("computed_steps", True)):
                if wants and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs a calibration; give "
                        "calibration='FILE', made by scripts/calibrate.py"
                    )
        elif self.test == "paper":
            raise ValueError("test='paper' takes no calibration; leave one of them out")
        elif self.forecaster not in ("output", CacheConfig.forecaster):
            raise ValueError(
                f"forecaster={self.forecaster!r} does not go with a calibration, which is for "
                "forecaster='output'; leave forecaster out"
            )

    def _refuse(self, name: str, error: type[Exception]) -> None:
        allowed = self.__dataclass_fields__[name].metadata["allowed"]
        raise error(f"{name}={getattr(self, name)!r} is not allowed; give {allowed}")

    def _number(self, name: str, within: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(name, TypeError)
        if not within(value):
            self._refuse(name, ValueError)
        # 1 and 1.0 are one option, so they must have one digest.
        object.__setattr__(self, name, float(value))

    def _four_numbers(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list):
            self._refuse(name, TypeError)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
            self._refuse(name, TypeError)
        if len(value) != 4 or not all(math.isfinite(v) for v in value):
            self._refuse(name, ValueError)
        object.__setattr__(self, name, [float(v) for v in value])

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(name, TypeError)
        if value < least:
            self._refuse(name, ValueError)

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str):
            self._refuse(name, TypeError)
        if value not in choices:
            self._refuse(name, ValueError)

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
        """Read a config from a YAML or JSON file: a mapping of options, or a config of generate.py.

        The latter holds the options under `cache_config`, with `use_cache` beside it.
        """
        options = read_mapping(path)
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

    def digest(self) -> int:
        """Return 48 bits that are the same for equal options, on every rank and machine."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON and in YAML 1.2; YAML 1.1 takes it for text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ValueError: no such file, a file that does not parse, or one that holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            # Not all JSON is YAML: tabs are not.
            loaded = json.loads(text)
        except json.JSONDecodeError:
            loaded = yaml.load(text, _Yaml)
    except OSError as error:
        raise ValueError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the config file {str(path)!r} is not valid YAML or JSON: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"the config file {str(path)!r} must hold a mapping of options, not "
            f"{type(loaded).__name__}"
        )
    return loaded


def options_table() -> str:
    """Return the table of all options in Markdown, as docs/configuration.md holds it."""
    rows = ["| option | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for option in dataclasses.fields(CacheConfig):
        meta = option.metadata
        meaning = meta["meaning"] + (f" (raises: needs {meta['later']})" if meta["later"] else "")
        cells = (f"`{option.name}`", f"`{option.type}`", f"`{option.default!r}`", meta["allowed"])
        rows.append(
            " | ".join(("", *(c.replace("|", "\\|") for c in (*cells, meaning)), "")).strip()
        )
    return "\n".join(rows) + "\n"
