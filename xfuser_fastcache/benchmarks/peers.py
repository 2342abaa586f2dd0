"""Other projects' caches, each running its own code through its own public call.

Each is put on for one call of the pipeline and taken off again. None is adjusted to a model that it
does not support: what it raises is what the benchmark lists.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from xfuser_fastcache.benchmarks.methods import Changes, Method, fixed
from xfuser_fastcache.benchmarks.subject import RankSubject, Subject
from xfuser_fastcache.calibration.prompts import CALIBRATE, prompts_for
from xfuser_fastcache.xdit.own_caches import own_cache


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give every module back the attributes and children it had.

    xfuser's caches replace lists of blocks for good, and cache-dit leaves a forward of its own on
    the transformer and its blocks when it is taken off.
    """
    kept = [(m, dict(m.__dict__), dict(m._modules)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)


# ---------------------------------------------------------------- diffusers


@contextmanager
def _enabled(subject: Subject, apply: Callable[..., None], config: Any) -> Iterator[None]:
    """diffusers' own cache on the model; all hooks go, also where putting them on raised.

    What `enable_cache` and `cache_context` do, which SD3's and PixArt's models do not have.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model = subject.model

    def hooks() -> set[tuple[torch.nn.Module, str]]:
        registries = ((m, getattr(m, "_diffusers_hook", None)) for m in model.modules())
        return {(m, name) for m, r in registries if r is not None for name in r.hooks}

    before = hooks()
    with restored(model):
        try:
            apply(model, config)
            HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
            _set_cache_context(model, CacheContext("cond"))
            yield
        finally:
            for module, name in hooks() - before:
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
            HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


@contextmanager
def _diffusers_fbcache(subject: Subject, value: str) -> Iterator[Changes]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    config = FirstBlockCacheConfig(threshold=float(value))
    with _enabled(subject, apply_first_block_cache, config):
        yield {}


@contextmanager
def _diffusers_taylorseer(subject: Subject, value: str) -> Iterator[Changes]:
    """`MODE/INTERVAL`: full forecasts each attention, lite only the model's last projection."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    mode, _, interval = value.partition("/")
    config = TaylorSeerCacheConfig(
        cache_interval=int(interval),
        disable_cache_before_step=2,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=mode == "lite",
    )
    with _enabled(subject, apply_taylorseer_cache, config):
        yield {}


def _mag_ratios(subject: Subject) -> list[float]:
    """Calibrate MagCache in its own way, on prompts that the comparison does not use."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    prompts = prompts_for(subject.name, CALIBRATE, 4, seed=1)
    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=subject.steps)
    with _enabled(subject, apply_mag_cache, config), redirect_stdout(printed):
        subject.generate(prompts, list(range(len(prompts))))
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("[")][-1:]
    return ast.literal_eval(line)


@contextmanager
def _diffusers_magcache(subject: Subject, value: str) -> Iterator[Changes]:
    """`THRESHOLD/K`: accumulated error, and the most steps skipped in a row."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    threshold, _, most = value.partition("/")
    config = MagCacheConfig(
        threshold=float(threshold),
        max_skip_steps=int(most),
        num_inference_steps=subject.steps,
        mag_ratios=subject.once("mag_ratios", lambda: _mag_ratios(subject)),
    )
    with _enabled(subject, apply_mag_cache, config):
        yield {}


# ---------------------------------------------------------------- xfuser


def _xdit(cache_method: str) -> Callable[[Subject, str], Any]:
    @contextmanager
    def prepare(subject: Subject, value: str) -> Iterator[Changes]:
        own = own_cache(cache_method, subject.pipe, subject.model, subject.steps, float(value))
        with restored(subject.model), own:
            yield {}

    return prepare


# ---------------------------------------------------------------- cache-dit


def _cache_dit(taylorseer: bool) -> Callable[[Subject, str], Any]:
    @contextmanager
    def prepare(subject: Subject, value: str) -> Iterator[Changes]:
        """`FN/THRESHOLD`: blocks that are always computed, and the residual's change."""
        import cache_dit

        first, _, threshold = value.partition("/")
        # xfuser's pipelines are not diffusers' to it; of those it takes the transformer alone.
        target = subject.model if isinstance(subject, RankSubject) else subject.pipe
        # Its marks on the pipeline's class would outlive the pipeline.
        own = type(target)
        target.__class__ = type(own.__name__, (own,), {"__module__": own.__module__})
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=int(first.removeprefix("F")),
            Bn_compute_blocks=0,
            residual_diff_threshold=float(threshold),
            max_warmup_steps=2,
            num_inference_steps=subject.steps,
        )
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylorseer else None
        with restored(subject.model):
            try:
                cache_dit.enable_cache(target, cache_config=config, calibrator_config=forecast)
                yield {}
            finally:
                cache_dit.disable_cache(target)
                target.__class__ = own

    return prepare


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (not installed: pip install -e .[bench])"


def peers() -> list[Method]:
    """All of them, with settings that span 35 to 60 dB on the embedded toys."""
    xfuser, diffusers, cache_dit = map(_version, ("xfuser", "diffusers", "cache-dit"))
    blocks = fixed(
        "F1/0.05", "F1/0.09", "F1/0.13", "F1/0.2", "F1/0.35", "F4/0.06", "F4/0.12", "F4/0.2"
    )  # fmt: skip
    residual = "threshold of the first block's residual"
    residuals = fixed(0.05, 0.09, 0.13, 0.2, 0.35)
    changes = fixed(0.27, 0.3, 0.4, 0.6, 0.9)
    modes = fixed("full/2", "full/4", "lite/2", "lite/3", "lite/4", "lite/6")
    in_a_row = "threshold / most skips in a row"
    skips = fixed("0.02/3", "0.06/3", "0.12/3", "0.24/5", "0.5/7")
    rows: tuple[tuple[str, str, str, Any, Any], ...] = (
        (
            "xdit-teacache",
            xfuser,
            "threshold of the accumulated change",
            changes,
            _xdit("teacache"),
        ),
        ("xdit-fbcache", xfuser, residual, residuals, _xdit("fbcache")),
        ("cache-dit-dbcache", cache_dit, "Fn / threshold", blocks, _cache_dit(False)),
        ("cache-dit-taylorseer", cache_dit, "Fn / threshold", blocks, _cache_dit(True)),
        ("diffusers-fbcache", diffusers, residual, residuals, _diffusers_fbcache),
        ("diffusers-taylorseer", diffusers, "mode / interval", modes, _diffusers_taylorseer),
        ("diffusers-magcache", diffusers, in_a_row, skips, _diffusers_magcache),
    )
    return [Method(*row) for row in rows]
