"""The log of decisions: its digest, and the comparison that names what ranks disagree on."""

from __future__ import annotations

import random

import pytest

from xfuser_fastcache.clock.timeline import Call
from xfuser_fastcache.consensus.errors import ConsensusError
from xfuser_fastcache.consensus.topology import Position
from xfuser_fastcache.decisions.log import CHANGED, UNCHANGED, Decision, DecisionLog, Judgement

ROW = 2048


def decision(generation: int, step: int, branch: int, skip: list[bool]) -> Decision:
    """Return a decision with nothing of interest but its place and flags."""
    call = Call(generation, step, step, branch, True, 0.5, False, True, Position(), False)
    return Decision(call, [Judgement(s, UNCHANGED if s else CHANGED) for s in skip], wait_s=0.0)


def log(decisions: list[tuple[int, int, int, list[bool]]], spans: int) -> DecisionLog:
    found = DecisionLog(spans)
    for one in decisions:
        found.record(decision(*one))
    return found


def compare(*ranks: list[tuple[int, int, int, list[bool]]]) -> None:
    """Compare what ranks 0, 1, ... have decided."""
    spans = len(ranks[0][0][3])
    rows = {}
    for rank, decisions in enumerate(ranks):
        row = log(decisions, spans).unverified()
        assert row is not None and row.shape == (ROW,)
        rows[rank] = row.tolist()
    DecisionLog(spans).compare(rows)


def flags(spans: int, *skipped: int) -> list[bool]:
    return [span in skipped for span in range(spans)]


def steps(count: int, spans: int, generation: int = 2) -> list[tuple[int, int, int, list[bool]]]:
    """Return decisions over two branches a step, some of them skips."""
    chance = random.Random(0)
    return [
        (generation, index // 2, index % 2, [chance.random() < 0.5 for _ in range(spans)])
        for index in range(count)
    ]


@pytest.mark.parametrize("spans", [1, 5, 62, 63, 130])
def test_equal_decisions_compare_equal(spans: int) -> None:
    # It raises where they differ, and says nothing where they do not.
    assert compare(steps(12, spans), steps(12, spans), steps(12, spans)) is None


@pytest.mark.parametrize(("spans", "span"), [(1, 0), (5, 4), (62, 61), (63, 62), (130, 129)])
def test_the_first_difference_is_named_by_step_branch_span_and_ranks(spans: int, span: int) -> None:
    common = [(2, 0, 0, flags(spans)), (2, 0, 1, flags(spans, *range(spans)))]
    computes = [*common, (2, 1, 0, flags(spans)), (2, 1, 1, flags(spans))]
    skips = [*common, (2, 1, 0, flags(spans, span)), (2, 1, 1, flags(spans, 0))]
    with pytest.raises(
        ConsensusError,
        match=rf"generation 2, step 1, branch 0, span {span}: ranks \[1, 3\] skip, "
        rf"ranks \[0, 2\] compute",
    ):
        compare(computes, skips, computes, skips)


def test_ranks_at_different_places_are_named_with_their_places() -> None:
    common = (0, 0, 0, flags(3))
    with pytest.raises(
        ConsensusError, match=r"different places .*rank 0 at \[0, 1, 0\], rank 1 at \[0, 0, 1\]"
    ):
        compare([common, (0, 1, 0, flags(3))], [common, (0, 0, 1, flags(3))])


def test_a_rank_that_decided_less_often_is_found() -> None:
    with pytest.raises(ConsensusError, match=r"rank 0 at \[2, 1, 1\], rank 1 at \[-1, -1, -1\]"):
        compare(steps(4, 3), steps(3, 3))


@pytest.mark.parametrize(("spans", "fits"), [(3, 511), (100, 409)])
def test_a_difference_beyond_the_row_is_found_by_its_digest(spans: int, fits: int) -> None:
    count = fits + 40
    one, other = steps(count, spans), steps(count, spans)
    generation, step, branch, skip = other[-1]
    other[-1] = (generation, step, branch, [not skipped for skipped in skip])
    compare(one, one)
    with pytest.raises(ConsensusError, match=f"ranks .0, 1. .* beyond the first {fits} decisions"):
        compare(one, other)


@pytest.mark.parametrize(("spans", "fits"), [(3, 511), (100, 409)])
def test_the_last_decision_that_fits_the_row_is_named(spans: int, fits: int) -> None:
    one, other = steps(fits + 40, spans), steps(fits + 40, spans)
    generation, step, branch, skip = other[fits - 1]
    other[fits - 1] = (generation, step, branch, [not skip[0], *skip[1:]])
    with pytest.raises(ConsensusError, match=f"step {step}, branch {branch}, span 0: "):
        compare(one, other)


def test_each_decision_is_compared_once() -> None:
    found = DecisionLog(2)
    assert found.unverified() is None
    found.record(decision(0, 0, 0, [True, False]))
    first = found.unverified()
    assert first is not None and first[[0, 2, 3, 4, 5, 6]].tolist() == [1, 0, 0, 0, 0b01, -1]
    assert found.unverified() is None
    found.record(decision(0, 1, 0, [True, True]))
    second = found.unverified()
    assert second is not None and second[[0, 2, 3, 4, 5, 6]].tolist() == [1, 0, 1, 0, 0b11, -1]


def test_a_new_generation_forgets_entries_and_keeps_the_digest() -> None:
    found = log(steps(3, 4), 4)
    digest = found.hexdigest()
    found.begin_generation()
    assert (found.entries, found.unverified(), found.hexdigest()) == ([], None, digest)
    found.record(decision(3, 0, 0, flags(4)))
    assert (found.entries, found.hexdigest() != digest) == ([(3, 0, 0, 0)], True)


@pytest.mark.parametrize("change", ["generation", "step", "branch", "flags", "order"])
def test_the_digest_depends_on_every_part_of_every_decision(change: str) -> None:
    decisions = [(0, 0, 0, flags(3, 1)), (0, 1, 0, flags(3, 2))]
    others = {
        "generation": [(1, 0, 0, flags(3, 1)), decisions[1]],
        "step": [(0, 2, 0, flags(3, 1)), decisions[1]],
        "branch": [(0, 0, 1, flags(3, 1)), decisions[1]],
        "flags": [(0, 0, 0, flags(3)), decisions[1]],
        "order": decisions[::-1],
    }
    one, other = log(decisions, 3), log(others[change], 3)
    assert one.hexdigest() == log(decisions, 3).hexdigest() != other.hexdigest()
    assert one.bits(24) != other.bits(24)


@pytest.mark.parametrize("count", [1, 24, 30])
def test_bits_are_the_digests_first(count: int) -> None:
    found = log(steps(3, 4), 4)
    assert found.bits(count) == int(found.hexdigest(), 16) >> (256 - count)
