"""What is left behind when putting a cache on, drawing with it or taking it off fails: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loops import cached

from diffusers_adapters.tiny.flux import tiny_flux
from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.apply import remove_cache_from_pipeline
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.errors import ConsensusError
from xfuser_fastcache.consensus.topology import DecisionGroup
from xfuser_fastcache.engine import CacheEngine
from xfuser_fastcache.hooks import Attachment, hook_on


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Consensus]:
    """The consensus objects that were closed."""
    found: list[Consensus] = []
    close = Consensus.close

    def noted(self: Consensus) -> None:
        found.append(self)
        close(self)

    monkeypatch.setattr(Consensus, "close", noted)
    return found


@pytest.mark.parametrize(
    ("owner", "name"),
    [(CacheEngine, "__init__"), (Attachment, "_put"), (Attachment, "_register")],
)
def test_a_failed_apply_leaves_nothing_behind(
    closed: list[Consensus], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    pipe, call = tiny_flux()
    before = {key: set(vars(module)) for key, module in pipe.transformer.named_modules()}
    calls, original = [0], getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if owner is CacheEngine else 3):
            raise MemoryError("no room")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(MemoryError, match="no room"):
            # A forecaster of blocks has a hook on each.
            apply_cache_on_transformer(pipe.transformer, forecaster="damped_taylor")
    assert len(closed) == 1
    assert {key: set(vars(module)) for key, module in pipe.transformer.named_modules()} == before
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler)


def test_removal_closes_all_whatever_is_raised(
    closed: list[Consensus], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = cached()
    engine = hook_on(transformer).engine  # type: ignore[union-attr]

    def fails() -> None:
        raise ConsensusError("ranks [1] decided differently")

    monkeypatch.setattr(engine.agreement, "finish", fails)
    with pytest.raises(ConsensusError, match="decided differently"):
        remove_cache(transformer)
    assert hook_on(transformer) is None
    assert closed == [engine.consensus]
    assert engine.watchdog._closed.is_set()


def test_a_pipelines_other_caches_come_off_too_where_one_raises(
    closed: list[Consensus], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = tiny_flux()
    pipe.transformer_2 = tiny_flux()[0].transformer
    for part in (pipe.transformer, pipe.transformer_2):
        apply_cache_on_transformer(part, scheduler=pipe.scheduler)

    def fails(self: Any) -> None:
        raise ConsensusError("ranks [1] decided differently")

    monkeypatch.setattr("xfuser_fastcache.decisions.agreement.Agreement.finish", fails)
    with pytest.raises(ConsensusError):
        remove_cache_from_pipeline(pipe)
    assert hook_on(pipe.transformer) is None and hook_on(pipe.transformer_2) is None
    assert len(closed) == 2


def test_a_failed_pipeline_is_refused_until_the_cache_is_applied_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = hook_on(cached()).engine  # type: ignore[union-attr]
    engine.inputs.check_pipeline(lambda values: str(values))  # one stage has no channels
    engine.consensus.group = DecisionGroup((0, 1), 0, stages=2)
    engine.inputs.check_pipeline(lambda values: str(values))
    monkeypatch.setattr(Consensus, "failed", True)
    with pytest.raises(ConsensusError, match="a generation has failed on rank 0 after the begin"):
        engine.inputs.check_pipeline(lambda values: str(values))
    engine.consensus.group = DecisionGroup((0, 1), 0)
    engine.inputs.check_pipeline(lambda values: str(values))


def test_inputs_are_compared_where_that_is_asked_for_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []
    monkeypatch.setattr(Consensus, "compare", lambda self, *given: compared.append(given))
    for verify in (False, True):
        pipe, call = tiny_flux()
        pipe.set_progress_bar_config(disable=True)
        apply_cache_on_transformer(
            pipe.transformer, scheduler=pipe.scheduler, verify_consensus=verify
        )
        for _ in range(2):
            pipe(**{**call, "generator": torch.Generator().manual_seed(1)})
    # Once a generation, the same of the same call.
    assert len(compared) == 2 and len(set(compared)) == 1
    assert "prompts" in compared[0][1]


@pytest.mark.parametrize("cuts_tokens", [False, True])
def test_sizes_and_seeds_are_compared_ahead_where_a_forward_pass_cuts_its_tokens(
    cuts_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that decide together may have seeds of their own; what is cut is one picture."""
    compared: dict[str, list[str]] = {}
    monkeypatch.setattr(
        Consensus, "compare", lambda self, value, what: compared.setdefault(what, []).append(value)
    )
    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, verify_consensus=True)
    engine = hook_on(pipe.transformer).engine  # type: ignore[union-attr]
    engine.consensus.group = DecisionGroup(cuts_tokens=cuts_tokens)
    for seed, size in ((1, 128), (2, 128), (2, 64)):
        given = {"generator": torch.Generator().manual_seed(seed), "height": size, "width": size}
        pipe(**{**call, **given})
    sizes, inputs = (
        next((found for what, found in compared.items() if name in what), [])
        for name in ("sizes (", "inputs (")
    )
    assert len(set(inputs)) == (3 if cuts_tokens else 2)
    assert [value.partition(", torch")[0] for value in sizes] == (
        ["batch 1, size (64, 16)"] * 2 + ["batch 1, size (16, 16)"] if cuts_tokens else []
    )
    assert len(set(sizes)) == (2 if cuts_tokens else 0)
