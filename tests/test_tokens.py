"""Token plans as tensor functions: the motion/static split and merging, on one process."""

from __future__ import annotations

import math
import time

import pytest
import torch

from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.tokens.base import Chain, Narrowing, run_narrowed
from xfuser_fastcache.tokens.merging import WINDOW, Clusters, importance
from xfuser_fastcache.tokens.saliency import (
    BUCKETS,
    LADDER,
    MotionStatic,
    Split,
    bucket,
    counts_above,
    token_saliency,
)

# One token, less than a window, whole windows, ragged ones.
SIZES = (1, 2, 5, WINDOW, WINDOW + 1, 4 * WINDOW, 77)
DIM = 12


def tokens(count: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed))


def clusters(x: torch.Tensor, ratio: float = 0.5, same_rows: bool = False, k: int = 5) -> Clusters:
    return Clusters(x, importance(x, None, k, 1.0), ratio, same_rows)


# ---- the split --------------------------------------------------------------------------------


def test_saliency_is_the_squared_change_over_the_tokens_own_energy() -> None:
    before = tokens(4)
    factors = torch.tensor([1.0, 1.5, 2.0, 0.0])[:, None]
    now = before * factors
    found = token_saliency(now, Reference.of(before))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.25, 1.0, 1.0]] * 2))


def test_saliency_of_nothing_is_no_motion_and_of_what_is_not_finite_is_endless() -> None:
    before = torch.zeros(1, 3, DIM)
    now = torch.zeros(1, 3, DIM)
    now[0, 1], now[0, 2, 4] = math.inf, math.nan
    assert token_saliency(now, Reference.of(before)).tolist() == [[0.0, math.inf, math.inf]]


def test_counts_are_of_the_item_in_which_most_tokens_move() -> None:
    saliency = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 9.0]])
    edges = torch.tensor([0.0, 0.1, 0.25, 1.0])
    assert counts_above(saliency, edges).tolist() == [4, 3, 1, 1]


@pytest.mark.parametrize("tokens_held", [1, 2, 5, 8, 63, 64, 4096])
def test_buckets_hold_what_moves_in_at_most_eight_sizes(tokens_held: int) -> None:
    sizes = [bucket(moving, tokens_held) for moving in range(tokens_held + 3)]
    assert all(min(m, tokens_held) <= size <= tokens_held for m, size in enumerate(sizes))
    assert sizes == sorted(sizes) and sizes[0] >= 1 and sizes[tokens_held] == tokens_held
    assert len(set(sizes)) == min(BUCKETS, tokens_held)


def test_the_rank_that_moves_most_sets_the_count() -> None:
    assert MotionStatic(0.1).moving([[3], [17], [0]], time=0.5) == 17


def test_an_adaptive_threshold_follows_the_largest_saliency_and_time() -> None:
    saliency = torch.tensor([[0.01, 0.1, 0.4, 4.0]])
    edges = torch.tensor(LADDER)
    counts = [counts_above(saliency, edges).tolist(), counts_above(saliency / 100, edges).tolist()]
    # Half of the largest saliency, which is 4 to the ladder's resolution of sqrt(2).
    assert MotionStatic(0.0, [0.0, 0.5, 0.0, 0.0]).moving(counts, time=1.0) == 1
    assert MotionStatic(0.0, [0.0, 0.05, 0.0, 0.0]).moving(counts, time=1.0) == 2
    timed = MotionStatic(0.0, [0.005, 0.0, 0.25, 0.25])
    assert [timed.moving(counts, time=t) for t in (0.0, 0.5, 1.0)] == [4, 2, 1]
    assert MotionStatic(0.0, [-1.0, 0.0, 0.0, 0.0]).moving(counts, time=1.0) == 4


def test_an_adaptive_threshold_never_takes_a_moving_token_for_a_static_one() -> None:
    saliency = torch.rand(1, 500, generator=torch.Generator().manual_seed(1)) ** 4
    counts = [counts_above(saliency, torch.tensor(LADDER)).tolist()]
    for tau in (0.0, 1e-5, 0.003, 0.1, 0.11, 0.9):
        moving = MotionStatic(0.0, [tau, 0.0, 0.0, 0.0]).moving(counts, time=1.0)
        assert int((saliency >= tau).sum()) <= moving
        assert moving <= int((saliency >= tau / 2**0.5 - 1e-6).sum())


def test_each_item_takes_its_own_most_salient_tokens_in_order() -> None:
    saliency = torch.tensor([[0.0, 5.0, 1.0, 3.0, 2.0], [9.0, 8.0, 0.0, 0.0, 7.0]])
    split = Split(saliency, 3)
    assert split.rows.tolist() == [[1, 3, 4], [0, 1, 4]]
    x = tokens(5)
    few = split.narrow(x)
    assert torch.equal(few[0], x[0, [1, 3, 4]]) and torch.equal(few[1], x[1, [0, 1, 4]])
    every = split.widen(x, few, few + 1)
    moved = torch.zeros(2, 5)
    moved[0, [1, 3, 4]] = moved[1, [0, 1, 4]] = 1
    assert torch.equal(every, torch.where(moved[..., None] > 0, x + 1, x))


def test_a_mixture_is_new_where_computed_and_old_where_static() -> None:
    now, before = tokens(4, seed=1), tokens(4, seed=2)
    mixed = Split(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), 2).mixed(now, before)
    for at, source in enumerate((before, now, before, now)):
        assert torch.equal(mixed[:, at], source[:, at])


# ---- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("same_rows", [False, True])
def test_merging_then_unpooling_what_did_not_change_returns_the_input_exactly(
    size: int, same_rows: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(size).to(dtype)
        merged = clusters(x, same_rows=same_rows)
        few = merged.narrow(x)
        assert torch.equal(merged.widen(x, few, few), x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_number_of_clusters_depends_on_the_number_of_tokens_alone(
    size: int, ratio: float
) -> None:
    whole, rest = divmod(size, WINDOW)
    wanted = whole * math.ceil(ratio * WINDOW) + math.ceil(ratio * rest)
    for x in (tokens(size), torch.zeros(2, size, DIM), tokens(size, seed=4) * 1e4):
        merged = clusters(x, ratio)
        assert merged.narrow(x).shape == (2, wanted, DIM)
        assert merged.rows.shape == (2, wanted)
        rows = merged.rows.tolist()
        assert all(row == sorted(set(row)) and row[-1] < size for row in rows)


@pytest.mark.parametrize("size", SIZES)
def test_clusters_are_what_the_definition_says_token_by_token(size: int) -> None:
    x = tokens(size)
    score = importance(x, torch.rand(2, size), 5, 1.0)
    merged = Clusters(x, score, 0.4)
    few, rows = merged.narrow(x), merged.rows
    for item in range(2):
        members: dict[int, list[int]] = {}
        for token in range(size):
            window = [c for c in rows[item].tolist() if c // WINDOW == token // WINDOW]
            gaps = [float((x[item, token] - x[item, c]).square().sum()) for c in window]
            members.setdefault(window[gaps.index(min(gaps))], []).append(token)
        assert sorted(members) == rows[item].tolist()
        for at, centre in enumerate(rows[item].tolist()):
            weights = score[item, members[centre]]
            mean = (weights[:, None] * x[item, members[centre]]).sum(0) / weights.sum()
            torch.testing.assert_close(few[item, at], mean, rtol=1e-4, atol=1e-5)
    gained = merged.widen(x, few, few + torch.arange(few.shape[1])[:, None])
    for item in range(2):
        for at, centre in enumerate(rows[item].tolist()):
            assert torch.allclose(gained[item, centre] - x[item, centre], torch.tensor(float(at)))


def test_tokens_that_are_all_alike_are_merged_into_tokens_like_them() -> None:
    x = torch.full((1, 21, DIM), 3.0)
    few = clusters(x).narrow(x)
    torch.testing.assert_close(few, torch.full_like(few, 3.0))


def test_centres_are_the_most_important_tokens_of_each_window() -> None:
    x = tokens(WINDOW + 4, batch=1)
    score = torch.rand(1, WINDOW + 4, generator=torch.Generator().manual_seed(3)) + 0.1
    rows = Clusters(x, score, 0.25).rows[0].tolist()
    best = score[0, :WINDOW].topk(4).indices.sort().values.tolist()
    assert rows == [*best, WINDOW + int(score[0, WINDOW:].argmax())]


def brute_importance(x: torch.Tensor, temporal: torch.Tensor, k: int, weight: float) -> list[float]:
    energy = float(x.square().sum(-1).mean())
    found = []
    for i in range(len(x)):
        start = i // WINDOW * WINDOW
        window = [j for j in range(start, min(start + WINDOW, len(x))) if j != i]
        gaps = sorted(float((x[i] - x[j]).square().sum()) for j in window)[:k]
        density = math.exp(-sum(gaps) / len(gaps) / energy) if gaps else 1.0
        found.append(density * (1 + weight * float(temporal[i])))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 5, 100])
def test_importance_is_what_the_definition_says_also_with_more_neighbours_than_there_are(
    size: int, k: int
) -> None:
    x, temporal = tokens(size), torch.rand(2, size)
    found = importance(x, temporal, k, 2.0)
    for item in range(2):
        wanted = torch.tensor(brute_importance(x[item], temporal[item], k, 2.0))
        torch.testing.assert_close(found[item], wanted, rtol=1e-4, atol=1e-6)


def test_no_neighbour_is_of_another_item() -> None:
    x = tokens(40, batch=3)
    alone = [importance(item[None], None, 5, 1.0)[0] for item in x]
    together = importance(x, None, 5, 1.0)
    assert torch.allclose(together, torch.stack(alone), rtol=1e-6)
    changed = x.clone()
    changed[1] = 1000 * x[0]
    merged, after = clusters(x), clusters(changed)
    assert torch.equal(merged.narrow(x)[0], after.narrow(changed)[0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_importance_tells_tokens_apart_at_any_scale(scale: float) -> None:
    x = scale * tokens(64, batch=1)
    found = importance(x, None, 5, 1.0)
    assert torch.allclose(found, importance(x / scale, None, 5, 1.0), rtol=1e-3)
    assert found.min() > 1e-3 and found.max() / found.min() > 1.2


def test_items_share_their_centres_where_they_share_their_tables() -> None:
    x = tokens(40)
    assert clusters(x).rows.shape[0] == 2
    assert clusters(x, same_rows=True).rows.shape[0] == 1


def test_memory_and_time_are_linear_in_the_number_of_tokens() -> None:
    def largest_and_seconds(size: int) -> tuple[int, float]:
        x = torch.randn(1, size, 8)
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                held = out if isinstance(out, (tuple, list)) else (out,)
                sizes.extend(t.numel() for t in held if isinstance(t, torch.Tensor))
                return out

        started = time.perf_counter()
        with Watch():
            merged = clusters(x)
            merged.widen(x, merged.narrow(x), merged.narrow(x))
        return max(sizes), time.perf_counter() - started

    small, calls = largest_and_seconds(1024)
    large, _ = largest_and_seconds(8192)
    assert large == 8 * small <= 8192 * WINDOW * WINDOW
    assert calls < 5.0


# ---- together, and in a block --------------------------------------------------------------------

JOINT = BlockContract(
    parameters=(HIDDEN, ENCODER, "tables"), returns=(ENCODER, HIDDEN), tables=("tables",)
)


def both(x: torch.Tensor) -> Chain:
    split = Split(torch.rand(1, x.shape[1], generator=torch.Generator().manual_seed(8)), 20)
    few = split.narrow(x)
    first = clusters(few, same_rows=True)
    second = clusters(first.narrow(few), same_rows=True)
    return Chain((split, first, second))


def test_a_chain_of_narrowings_ends_where_its_links_lead() -> None:
    x = tokens(40)
    chain = both(x)
    split, first, second = chain.links
    assert chain.rows.tolist() == split.rows[:, first.rows[0]][:, second.rows[0]].tolist()
    few = chain.narrow(x)
    assert few.shape == (2, 5, DIM)
    assert torch.equal(chain.widen(x, few, few), x)
    gained = chain.widen(x, few, few + 1) - x
    moved = torch.zeros(40).index_fill(0, split.rows[0], 1.0)[None, :, None]
    torch.testing.assert_close(gained, moved.expand_as(x))


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("attends_to_few", [True, False])
def test_a_block_gets_few_tokens_with_their_rows_and_all_text(
    positional: bool, attends_to_few: bool
) -> None:
    x, text = tokens(40), tokens(3, seed=5)
    table = torch.arange(43.0)
    narrowing: Narrowing = both(x)
    seen = {}

    def block(hidden_states, encoder_hidden_states, tables):  # type: ignore[no-untyped-def]
        seen.update(image=hidden_states, text=encoder_hidden_states, tables=tables)
        return encoder_hidden_states + 2, hidden_states + 1

    given = {HIDDEN: x, ENCODER: text, "tables": (table, (2 * table,))}
    args, kwargs = (tuple(given.values()), {}) if positional else ((), given)
    out_text, out = run_narrowed(narrowing, JOINT, block, args, kwargs, attends_to_few)
    assert torch.equal(seen["image"], narrowing.narrow(x)) and torch.equal(seen["text"], text)
    rows = [0, 1, 2, *(3 + narrowing.rows[0]).tolist()] if attends_to_few else list(range(43))
    assert seen["tables"][0].tolist() == rows
    assert seen["tables"][1][0].tolist() == [2 * row for row in rows]
    assert torch.equal(out_text, text + 2) and out.shape == x.shape
    assert given["tables"][0] is table  # type: ignore[index]
