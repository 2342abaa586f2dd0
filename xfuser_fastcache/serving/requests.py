"""What a client may ask for: the fields of POST /generate, their limits, the cache's options."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.backends import gate_of
from xfuser_fastcache.config.cache_config import CacheConfig

# Whoever runs the service answers for these: they bound its waits, or read its files.
OPERATORS = ("sync_backend", "sync_timeout_s", "calibration")


class RequestRefused(ValueError):
    """A request that the service will not run; the message says what is allowed."""


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
    """

    max_side: int
    height_multiple: int
    width_multiple: int
    max_steps: int
    max_prompt_length: int
    negative_prompts: bool
    two_branches: bool

    def check(self, order: dict[str, Any]) -> None:
        """Refuse what is beyond the limits.

        Raises:
            RequestRefused: naming field, value and limit.
        """
        for name, multiple in (("height", self.height_multiple), ("width", self.width_multiple)):
            if order[name] > self.max_side or order[name] % multiple:
                raise RequestRefused(
                    f"{name}={order[name]} is not allowed; give a multiple of {multiple} up to "
                    f"{self.max_side}"
                )
        if order["num_inference_steps"] > self.max_steps:
            raise RequestRefused(
                f"num_inference_steps={order['num_inference_steps']} is not allowed; give 1 to "
                f"{self.max_steps}"
            )
        for name in ("prompt", "negative_prompt"):
            if len(order[name] or "") > self.max_prompt_length:
                raise RequestRefused(
                    f"{name} has {len(order[name])} characters; give at most "
                    f"{self.max_prompt_length}"
                )
        if order["negative_prompt"] and not self.negative_prompts:
            raise RequestRefused("this model takes no negative_prompt; leave it out")
        if self.two_branches and order["guidance_scale"] <= 1:
            raise RequestRefused(
                f"guidance_scale={order['guidance_scale']:g} is not allowed; this service runs CFG "
                "parallelism, which needs more than 1"
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
                f"{option}={given[option]!r} is not allowed; it is set by whoever runs this service"
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
