"""All that this package changes in xfuser, so that its caches are asked for as xDiT's own are.

`import xfuser_fastcache` calls `install`: xfuser is not imported by it; each module of `PATCHES` is
patched as it loads, or at once where it is loaded already. Without a request for one of our caches
the patched functions do what xfuser's do. `uninstall` restores all of it.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xfuser_fastcache import enable_cache
from xfuser_fastcache.patching import AliasFinder, Changes, PatchingFinder
from xfuser_fastcache.plugins import BUILT_IN, GATES
from xfuser_fastcache.xdit.asked import read_options
from xfuser_fastcache.xdit.compat import CPU_SWITCH, require, without_accelerator
from xfuser_fastcache.xdit.families import family_of
from xfuser_fastcache.xdit.inputs import told
from xfuser_fastcache.xdit.pipeline_classes import SHARING, WRAPPERS
from xfuser_fastcache.xdit.points import PATCHES, Patch

if TYPE_CHECKING:
    from xfuser_fastcache.config.cache_config import CacheConfig

# What --cache_method and cache_args call our backends.
METHODS: dict[str, str] = {"fastcache": "Fast", **{name: name for name in BUILT_IN[GATES.group]}}
_OLD_SWITCHES = ("use_teacache", "use_fbcache")
# Attribute of xfuser's runtime config that carries what the command line asked for.
_REQUEST = "step_cache"

_APPLY = {"apply_cache_on_transformer": ("xfuser_fastcache.apply", "apply_cache_on_transformer")}
_ADAPTERS = "xfuser.model_executor.cache.diffusers_adapters"
_WRAPPER = "xFuserFastCachePipelineWrapper"
ALIASES: dict[str, Mapping[str, tuple[str, str]]] = {
    "xfuser.model_executor.pipelines.fastcache_pipeline": {
        _WRAPPER: ("xfuser_fastcache.xdit.pipeline", _WRAPPER)
    },
    **{f"{_ADAPTERS}.{family}": _APPLY for family in ("flux", "sd3", "pixart")},
}


_CHANGES = Changes()


def install() -> None:
    """Make xfuser know our caches; calling again changes nothing.

    Raises:
        IncompatibleXfuserError: xfuser is loaded, and no release that is tried. Where it is not
            loaded yet, its import raises this. What a tried release lacks is warned of.
        ValueError: the environment variable `XFUSER_FASTCACHE_CPU` is neither 0 nor 1.
    """
    if _FINDERS[0] in sys.meta_path:
        return
    try:
        for name, patch in _ALL.items():
            if name in sys.modules:
                patch(sys.modules[name])
    except BaseException:
        uninstall()
        raise
    sys.meta_path.insert(0, _FINDERS[0])
    sys.meta_path.append(_FINDERS[1])
    switch = os.environ.get(CPU_SWITCH, "0")
    if switch not in ("0", "1"):
        raise ValueError(f"{CPU_SWITCH}={switch!r} is not allowed; give 1, or 0 for nothing")
    if switch == "1":
        from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

        enable_cpu_platform()


def uninstall() -> None:
    """Restore everything in xfuser that `install` has replaced; calling again changes nothing.

    Caches that are on pipelines stay on; `remove_cache` takes them off.
    """
    for finder in _FINDERS:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    _CHANGES.undo()
    enable_cache.CHANGES.undo()
    for name in ALIASES:
        module = sys.modules.get(name)
        if module is not None and module.__loader__ is _FINDERS[1]:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            delattr(sys.modules[parent], child)


def requested(cache_method: str | None, cache_config: Any = None) -> CacheConfig | None:
    """Return the cache that `--cache_method` and `--cache_config` ask for; None where not of ours.

    Args:
        cache_method: a name of `METHODS`, one of xDiT's own methods, or None.
        cache_config: options of the cache, as JSON or as a mapping.

    Raises:
        ValueError: options that are not JSON, or that `CacheConfig` refuses.
        TypeError: an option of the wrong type.
    """
    from xfuser_fastcache.config.cache_config import CacheConfig

    if cache_method not in METHODS:
        return None
    options = read_options(cache_config)
    backend = options.get("use_cache", METHODS[cache_method])
    if cache_method != "fastcache" and backend != METHODS[cache_method]:
        raise ValueError(
            f"cache_method={cache_method!r} and use_cache={backend!r} ask for two backends; leave "
            "one of them out"
        )
    return CacheConfig.from_dict({**options, "use_cache": backend})


def _in_cache_args(cache_args: Mapping[str, Any] | None) -> CacheConfig | None:
    """Return the cache of ours that a pipeline's `cache_args` ask for, or None."""
    options = dict(cache_args or {})
    method = options.pop("cache_method", None)
    if "use_cache" not in options and method not in METHODS:
        return None
    _refuse_xdits_own(cache_args)
    for name in _OLD_SWITCHES:
        options.pop(name, None)
    nested = read_options(options.pop("cache_config", None))
    return requested(method or "fastcache", nested | options)


def _refuse_xdits_own(cache_args: Mapping[str, Any] | None) -> None:
    """Raise where `cache_args` ask for a cache of xDiT's beside one of ours.

    Raises:
        ValueError: they do.
    """
    given = cache_args or {}
    found = [name for name in _OLD_SWITCHES if given.get(name)]
    if given.get("cache_method") not in (None, *METHODS):
        found.append("cache_method")
    if found:
        raise ValueError(
            f"a cache of xfuser_fastcache is asked for, and by {', '.join(found)} in cache_args="
            f"{given!r} one of xDiT's own; leave one of them out"
        )


def _one_of(asked: Mapping[str, CacheConfig | None]) -> CacheConfig | None:
    """Return what was asked for, by whoever asked; an error where they asked for different things.

    Raises:
        ValueError: two of them differ.
    """
    given = {place: config for place, config in asked.items() if config is not None}
    (first, config), *rest = given.items() or ((None, None),)
    for place, other in rest:
        if other != config:
            raise ValueError(
                f"{first} and {place} ask for different caches, {config} and {other}; leave one of "
                "them out"
            )
    return config


def _put_on(pipe: Any, config: CacheConfig) -> None:
    """Put a cache on behind all that xfuser does, on the ranks that run the transformer."""
    from xfuser_fastcache.xdit.compiled import compile_by_blocks
    from xfuser_fastcache.xdit.groups import XDiTLayout, runs_transformer
    from xfuser_fastcache.xdit.pipeline import put_on

    if runs_transformer():
        compile_by_blocks(pipe, config, XDiTLayout())
        put_on(pipe, config)


def _wrap(module: ModuleType, path: str, around: Callable[[Any], Callable[..., Any]]) -> None:
    """Put `around(original)` in place of a function or method of xfuser, until `uninstall`."""
    require(module, path)
    owner, _, name = path.rpartition(".")
    _CHANGES.wrap(require(module, owner) if owner else module, name, around)


def _patch_args(module: ModuleType) -> None:
    """Flags take our methods, and the engine config says which was asked for."""

    def with_our_methods(add_args: Callable[..., Any]) -> Callable[..., Any]:
        def add(parser: Any) -> Any:
            found = add_args(parser)
            for action in parser._actions:
                if action.dest == "cache_method":
                    action.choices = [*action.choices, *METHODS]
                elif action.dest == "cache_config":
                    action.help += " Of xfuser_fastcache's methods: JSON with their options."
            return found

        return add

    def with_request(create_config: Callable[..., Any]) -> Callable[..., Any]:
        def create(self: Any) -> Any:
            config = requested(self.cache_method, self.cache_config)
            engine_config, input_config = create_config(self)
            if config is not None:
                setattr(engine_config.runtime_config, _REQUEST, config)
            return engine_config, input_config

        return create

    for name in ("add_cli_args", "add_runner_args"):
        _wrap(module, f"xFuserArgs.{name}", with_our_methods)
    _wrap(module, "xFuserArgs.create_config", with_request)


def _patch_base_pipeline(module: ModuleType) -> None:
    """Every pipeline of xfuser puts the cache on that its arguments ask for, behind all else."""

    def with_cache(init: Callable[..., None]) -> Callable[..., None]:
        def __init__(
            self: Any, pipeline: Any, engine_config: Any, cache_args: Any = None, **others: Any
        ) -> None:
            from xfuser_fastcache.xdit.pipeline import xFuserFastCachePipelineWrapper

            own = _in_cache_args(cache_args)
            wrapper = pipeline if type(pipeline) is xFuserFastCachePipelineWrapper else None
            config = _one_of(
                {
                    "cache_args": own,
                    "--cache_method": getattr(engine_config.runtime_config, _REQUEST, None),
                    "enable_fastcache": None if wrapper is None else wrapper.fastcache_config,
                }
            )
            if config is not None:
                _refuse_xdits_own(cache_args)
            if wrapper is not None:
                pipeline = wrapper.release_pipeline()
            init(self, pipeline, engine_config, cache_args if own is None else None, **others)
            if config is not None:
                _put_on(self, config)
            if wrapper is not None:
                wrapper.follow_pipeline(self, config)

        return __init__

    _wrap(module, "xFuserPipelineBaseWrapper.__init__", with_cache)


def _patch_pipeline(class_name: str) -> Callable[[ModuleType], None]:
    """`from_pretrained` takes our `cache_args`, or refuses them; the cache hears of calls."""

    def with_cache_args(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
        def load(
            cls: Any, pretrained_model_name_or_path: Any, engine_config: Any, *args: Any, **kw: Any
        ) -> Any:
            if _in_cache_args(kw.get("cache_args")) is None:
                return from_pretrained(
                    cls, pretrained_model_name_or_path, engine_config, *args, **kw
                )
            cache_args = kw.pop("cache_args")
            if kw.pop("return_org_pipeline", *args[:1] or (False,)):
                raise ValueError(
                    f"cache_args={cache_args!r} with return_org_pipeline=True: the original "
                    "pipeline takes none; call apply_cache_on_transformer(pipe.transformer, "
                    "scheduler=pipe.scheduler, ...) on it"
                )
            if "return_org_pipeline" in inspect.signature(from_pretrained).parameters:
                kw["return_org_pipeline"] = True
                pipeline = from_pretrained(cls, pretrained_model_name_or_path, engine_config, **kw)
            else:  # CogVideoX's and ConsisID's return their own alone
                from diffusers import DiffusionPipeline

                pipeline = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kw)
            return cls(pipeline, engine_config, cache_args)

        return load

    def patch(module: ModuleType) -> None:
        _wrap(module, f"{class_name}.from_pretrained", with_cache_args)
        _wrap(module, f"{class_name}.__call__", told)

    return patch


def _patch_call(class_name: str, module: ModuleType) -> None:
    """The cache hears of calls."""
    _wrap(module, f"{class_name}.__call__", told)


def _patch_runner(module: ModuleType) -> None:
    """The runner puts our caches on where it puts its own: behind quantising and compiling."""

    def without_cache(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any) -> Any:
            vars(self.engine_config.runtime_config).pop(_REQUEST, None)
            return load(self)

        return load_model

    def with_ours(apply: Callable[..., None]) -> Callable[..., None]:
        def apply_step_cache(self: Any) -> None:
            config = requested(self.config.cache_method, self.config.cache_config)
            if config is None:
                return apply(self)
            _put_on(self.pipe, config)
            require(module, "log")(f"Step cache applied: {config.use_cache} of xfuser_fastcache")

        return apply_step_cache

    def with_our_methods(validate: Callable[..., None]) -> Callable[..., None]:
        def validate_config(self: Any, config: Any) -> None:
            # Not on the class: some models set it anew for each instance (`_customize_settings`).
            family = family_of(self.settings.model_name)
            if config.cache_method in METHODS and family is not None:
                if family.why_not:
                    raise ValueError(
                        f"--cache_method {config.cache_method} is not for {family.title}: "
                        f"{family.reason}. `fastcache models` and docs/models.md list what it is "
                        "for, and docs/extending.md adds a model."
                    )
                # xDiT need not have a cache for it itself, as it has none for Z-Image-Turbo.
                self.capabilities = replace(self.capabilities, supports_step_caching=True)
            if self.capabilities.supports_step_caching:
                known = self.settings.step_cache_config or {}
                self.settings.step_cache_config = {**known, **dict.fromkeys(METHODS)}
            validate(self, config)

        return validate_config

    _wrap(module, "xFuserModel._validate_config", with_our_methods)
    _wrap(module, "xFuserModel._load_model_checked", without_cache)
    _wrap(module, "xFuserModel._apply_step_cache", with_ours)


def _patch_wrapper(module: ModuleType) -> None:
    """A wrapper has its cache on itself: what it hands on goes to the model inside."""
    wrapper = require(module, "xFuserTransformerBaseWrapper")
    for name, around in enable_cache.METHODS.items():
        _CHANGES.add(wrapper, name, around(_handed_on(name)))


def _handed_on(name: str) -> Callable[..., Any]:
    return lambda self, *given: getattr(self.module, name)(*given)


_PIPELINES = "xfuser.model_executor.pipelines"
_RUNNER_MODELS = "xfuser.model_executor.models.runner_models"
PATCHES |= {
    "xfuser.config.args": Patch(
        "--cache_method with a name of ours",
        ("xFuserArgs.add_cli_args", "xFuserArgs.add_runner_args", "xFuserArgs.create_config"),
        _patch_args,
    ),
    f"{_PIPELINES}.base_pipeline": Patch(
        "cache_args, --cache_method and enable_fastcache on xfuser's pipelines",
        ("xFuserPipelineBaseWrapper.__init__",),
        _patch_base_pipeline,
    ),
    f"{_RUNNER_MODELS}.base_model": Patch(
        "our methods in xDiT's runner",
        tuple(
            f"xFuserModel.{name}"
            for name in ("_validate_config", "_load_model_checked", "_apply_step_cache")
        ),
        _patch_runner,
    ),
    "xfuser.model_executor.models.transformers.base_transformer": Patch(
        "enable_cache on xfuser's wrappers of transformers",
        ("xFuserTransformerBaseWrapper",),
        _patch_wrapper,
    ),
}
PATCHES |= {
    f"{_PIPELINES}.{module}": Patch(
        f"cache_args of {name}.from_pretrained",
        (f"{name}.from_pretrained", f"{name}.__call__"),
        _patch_pipeline(name),
    )
    for module, name in WRAPPERS.items()
}
PATCHES |= {
    f"{_PIPELINES}.{module}": Patch(
        f"the comparison of what {name} is given",
        (f"{name}.__call__",),
        functools.partial(_patch_call, name),
    )
    for module, name in SHARING.items()
}
# diffusers' modules, too, where its users look for a cache.
_ALL: dict[str, Callable[[ModuleType], None]] = {**PATCHES, **enable_cache.PATCHES}
_FINDERS = (PatchingFinder(_ALL, {"xfuser": without_accelerator}), AliasFinder(ALIASES))
