"""`summary`: what the caches of a pipeline or transformer did, printed and returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from xfuser_fastcache.apply import denoisers_of, get_cache_statistics, get_cache_trace
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.reports.views import statistics_table


@dataclass(frozen=True)
class CacheSummary:
    """What one cache did.

    Attributes:
        name: of the transformer in its pipeline; its class's where it was given alone.
        cache_options: that hold and differ from their defaults, and `use_cache`.
        computed_steps: of the last generation, by guidance branch.
        cached_steps: those of them at which every block was skipped, likewise.
        statistics: what `get_cache_statistics` returns.
    """

    name: str
    cache_options: dict[str, Any]
    computed_steps: dict[int, list[int]]
    cached_steps: dict[int, list[int]]
    statistics: dict[str, Any]


def summary(
    pipe_or_transformer: Any, *, details: bool = False, logging: bool = True
) -> list[CacheSummary]:
    """Say what the caches on a pipeline or a transformer did; waits for nothing.

    Args:
        pipe_or_transformer: of diffusers or xfuser.
        details: whether each decision of the last generation is printed, too.
        logging: whether anything is printed at all.

    Returns:
        One summary a cache; empty where none is on.

    Raises:
        TypeError, ValueError: a pipeline without a transformer that is supported.
    """
    given = pipe_or_transformer
    if isinstance(given, nn.Module):
        denoisers = {type(given).__name__: given}
    else:
        denoisers = denoisers_of(given)
    found = [
        _of(name, denoiser) for name, denoiser in denoisers.items() if hook_on(denoiser) is not None
    ]
    if logging:
        for one in found:
            _print(one, get_cache_trace(denoisers[one.name]) if details else [])
        if not found:
            print(f"no cache is on {', '.join(denoisers)}")
    return found


def _of(name: str, transformer: nn.Module) -> CacheSummary:
    hook = hook_on(transformer)
    assert hook is not None
    decided: dict[int, dict[int, bool]] = {}
    for entry in get_cache_trace(transformer):
        branch = decided.setdefault(entry["branch"], {})
        skipped = entry["decision"] == "skipped"
        branch[entry["step"]] = branch.get(entry["step"], True) and skipped
    default = CacheConfig().to_dict()
    held = hook.engine.config.to_dict()
    options = {k: v for k, v in held.items() if k == "use_cache" or v not in (None, default[k])}
    return CacheSummary(
        name=name,
        cache_options=options,
        computed_steps=_steps(decided, False),
        cached_steps=_steps(decided, True),
        statistics=get_cache_statistics(transformer),
    )


def _steps(decided: dict[int, dict[int, bool]], cached: bool) -> dict[int, list[int]]:
    return {
        branch: [step for step, skipped in steps.items() if skipped is cached]
        for branch, steps in decided.items()
    }


def _print(one: CacheSummary, trace: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=100, highlight=False)
    console.print(statistics_table(one.statistics))
    options = ", ".join(f"{name}={value!r}" for name, value in one.cache_options.items())
    console.print(f"{one.name}: {options}", markup=False)
    for branch, steps in one.computed_steps.items():
        console.print(f"computed steps of branch {branch}: {', '.join(map(str, steps))}")
    for entry in trace:
        weighed = "" if entry["statistic"] is None else f", statistic {entry['statistic']:.4g}"
        console.print(
            f"step {entry['step']}, branch {entry['branch']}, span {entry['span']}: "
            f"{entry['decision']} ({entry['reason']}){weighed}",
            markup=False,
        )
