"""A cache that is on a model of ComfyUI while one of its clones samples, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xfuser_fastcache import (
    CacheConfig,
    apply_cache_on_transformer,
    get_cache_statistics,
    get_cache_trace,
    remove_cache,
)
from xfuser_fastcache.hooks import hook_on

# By place in what ComfyUI's guiders hand to `calc_cond_batch`.
CONDITIONS = ("cond", "uncond")


class SamplerPlan:
    """The steps of one sampling, in the form in which caches read a scheduler of diffusers.

    Args:
        sigmas: that the sampler is given; the last one is no step.
        timestep_of: of the model's `model_sampling`, from sigmas to what the model is given.

    Attributes:
        step_index: of the evaluation under way; None before the first.
    """

    def __init__(
        self, sigmas: torch.Tensor, timestep_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.sigmas = sigmas.detach().float().cpu().clone()
        self._timestep_of = timestep_of
        self.timesteps = timestep_of(self.sigmas[:-1])
        self.num_inference_steps = len(self.timesteps)
        self.step_index: int | None = None

    @property
    def levels(self) -> list[float]:
        """Sigma of each step."""
        return self.sigmas[:-1].tolist()

    def evaluate(self, sigma: float) -> None:
        """Begin an evaluation of the model.

        Raises:
            RuntimeError: it is not the plan's next one: the sampler takes several a step, or
                chooses its steps by itself.
        """
        index = 0 if self.step_index is None else self.step_index + 1
        planned = self.levels[index] if index < self.num_inference_steps else None
        if planned is None or abs(sigma - planned) > 1e-3 * abs(planned):
            raise RuntimeError(
                f"evaluation {index} of this sampling is at sigma {sigma:.4g}, where the plan has "
                f"{'none' if planned is None else f'{planned:.4g}'}: the sampler evaluates the "
                "model more than once a step, or between steps, and the cache counts steps. "
                "Choose a sampler that evaluates once a step, such as euler, dpmpp_2m or "
                "res_multistep, or bypass Fast cache."
            )
        if index == 0:
            # Samplers with noise of their own begin a little below sigma 1.
            self.sigmas[0] = sigma
            self.timesteps = self._timestep_of(self.sigmas[:-1])
        self.step_index = index


@dataclass(frozen=True)
class Report:
    """What a cache did in one sampling.

    Attributes:
        statistics: of `get_cache_statistics`.
        trace: of `get_cache_trace`.
    """

    statistics: dict[str, Any]
    trace: list[dict[str, Any]]


class CachedSampling:
    """Wraps the samplings of a patched model: the cache is put on, told the time, and taken off.

    All clones of a model share its modules, so nothing stays on them between samplings.

    Args:
        config: the cache's options.

    Attributes:
        report: of the last sampling; None before, and where it has failed before its first step.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.report: Report | None = None
        self._plan: SamplerPlan | None = None
        # What a call's conditions go by in ComfyUI -> the name of the branch.
        self._branches: dict[tuple[Any, ...], str] = {}

    def sample(
        self, executor: Any, guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap `sampler_sample`: one sampling.

        Raises:
            ValueError: of the cache's options, or the model is cached or compiled already.
            RuntimeError: see `SamplerPlan.evaluate`.
        """
        base = guider.inner_model
        self._plan = SamplerPlan(sigmas, base.model_sampling.timestep)
        self._branches, self.report = {}, None
        model = base.diffusion_model
        apply_cache_on_transformer(model, config=self.config, scheduler=self._plan)
        try:
            return executor(guider, sigmas, *args, **kwargs)
        finally:
            trace = get_cache_trace(model)
            self.report = Report(get_cache_statistics(model), trace) if trace else None
            self._plan = None
            remove_cache(model)

    def predict(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap `predict_noise`: one evaluation, of all conditions.

        It reads one number from the device, as samplers themselves do at each step.
        """
        if self._plan is not None:
            self._plan.evaluate(float(timestep.max()))
        return executor(x, timestep, *args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap `apply_model`: one forward pass, of the conditions that fit into a batch."""
        hook = hook_on(executor.class_obj.diffusion_model)
        if hook is not None:
            # ComfyUI hands it on by position or by name.
            places = [*args, *kwargs.values()]
            options = next((p for p in places if isinstance(p, dict) and "cond_or_uncond" in p), {})
            hook.attachment.context.set_context(self._branch(options))
        return executor(*args, **kwargs)

    def _branch(self, options: dict[str, Any]) -> str:
        """Return the name of a call's conditions; several of one kind are numbered."""
        kinds = options.get("cond_or_uncond", ())
        key = (tuple(kinds), tuple(options.get("uuids", ())))
        if key not in self._branches:
            named = [
                CONDITIONS[kind] if kind < len(CONDITIONS) else f"cond {kind}" for kind in kinds
            ]
            earlier = sum(known == key[0] for known, _ in self._branches)
            number = f" ({earlier + 1})" if earlier else ""
            self._branches[key] = "+".join(named) + number
        return self._branches[key]
