"""`scripts/token_gain.py`: it measures what it says, and finds from where on a plan pays."""

from __future__ import annotations

import pytest

from scripts.dev import token_gain
from scripts.dev.token_gain import PLANS, Gain, Loop, build, measure, parse, pays_from


def gain(tokens: int, *ratios: float) -> Gain:
    return Gain("merge", tokens, 1.0, list(ratios), 0.5)


def test_a_plan_pays_from_the_smallest_size_after_which_it_is_never_slower() -> None:
    sizes = [gain(64, 1.2), gain(256, 0.9, 0.9, 2.0), gain(1024, 1.1), gain(4096, 1.3)]
    assert pays_from(sizes) == 1024
    assert pays_from([gain(64, 1.5), gain(256, 1.0)]) is None


def test_only_the_share_that_is_asked_for_moves() -> None:
    loop = Loop(build(64, 1), 8, moving=0.25)
    for before, after in zip(loop.latents, loop.latents[1:], strict=False):
        moved = (before != after).any(dim=-1)[0]
        assert moved[:16].all() and not moved[16:].any()


def test_every_plan_leaves_tokens_out_and_the_block_cache_alone_computes() -> None:
    gains = measure(build(64, 1), 8, moving=0.1, turns=2)
    assert [found.plan for found in gains] == list(PLANS)
    for found in gains:
        assert len(found.ratios) == 2 and found.tokens == 64 and found.step_ms > 0
    left_out = {found.plan: found.left_out for found in gains}
    # A tenth moves: seven of ten steps on an eighth of the tokens.
    assert left_out["split, reuse"] == left_out["split, drop"] == pytest.approx(0.7 * 7 / 8)
    assert 0.2 < left_out["merge"] < 0.4 and left_out["split, reuse, merge"] > 0.7 * 7 / 8


def test_only_the_plans_that_are_asked_for_are_measured() -> None:
    chosen = parse(["--plans", "merge", "split, drop"]).plans
    gains = measure(build(64, 1), 4, moving=0.1, turns=1, plans=chosen)
    assert [found.plan for found in gains] == ["merge", "split, drop"]


def test_a_gate_that_skips_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_gain.GATE, "cache_ratio_threshold", 1e6)
    with pytest.raises(RuntimeError, match="measures nothing"):
        measure(build(64, 1), 4, moving=0.1, turns=1)


@pytest.mark.parametrize("wrong", ["--moving=1.5", "--width=100"])
def test_a_wrong_flag_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([wrong])
    assert "give a" in capsys.readouterr().err
