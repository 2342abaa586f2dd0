"""What is compared: a method is a name, a list of settings, and what one setting does.

Ours come from the table of backends, so a backend that is registered there is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfuser_fastcache.apply import (
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.backends import BACKENDS, FORECASTERS
from xfuser_fastcache.benchmarks.oracle import oracle
from xfuser_fastcache.benchmarks.settings import COUNTS
from xfuser_fastcache.benchmarks.subject import Subject
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.config.mappings import read_mapping
from xfuser_fastcache.gates.codebook import CODEBOOKS
from xfuser_fastcache.plugins import BUILT_IN, TOKEN_PLANS

Changes = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: as `--methods` takes it.
        source: whose code runs, with its version.
        knob: what a setting is, in words.
        values: number of steps of the reference -> settings, as text.
        prepare: (subject, setting) -> context in which the pipeline runs with the method; it yields
            changes of the call's arguments, and leaves the pipeline as it found it.
        group: word that chooses it with its like where it is not among `all`: a variant of
            another method, or the oracle; else "".
        whole_plan: whether it runs with the reference's number of steps and no other.
    """

    name: str
    source: str
    knob: str
    values: Callable[[int], list[str]]
    prepare: Callable[[Subject, str], AbstractContextManager[Changes]]
    group: str = ""
    whole_plan: bool = False


@dataclass(frozen=True)
class Sweep:
    """How one of our backends is swept.

    Attributes:
        option: field of `CacheConfig`.
        values: its settings.
        knob: what a setting is, in words; "" for the option's name.
        read: what the option is at a setting.
        beside: a file of options that the folder of a model may hold.
    """

    option: str
    values: tuple[float, ...]
    knob: str = ""
    read: Callable[[str], Any] = float
    beside: str = ""


def _codebook(factor: str) -> dict[float, int]:
    """AdaCache's slow codebook, every end times a factor."""
    return {end * float(factor): interval for end, interval in CODEBOOKS["slow"].items()}


# Wide enough for a backend of which nothing is known; where it has no threshold by this name, the
# limit that every gate has.
ANY = Sweep("cache_ratio_threshold", (0.02, 0.05, 0.1, 0.2, 0.4, 0.8))
SKIPS = Sweep("max_consecutive_skips", (1, 2, 3, 4, 6, 8), read=int)
# A polynomial decides what a threshold means, so this one is wide as well.
TEA = Sweep(
    "cache_ratio_threshold", (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0), beside="teacache.yaml"
)
SWEEPS = {
    "Fast": Sweep("cache_ratio_threshold", (0.06, 0.1, 0.17, 0.3, 0.55, 1.1)),
    "Tea": TEA,
    "Custom": TEA,
    "TaylorSeer": Sweep("cache_interval", (2, 3, 4, 5, 7, 9), read=int),
    "Ada": Sweep(
        "codebook", (0.25, 0.5, 1, 2, 4, 8), "ends of the slow codebook, times", _codebook
    ),
}

# Thresholds of the gate under which token plans are measured; 0 never skips a block.
GATED = (0.0, 0.06, 0.1, 0.3)
# Settings of motion_threshold and of merge_ratio.
STILL, LEFT = (0.003, 0.01, 0.03), (0.9, 0.75, 0.5)


def fixed(*values: object) -> Callable[[int], list[str]]:
    """Settings that do not depend on the number of steps."""
    return lambda steps: [str(value) for value in values]


@contextmanager
def _cached(subject: Subject, **options: Any) -> Iterator[Changes]:
    apply_cache_on_transformer(subject.transformer, scheduler=subject.pipe.scheduler, **options)
    try:
        yield {}
        statistics = get_cache_statistics(subject.transformer)
        subject.computed = subject.steps * (1 - statistics["block_approx_ratio"])
    finally:
        remove_cache(subject.transformer)


def our_method(backend: str, forecaster: str = "") -> Method:
    """The method of one of our backends, with its default options but for the forecaster."""
    known = options_of(BACKENDS[backend])
    sweep = SWEEPS.get(backend) or (ANY if ANY.option in known else SKIPS)
    chosen = {"forecaster": forecaster} if forecaster else {}

    def prepare(subject: Subject, value: str) -> AbstractContextManager[Changes]:
        options = {**_beside(subject, sweep.beside), sweep.option: sweep.read(value), **chosen}
        return _cached(subject, **{**options, "use_cache": backend})

    name = "-".join(filter(None, (backend.lower(), forecaster)))
    group = "forecasters" if forecaster else ""
    knob = sweep.knob or sweep.option
    return Method(name, "xfuser-fastcache", knob, fixed(*sweep.values), prepare, group)


def budget_method(forecaster: str = "") -> Method:
    """The method of `Fast` with a budget of computed steps, and without a calibration."""
    chosen = {"forecaster": forecaster} if forecaster else {}

    def prepare(subject: Subject, value: str) -> AbstractContextManager[Changes]:
        return _cached(subject, computed_steps=int(value), **chosen)

    name = "-".join(filter(None, ("fast-budget", forecaster)))
    steps, group = fixed(*COUNTS), "budgets" if forecaster else ""
    return Method(name, "xfuser-fastcache", "computed steps, evenly spaced", steps, prepare, group)


def _beside(subject: Subject, name: str) -> Changes:
    """Return the cache options in a file of the folder that the pipeline was loaded from."""
    path = Path(subject.name) / name
    return read_mapping(path) if name and path.is_file() else {}


def token_method(name: str, knob: str, values: tuple[float, ...], **options: Any) -> Method:
    """The method of `Fast` with a token plan.

    Args:
        name: of the plan.
        knob: option of the plan that is swept beside the threshold of the gate.
        values: its settings.
        **options: the plan's others.
    """

    def prepare(subject: Subject, value: str) -> AbstractContextManager[Changes]:
        threshold, own = map(float, value.split("/"))
        given = {"cache_ratio_threshold": threshold, knob: own, **options}
        return _cached(subject, use_cache="Fast", **given)

    settings = [f"{threshold}/{value}" for threshold in GATED for value in values]
    return Method(
        f"fast-{name}",
        "xfuser-fastcache",
        f"cache_ratio_threshold / {knob}",
        fixed(*settings),
        prepare,
        "tokens",
    )


def token_methods() -> list[Method]:
    """Each token plan under the gate of `fast`, and the split without a gate that skips.

    Those of other packages run by their defaults.
    """

    def added(plan: str) -> Method:
        def prepare(subject: Subject, value: str) -> AbstractContextManager[Changes]:
            return _cached(subject, token_plan=plan, cache_ratio_threshold=float(value))

        knob = "cache_ratio_threshold"
        return Method(f"fast-{plan}", "xfuser-fastcache", knob, fixed(*GATED), prepare, "tokens")

    others = [plan for plan in TOKEN_PLANS if plan not in BUILT_IN[TOKEN_PLANS.group]]
    split = {"enable_spatial_approx": True}
    return [
        token_method("split-reuse", "motion_threshold", STILL, static_kv="reuse", **split),
        token_method("split-drop", "motion_threshold", STILL, static_kv="drop", **split),
        token_method("merge", "merge_ratio", LEFT, enable_token_merge=True),
        token_method(
            "split-merge", "merge_ratio", LEFT, enable_token_merge=True, static_kv="reuse", **split
        ),
        *map(added, others),
    ]


def _calibrated(subject: Subject, value: str) -> AbstractContextManager[Changes]:
    return _cached(subject, calibration=subject.needed_calibration(), computed_steps=int(value))


def fewer(*shares: float) -> Callable[[int], list[str]]:
    """Numbers of steps that are about these shares of the reference's."""
    return lambda steps: [
        str(n) for n in sorted({max(1, round(steps * s)) for s in shares} - {steps}, reverse=True)
    ]


@contextmanager
def _fewer_steps(subject: Subject, value: str) -> Iterator[Changes]:
    yield {"num_inference_steps": int(value)}
    subject.computed = float(value)


def second_order(scheduler: Any) -> Any:
    """A second-order multistep scheduler for a pipeline, in place of its own.

    DPM-Solver++ with the same flow shift where the pipeline's own is a flow matching Euler; UniPC
    with the own scheduler's settings where that is a diffusion scheduler (PixArt's own is
    DPM-Solver++ already).
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    config = dict(scheduler.config)
    if "FlowMatch" not in type(scheduler).__name__:
        return UniPCMultistepScheduler.from_config(config)
    found = DPMSolverMultistepScheduler(
        num_train_timesteps=config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config["shift"],
        use_dynamic_shifting=config["use_dynamic_shifting"],
        time_shift_type=config["time_shift_type"],
    )
    # From these FLUX's pipeline takes the shift that belongs to a number of tokens.
    shifts = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    found.register_to_config(**{name: config[name] for name in shifts})
    return found


@contextmanager
def _fewer_steps_2nd(subject: Subject, value: str) -> Iterator[Changes]:
    own = subject.pipe.scheduler
    subject.set_scheduler(second_order(own))
    try:
        yield {"num_inference_steps": int(value)}
        subject.computed = float(value)
    finally:
        subject.set_scheduler(own)


def all_methods() -> dict[str, Method]:
    """Every method by name: ours, fewer steps, the peers.

    Raises:
        ValueError: one name twice.
    """
    from xfuser_fastcache.benchmarks.peers import peers

    steps = fewer(0.75, 0.57, 0.43, 0.32, 0.25, 0.18)
    found = [
        *(our_method(backend) for backend in BACKENDS),
        *(our_method("Fast", forecaster) for forecaster in FORECASTERS),
        budget_method(),
        *(budget_method(forecaster) for forecaster in FORECASTERS),
        *token_methods(),
        Method(
            "fast-calibrated",
            "xfuser-fastcache",
            "computed steps, found by search",
            fixed(14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3),
            _calibrated,
            whole_plan=True,
        ),
        Method(
            "oracle",
            "xfuser-fastcache",
            "true error up to which a step is skipped",
            fixed(0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35),
            oracle,
            group="oracle",
            whole_plan=True,
        ),
        Method("fewer-steps", "diffusers, own scheduler", "steps", steps, _fewer_steps),
        Method(
            "fewer-steps-2nd", "diffusers, second-order multistep", "steps", steps, _fewer_steps_2nd
        ),
        *peers(),
    ]
    named = {method.name: method for method in found}
    if len(named) < len(found):
        raise ValueError(f"one name for two methods: {sorted(m.name for m in found)}")
    return named


def _missing(
    chosen: dict[str, list[str]], methods: dict[str, Method], steps: int
) -> dict[str, list[str]]:
    return {k: m.values(steps) for k, m in methods.items() if k not in chosen}


def choose(words: list[str], steps: int) -> dict[str, list[str]]:
    """Read `NAME` or `NAME:SETTING,SETTING` into {name: settings}.

    `all` is every method that is no variant of another and no oracle, `backends` each of our
    backends with its own gate and forecaster, `forecasters` ours with each forecaster and `tokens`
    ours with each token plan, both under the gate of `fast`, and `budgets` each forecaster with
    evenly spaced steps.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = all_methods()
    groups = {"all": "", **{word: word for word in ("forecasters", "budgets", "tokens")}}
    chosen: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition(":")
        if name in groups:
            own = {k: m for k, m in known.items() if m.group == groups[name]}
            chosen |= _missing(chosen, own, steps)
        elif name == "backends":
            own = {k: known[k] for k in (backend.lower() for backend in BACKENDS)}
            chosen |= _missing(chosen, own, steps)
        elif name in known:
            chosen[name] = values.split(",") if values else known[name].values(steps)
        else:
            names = (*groups, "backends", *known)
            raise ValueError(f"unknown method {name!r}; known: {', '.join(names)}")
    return chosen
