"""The latents at a pipeline's last stage, taken from the steps of diffusers' own schedulers.

`tests/test_layouts.py` has the stages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.models.forward_layout import ForwardLayout, latents_known
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.latents import StageLatents
from xfuser_fastcache.state.local import Anchor, LocalState, Memory

WHOLE = Position(patch_tokens=(2, 6))
PATCHES = [Position(patch, (2, 6), patched=True) for patch in (0, 1)]
SCHEDULERS = [FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler]


class Stage:
    """A last stage in front of a scheduler, and what its branch remembers of one span."""

    def __init__(self, make: Callable[[], Any] = FlowMatchEulerDiscreteScheduler, tokens: int = 8):
        self.scheduler = make()
        self.scheduler.set_timesteps(4)
        self.latents = StageLatents(ForwardLayout().tokens, lambda: self.scheduler)
        self.local = LocalState(torch.zeros(0))
        self.steps = iter(self.scheduler.timesteps)

    def run(self, sample: torch.Tensor, position: Position = WHOLE, batch: int = 1) -> Any:
        """Compute a forward pass and step; return what were its latents, and the next ones."""
        given = Streams(torch.zeros(batch * len(sample), 8, 5))  # hidden states, of another width
        known = self.latents.given(given, position)
        self.local.memory(0, position)
        self.local.remember(0, position, Memory((Anchor(1.0, known, given, None),)))
        self.latents.listen(self.local, position)
        made = torch.ones_like(sample)
        (after,) = self.scheduler.step(made, next(self.steps), sample, return_dict=False)
        return known, after

    def anchor(self, position: Position = WHOLE) -> torch.Tensor:
        """Return the latents of the newest anchor."""
        return self.local.memory(0, position).anchors[0].inputs.hidden_states


@pytest.mark.parametrize("make", SCHEDULERS)
def test_a_step_tells_the_next_latents_and_completes_the_first_anchor(make: Any) -> None:
    stage, first = Stage(make), torch.randn(1, 8, 3)
    known, second = stage.run(first)
    assert not latents_known(known)
    assert torch.equal(stage.anchor(), first)
    known, third = stage.run(second)
    assert torch.equal(known.hidden_states, second) and torch.equal(stage.anchor(), second)
    assert torch.equal(stage.latents.given(known, WHOLE).hidden_states, third)
    assert stage.latents.nbytes() == third.nbytes


def test_pictures_are_tokens_in_the_batch_of_guidance() -> None:
    stage, first = Stage(), torch.randn(2, 3, 4, 2)
    known, second = stage.run(first, batch=2)
    tokens = first.flatten(2).transpose(1, 2)
    assert torch.equal(stage.anchor(), torch.cat((tokens, tokens)))
    known = stage.latents.given(Streams(torch.zeros(4, 8, 5)), WHOLE).hidden_states
    assert torch.equal(known, second.flatten(2).transpose(1, 2).repeat(2, 1, 1))


def test_patches_follow_a_synchronous_step() -> None:
    stage = Stage()
    _, whole = stage.run(torch.randn(1, 8, 3))
    parts = list(whole.split((2, 6), dim=1))
    for position, part in zip(PATCHES, parts, strict=True):
        known = stage.latents.given(Streams(torch.zeros(1, 8, 5)), position)
        assert torch.equal(known.hidden_states, part)
    # Of a patch that has stepped the next ones, of the other those from before.
    known, after = stage.run(parts[0], PATCHES[0])
    assert torch.equal(known.hidden_states, parts[0])
    found = [stage.latents.given(known, position).hidden_states for position in PATCHES]
    assert torch.equal(found[0], after) and torch.equal(found[1], parts[1])


def test_the_scheduler_is_listened_to_once_and_is_then_as_it_was() -> None:
    stage = Stage()
    before = dict(vars(stage.scheduler))
    stage.latents.listen(stage.local, WHOLE)
    assert "step" in vars(stage.scheduler)
    stage.latents.listen(stage.local, WHOLE)  # a second branch of the same step
    stage.scheduler.step(torch.ones(1, 8, 3), stage.scheduler.timesteps[0], torch.ones(1, 8, 3))
    assert vars(stage.scheduler).keys() == before.keys()
    stage.latents.listen(stage.local, WHOLE)
    stage.latents.forget()
    assert "step" not in vars(stage.scheduler)
    assert not latents_known(stage.latents.given(Streams(torch.zeros(1, 8, 5)), WHOLE))


def test_a_step_that_somebody_else_has_put_there_is_called_and_stays() -> None:
    stage, called = Stage(), []
    step = stage.scheduler.step

    def others(*args: Any, **kwargs: Any) -> Any:
        called.append(len(args))
        return step(*args, **kwargs)

    vars(stage.scheduler)["step"] = others
    first = torch.randn(1, 8, 3)
    stage.run(first)
    assert called == [3] and vars(stage.scheduler)["step"] is others
    # Its signature does not say which argument is the sample.
    assert not latents_known(stage.latents.given(Streams(torch.zeros(1, 8, 5)), WHOLE))


def test_latents_that_do_not_fit_the_batch_are_not_known() -> None:
    stage = Stage()
    stage.run(torch.randn(2, 8, 3))
    assert not latents_known(stage.latents.given(Streams(torch.zeros(3, 8, 5)), WHOLE))


def test_without_a_scheduler_nothing_is_known() -> None:
    latents = StageLatents(ForwardLayout().tokens, lambda: None)
    latents.listen(LocalState(torch.zeros(0)), WHOLE)
    assert not latents_known(latents.given(Streams(torch.zeros(1, 8, 5)), WHOLE))


def test_an_error_of_the_scheduler_is_its_own() -> None:
    stage = Stage()
    stage.latents.listen(stage.local, WHOLE)
    with pytest.raises(TypeError, match="sample"):
        stage.scheduler.step(torch.ones(1, 8, 3), stage.scheduler.timesteps[0])
    assert "step" not in vars(stage.scheduler)
