"""The clock of a pipeline: its denoisers share generations and steps."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from xfuser_fastcache.clock.ownership import Ownership
from xfuser_fastcache.clock.pipelines import PresentScheduler
from xfuser_fastcache.clock.plan import Plan
from xfuser_fastcache.clock.sources import Arrival
from xfuser_fastcache.clock.timeline import Call, Timeline
from xfuser_fastcache.consensus.inputs import digest_of
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.token_layout import TokenCounts


class Denoiser(Protocol):
    """What a clock has to say to a cache on one of the pipeline's transformers."""

    def rest(self) -> None:
        """Another one works: expect no call for now."""

    def retire(self) -> None:
        """Another one has taken over for the rest of the generation: free what is remembered."""


class Clock:
    """Places the forward passes of one pipeline's denoisers in time.

    With several of them, as Wan 2.2 has one for much noise and one for little, steps count through
    and a plan is for the whole schedule.

    Args:
        num_steps: steps of a generation where no scheduler tells; None if unknown.
    """

    def __init__(self, num_steps: int | None = None):
        self.timeline = Timeline(num_steps)
        self.ownership = Ownership(self.timeline)
        self._denoisers: dict[int, weakref.ReferenceType[Denoiser]] = {}
        self._last: tuple[int, int] | None = None

    def admit(self, denoiser: Denoiser) -> int:
        """Take a denoiser in; return its number."""
        number = 1 + max(self._denoisers, default=-1)
        self._denoisers[number] = weakref.ref(denoiser)
        return number

    def open(self, arrival: Arrival) -> Call:
        """Place a forward pass, and tell the other denoisers.

        Raises:
            TransformerInUse: another thread's generation is the current one; see `Ownership`.
        """
        self.ownership.claim(arrival)
        call = self.timeline.open(arrival)
        self.ownership.note(call)
        if len(self._denoisers) > 1:
            self._tell_others(arrival.denoiser, call)
        return call

    def _tell_others(self, number: int, call: Call) -> None:
        if call.starts_generation:
            self._last = None
        # One that enters a generation which others have begun takes over from them; those that
        # take turns within a step have all entered at the same one.
        takes_over = call.opens_step and call.step == call.entered and self._last is not None
        takes_over = takes_over and self._last[1] < call.step  # type: ignore[index]
        for other, reference in self._denoisers.items():
            denoiser = reference()
            if denoiser is not None and other != number:
                denoiser.rest()
                if takes_over:
                    denoiser.retire()
        self._last = number, call.step


class Reader:
    """Reads what the clock has to know from the arguments of a transformer's forward.

    Args:
        adapter: of its family.
        counts: told of each forward pass how many of its tokens are the image's.
        scheduler: says which one plans the steps now.
        layout: knows which tokens a forward pass carries.
        stages: of the pipeline.
        denoiser: its number, by `Clock.admit`.
    """

    def __init__(
        self,
        adapter: type[ModelAdapter],
        counts: TokenCounts,
        scheduler: PresentScheduler,
        layout: Any,
        stages: int = 1,
        denoiser: int = 0,
    ):
        self.adapter = adapter
        self.counts = counts
        self.layout = layout
        self.stages = stages
        self.denoiser = denoiser
        self.scheduler = scheduler
        self._forward = adapter.forward_layout()
        self._plan: Plan | None = None

    def arrival(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any = None
    ) -> Arrival:
        """Return a forward pass as it begins; reads nothing from the device.

        Args:
            args, kwargs: of the transformer's forward.
            context: what `cache_context` was entered with, or None.
        """
        adapter, forward = self.adapter, self._forward
        scheduler = self.scheduler()
        timesteps = None if scheduler is None else scheduler.timesteps
        if timesteps is None:
            self._plan = None
        elif self._plan is None or self._plan.timesteps is not timesteps:
            self._plan = Plan(timesteps, tuple(adapter.plan(scheduler)))
        given = forward.given(args, kwargs)
        # A plan has timesteps of its own for as long as it is held here.
        occasion = None
        if self._plan is not None and not adapter.counts_each_pass:
            occasion = (id(timesteps), given.batch, given.sizes)
        self.counts.open(args, kwargs, occasion)
        position = self.layout.position()
        tokens = sum(position.patch_tokens) or given.sizes

        def read_timestep() -> torch.Tensor:
            return forward.timestep_of(args, kwargs).flatten()[0]

        # Stages of a pipeline are given hidden states, in the model's dtype.
        dtype = "" if self.stages > 1 else f"{given.latents.dtype}, "
        return Arrival(
            latents=given.latents,
            read_timestep=read_timestep,
            noise_level_of=adapter.noise_level,
            shape=(given.batch, tokens, given.latents.dtype, given.latents.device),
            position=position,
            scheduler=scheduler,
            plan=self._plan,
            # A name in diffusers 0.37, an object that carries it later.
            name=getattr(context, "name", context),
            context_step=getattr(context, "step_index", None),
            stages=self.stages,
            denoiser=self.denoiser,
            inputs=lambda values, latents: digest_of(
                forward.beside(args, kwargs), given.latents if latents else None, values=values
            ),
            setup=f"batch {given.batch}, size {tokens}, {dtype}{self._plan or 'no plan'}",
        )
