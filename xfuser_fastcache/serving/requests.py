"""What a client may ask for: the fields of a picture, their limits, the cache's options."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.checks import options_of
from xfuser_fastcache.config.methods import REGISTRIES


def _takes_any_text(found: dataclasses.Field[Any]) -> bool:
    try:
        found.metadata["check"].read("/any/text")
    except (TypeError, ValueError):
        return False
    return True


def _texts_of(method: Any) -> set[str]:
    """Return the options in which a path could stand: those that take any text."""
    return {name for name, found in options_of(method).items() if _takes_any_text(found)}


# Whoever runs the service answers for these: they bound its waits, or name its files.
OPERATORS = (
    *("sync_backend", "sync_timeout_s"),
    *sorted(_texts_of(CacheConfig) - {"use_cache", *REGISTRIES}),
)
# How a picture or a clip may come.
MEDIA = {"png": "image/png", "webp": "image/webp", "mp4": "video/mp4"}
# Lists and mappings in each other; the deepest request that means something has six.
_MAX_DEPTH = 16
_MOST_SAID = 3  # of a body's errors


class RequestRefused(ValueError):
    """A request that the service will not run; the message says what is allowed.

    Attributes:
        field: that is wrong; None where it is not one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class GenerateRequest(BaseModel):
    """Body of POST /generate; what is left out is as in the service's own flags."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None
    height: int | None = Field(None, ge=1, description="pixels")
    width: int | None = Field(None, ge=1, description="pixels")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63, description="drawn where it is left out")
    use_cache: str | Literal[False] | None = Field(
        None, description="a backend such as Fast; false runs uncached; default the service's"
    )
    cache_config: dict[str, Any] | None = Field(
        None, description="options of CacheConfig, in place of the service's"
    )
    output_format: Literal["png", "webp", "mp4"] | None = Field(
        None, description="of a clip, default webp; pictures are png"
    )
    stream: bool = Field(False, description="tell of every step by server-sent events")


Wanted = TypeVar("Wanted", bound=GenerateRequest)


def read_request(body: bytes, kind: type[Wanted]) -> Wanted:
    """Return what the body of a POST holds.

    Args:
        body: JSON.
        kind: of the request: its fields.

    Raises:
        RequestRefused: no JSON, or a wrong, unknown or missing field; nothing is dropped.
    """
    try:
        found = json.loads(
            body,
            object_pairs_hook=_without_doubles,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RequestRefused:
        raise
    except RecursionError:
        raise RequestRefused(_TOO_DEEP) from None
    except ValueError as error:
        raise RequestRefused(f"the body is not valid JSON: {error}") from error
    _refuse_depth(found)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        wrong = error.errors()
        said = [_said(one, kind) for one in wrong[:_MOST_SAID]]
        more = [f"and {len(wrong) - _MOST_SAID} more"] if len(wrong) > _MOST_SAID else []
        field = str(wrong[0]["loc"][0])[:80] if wrong[0]["loc"] else None
        raise RequestRefused("; ".join([*said, *more]), field) from error


_TOO_DEEP = f"the body is nested deeper than {_MAX_DEPTH} levels; nothing that is known needs that"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        (double, *_) = [name for name in names if names.count(name) > 1]
        raise RequestRefused(f"{double!r:.80} is given more than once; give it once")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RequestRefused(f"{text:.80} is not allowed; give finite numbers")
    return number


def _refuse_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise RequestRefused(_TOO_DEEP)
        held = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [inner for v in held if isinstance(v, list) for inner in v]


def _said(wrong: Any, kind: type[GenerateRequest]) -> str:
    """Return one of pydantic's complaints in words: the field, what is allowed, what was given."""
    name = ".".join(map(str, wrong["loc"])) or "body"
    if wrong["type"] == "extra_forbidden":
        return f"unknown field {name!r:.80}; known: {', '.join(kind.model_fields)}"
    if wrong["type"] == "missing":
        return f"{name} is needed"
    return f"{name}: {wrong['msg']}, given {wrong['input']!r:.80}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this service draws, from its flags and its model.

    Attributes:
        max_side: of a picture, in pixels.
        height_multiple: in pixels; what patches of the latent and the layout need.
        width_multiple: in pixels.
        max_steps: of a generation.
        max_prompt_length: of each prompt, in characters.
        negative_prompts: whether the pipeline takes them.
        two_branches: CFG parallelism, which needs a guidance scale above 1.
        formats: in which the model's pictures or clips come; the first where none is asked for.
    """

    max_side: int
    height_multiple: int
    width_multiple: int
    max_steps: int
    max_prompt_length: int
    negative_prompts: bool
    two_branches: bool
    formats: tuple[str, ...] = ("png",)

    def check(self, order: dict[str, Any]) -> None:
        """Refuse what is beyond the limits.

        Raises:
            RequestRefused: naming field, value and limit.
        """
        for name, multiple in (("height", self.height_multiple), ("width", self.width_multiple)):
            if order[name] > self.max_side or order[name] % multiple:
                raise RequestRefused(
                    f"{name}={order[name]} is not allowed; give a multiple of {multiple} up to "
                    f"{self.max_side}",
                    name,
                )
        if order["num_inference_steps"] > self.max_steps:
            raise RequestRefused(
                f"num_inference_steps={order['num_inference_steps']} is not allowed; give 1 to "
                f"{self.max_steps}",
                "num_inference_steps",
            )
        for name in ("prompt", "negative_prompt"):
            if len(order[name] or "") > self.max_prompt_length:
                raise RequestRefused(
                    f"{name} has {len(order[name])} characters; give at most "
                    f"{self.max_prompt_length}",
                    name,
                )
        if order["negative_prompt"] and not self.negative_prompts:
            raise RequestRefused(
                "this model takes no negative_prompt; leave it out", "negative_prompt"
            )
        if order["output_format"] not in self.formats:
            raise RequestRefused(
                f"output_format={order['output_format']!r} is not allowed; this service gives "
                f"{' or '.join(self.formats)}",
                "output_format",
            )
        if self.two_branches and order["guidance_scale"] <= 1:
            raise RequestRefused(
                f"guidance_scale={order['guidance_scale']:g} is not allowed; this service runs CFG "
                "parallelism, which needs more than 1",
                "guidance_scale",
            )


def order_of(
    request: GenerateRequest, limits: Limits, defaults: dict[str, Any], own: CacheConfig | None
) -> dict[str, Any]:
    """Return what all ranks have to run, checked.

    Args:
        request: as it came.
        limits: of this service.
        defaults: the service's flags, for fields that were left out.
        own: the service's cache, or None.

    Raises:
        RequestRefused: with the reason.
    """
    fields = (
        *("prompt", "negative_prompt", "height", "width"),
        *("num_inference_steps", "guidance_scale", "seed"),
    )
    order = {}
    for name in fields:
        given = getattr(request, name)
        order[name] = defaults.get(name) if given is None else given
    if request.seed is None:
        order["seed"] = secrets.randbits(32)
    order["output_format"] = request.output_format or limits.formats[0]
    limits.check(order)
    return {**order, "cache": _cache_of(request, own)}


def _cache_of(request: GenerateRequest, own: CacheConfig | None) -> dict[str, Any] | bool:
    """Return the options of a request's cache; True stands for the service's own, False for none.

    They stay as they came: each rank builds its own CacheConfig.
    """
    if request.use_cache is False:
        if request.cache_config:
            raise RequestRefused("cache_config needs a cache; leave out use_cache=false")
        return False
    if request.use_cache is None and request.cache_config is None:
        return own is not None
    name = request.use_cache or (own.use_cache if own else None)
    if name is None:
        raise RequestRefused("cache_config needs use_cache; this service has no cache of its own")
    given = dict(request.cache_config or {})
    kept = own or CacheConfig()
    for option in OPERATORS:
        if option in given and given[option] != getattr(kept, option):
            raise RequestRefused(
                f"{option}={given[option]!r:.80} is not allowed; it is set by whoever runs this "
                "service"
            )
    for method, option in _files_of_methods(given):
        raise RequestRefused(
            f"{option} of {method!r} is not allowed; a request names no files, and any text may be "
            "a file's name"
        )
    options = {"use_cache": name, **given}
    for option in ("sync_backend", "sync_timeout_s"):
        options[option] = getattr(kept, option)
    try:
        config, fitted = CacheConfig.from_dict(options), None
        if config.calibration is not None:
            fitted = load_fitted(config.calibration)
            config = config.resolved(fitted)
        gate_of(config, fitted)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RequestRefused(str(error)) from error
    return options


def _files_of_methods(given: Any) -> Iterator[tuple[str, str]]:
    """Yield method and option wherever a mapping gives a method's option that takes any text."""
    if isinstance(given, list):
        for inner in given:
            yield from _files_of_methods(inner)
    if isinstance(given, dict):
        name = given.get("name")
        for registry in REGISTRIES.values():
            if isinstance(name, str) and name in registry:
                yield from ((name, option) for option in _texts_of(registry[name]) & set(given))
        yield from _files_of_methods(list(given.values()))
