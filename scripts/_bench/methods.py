"""What is compared: a method is a name, a list of settings, and what one setting does.

Ours come from the table of backends, so a backend that is registered there is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from _bench.subject import Subject
from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.backends import BACKENDS

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
    """

    name: str
    source: str
    knob: str
    values: Callable[[int], list[str]]
    prepare: Callable[[Subject, str], AbstractContextManager[Changes]]


@dataclass(frozen=True)
class Sweep:
    """How one of our backends is swept.

    Attributes:
        option: field of `CacheConfig`.
        values: its settings.
    """

    option: str
    values: tuple[float, ...]


# Wide enough for a backend of which nothing is known.
ANY = Sweep("cache_ratio_threshold", (0.02, 0.05, 0.1, 0.2, 0.4, 0.8))
SWEEPS = {"Fast": Sweep("cache_ratio_threshold", (0.04, 0.07, 0.11, 0.17, 0.27, 0.45))}


def fixed(*values: object) -> Callable[[int], list[str]]:
    """Settings that do not depend on the number of steps."""
    return lambda steps: [str(value) for value in values]


def our_method(backend: str) -> Method:
    """The method of one of our backends, with its default options."""
    sweep = SWEEPS.get(backend, ANY)

    @contextmanager
    def prepare(subject: Subject, value: str) -> Iterator[Changes]:
        apply_cache_on_transformer(
            subject.transformer,
            use_cache=backend,
            scheduler=subject.pipe.scheduler,
            **{sweep.option: float(value)},
        )
        try:
            yield {}
        finally:
            remove_cache(subject.transformer)

    return Method(backend.lower(), "xfuser-fastcache", sweep.option, fixed(*sweep.values), prepare)


def fewer(*shares: float) -> Callable[[int], list[str]]:
    """Numbers of steps that are about these shares of the reference's."""
    return lambda steps: [
        str(n) for n in sorted({max(1, round(steps * s)) for s in shares} - {steps}, reverse=True)
    ]


@contextmanager
def _fewer_steps(subject: Subject, value: str) -> Iterator[Changes]:
    yield {"num_inference_steps": int(value)}


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
    finally:
        subject.set_scheduler(own)


def all_methods() -> dict[str, Method]:
    """Every method by name: ours, fewer steps, the peers.

    Raises:
        ValueError: one name twice.
    """
    from _bench.peers import peers

    steps = fewer(0.75, 0.57, 0.43, 0.32, 0.25, 0.18)
    found = [
        *(our_method(backend) for backend in BACKENDS),
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


def choose(words: list[str], steps: int) -> dict[str, list[str]]:
    """Read `NAME` or `NAME:SETTING,SETTING` into {name: settings}; `all` is every method.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = all_methods()
    chosen: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition(":")
        if name == "all":
            chosen |= {k: m.values(steps) for k, m in known.items() if k not in chosen}
        elif name in known:
            chosen[name] = values.split(",") if values else known[name].values(steps)
        else:
            raise ValueError(f"unknown method {name!r}; known: all, {', '.join(known)}")
    return chosen
