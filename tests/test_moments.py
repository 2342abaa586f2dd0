"""Moments: right sums, the same integers for every sharding, and no wrap, whatever comes in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from xfuser_fastcache.measurements.moments import (
    CHANGE,
    CHANGE_SQUARED,
    FRACTION,
    FRACTION_SQUARED,
    INITIAL_EXPONENT,
    LIMB_BITS,
    LOWER,
    MAX_TOKENS,
    NONFINITE,
    OVERFLOW,
    REFERENCE,
    SLOTS,
    TOKEN_BITS,
    TOKENS,
    Moments,
    Reference,
    joined,
    measure,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DIMS = (8, 31, 128, 1152, 3072)
BATCH, COUNT = 2, 37


def pair(dim: int, dtype: torch.dtype, rms: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(batch, tokens, dim)` now and at the anchor; tokens differ in size and in change."""
    generator = torch.Generator().manual_seed(dim)
    size = torch.logspace(-1, 0.5, COUNT)[:, None] * rms
    anchor = torch.randn(BATCH, COUNT, dim, generator=generator) * size
    change = torch.randn(BATCH, COUNT, dim, generator=generator) * size.flip(0) * 0.1
    return (anchor + change).to(dtype), anchor.to(dtype)


def moments(now: torch.Tensor, anchor: torch.Tensor | None, exponent: int) -> Moments:
    reference = None if anchor is None else Reference.of(anchor)
    return Moments.decode(measure(now, reference, exponent).tolist(), exponent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_sums_match_a_float64_reference(dim: int, dtype: torch.dtype) -> None:
    now, anchor = pair(dim, dtype)
    # The difference itself is taken in the model's dtype.
    change = (now - anchor).double().square().sum(-1)
    reference = anchor.double().square().sum(-1)
    found = moments(now, anchor, math.ceil(math.log2(reference.mean().item())))
    assert found.change == pytest.approx(change.sum().item(), rel=1e-5)
    assert found.change_squared == pytest.approx(change.square().sum().item(), rel=1e-4)
    assert found.reference == pytest.approx(reference.sum().item(), rel=1e-5)
    assert (found.tokens, found.nonfinite, found.overflow) == (BATCH * COUNT, 0, 0)


@pytest.mark.parametrize("exponent", [4, 9, 14])
def test_without_a_reference_the_change_is_zero_and_the_own_energy_is_the_reference(
    exponent: int,
) -> None:
    now, _ = pair(64, torch.float32)
    found = moments(now, None, exponent)
    assert (found.change, found.change_squared, found.tokens) == (0, 0, BATCH * COUNT)
    assert found.reference == pytest.approx(now.double().square().sum().item(), rel=1e-4)


SHARDINGS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "uneven": lambda x: list(x.split([1, 19, 17], dim=1)),
    "one token each": lambda x: list(x.split(1, dim=1)),
    "by batch item": lambda x: list(x.split(1, dim=0)),
    "an empty shard": lambda x: list(x.split([0, COUNT], dim=1)),
    "permuted": lambda x: [x[:, torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))]],
    "contiguous shards": lambda x: [part.contiguous() for part in x.split(5, dim=1)],
    "token-major": lambda x: [x.transpose(0, 1).contiguous().transpose(0, 1)],
    "channel-major": lambda x: [x.mT.contiguous().mT],
    "every other channel of a wider tensor": lambda x: [x.repeat_interleave(2, dim=-1)[..., ::2]],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_any_sharding_of_the_same_tokens_sums_to_the_same_integers(
    sharding: str, dim: int, dtype: torch.dtype
) -> None:
    now, anchor = pair(dim, dtype)
    whole = measure(now, Reference.of(anchor), 5)
    shards = zip(SHARDINGS[sharding](now), SHARDINGS[sharding](anchor), strict=True)
    parts = [measure(part, Reference.of(before), 5) for part, before in shards]
    assert torch.stack(parts).sum(0).tolist() == whole.tolist()


def test_a_change_of_one_token_changes_the_integers() -> None:
    now, anchor = pair(128, torch.float32)
    before = measure(now, Reference.of(anchor), 5)
    now[0, 3] *= 1.01
    after = measure(now, Reference.of(anchor), 5)
    assert joined(after.tolist(), CHANGE) != joined(before.tolist(), CHANGE)


@pytest.mark.parametrize(
    ("bad", "slot"),
    [
        (math.nan, NONFINITE),
        (math.inf, NONFINITE),
        (-math.inf, NONFINITE),
        (1e30, NONFINITE),
        (1e6, OVERFLOW),
    ],
)
@pytest.mark.parametrize("where", ["now", "anchor", "both"])
def test_tokens_that_cannot_be_measured_are_counted(bad: float, slot: int, where: str) -> None:
    now, anchor = pair(16, torch.float32)
    for tensor, name in ((now, "now"), (anchor, "anchor")):
        if where in (name, "both"):
            tensor[0, 3, 5] = tensor[1, 7, 0] = bad
    found = measure(now, Reference.of(anchor), 0)
    other = {NONFINITE: OVERFLOW, OVERFLOW: NONFINITE}[slot]
    assert (found[slot], found[other], found[TOKENS]) == (2, 0, BATCH * COUNT)
    assert (found >= 0).all()


def test_a_nan_adds_nothing_to_the_sums() -> None:
    now, anchor = pair(16, torch.float32)
    healthy = measure(now[:, 1:], Reference.of(anchor[:, 1:]), 0)
    now[:, 0] = anchor[:, 0] = math.nan
    found = measure(now, Reference.of(anchor), 0)
    assert found[:TOKENS].tolist() == healthy[:TOKENS].tolist()


@pytest.mark.parametrize("bad", [1e6, 1e7])
def test_clamped_tokens_add_up_without_wrap(bad: float) -> None:
    now, anchor = torch.full((1, 1000, 4), bad), torch.full((1, 1000, 4), -bad)
    found = measure(now, Reference.of(anchor), 0)
    sums = [joined(found.tolist(), sum_of) for sum_of in (CHANGE, CHANGE_SQUARED, REFERENCE)]
    assert sums == [1000 * 2**TOKEN_BITS] * 3


# The integers of measured tokens, before they are added: none, the least, all bits of both limbs,
# and the largest that is ever written.
NUMBERS = (0, 1, 2**LIMB_BITS - 1, 2**LIMB_BITS, 2**TOKEN_BITS - 1, 2**TOKEN_BITS)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_sums_of_2_to_the_40_tokens_fit_and_are_exact(number: int) -> None:
    """So many tokens cannot be held: their limbs are added by doubling, as int64 on the device."""
    slots = torch.zeros(SLOTS, dtype=torch.int64)
    slots[CHANGE], slots[CHANGE + LOWER] = number >> LIMB_BITS, number & (2**LIMB_BITS - 1)
    slots[TOKENS] = 1
    for _ in range(40):
        slots = slots + slots
        assert (slots >= 0).all()
    assert joined(slots.tolist(), CHANGE) == number * 2**40
    found = Moments.decode(slots.tolist(), FRACTION)
    assert (found.change, found.tokens, found.overflow) == (float(number * 2**40), 2**40, 0)
    assert MAX_TOKENS >= 2**40


def test_a_shard_adds_up_more_tokens_than_a_number_s_width_allows() -> None:
    """2**22 tokens of 2**42 are 2**64: the whole sum wraps, its limbs do not."""
    tokens = 2**22
    now = torch.full((1, 1, 1), 1e6).expand(1, tokens, 1)
    found = measure(now, Reference.of(torch.zeros(1, 1, 1).expand(1, tokens, 1)), 0).tolist()
    assert joined(found, CHANGE) == joined(found, CHANGE_SQUARED) == tokens * 2**TOKEN_BITS
    assert found[TOKENS] == found[OVERFLOW] == tokens


def test_the_tokens_of_a_720p_video_on_four_ranks_that_see_all_of_them_fit() -> None:
    """Wan: 21 x 90 x 160 latents, each measured by every rank of a plain group."""
    tokens = 21 * 90 * 160
    now, anchor = torch.full((1, tokens, 16), 0.5), torch.full((1, tokens, 16), 0.25)
    one = measure(now, Reference.of(anchor), 0)
    four = Moments.decode((one * 4).tolist(), 0)
    assert (four.tokens, four.overflow, four.nonfinite) == (4 * tokens, 0, 0)
    assert four.change == pytest.approx(4 * tokens * 16 * 0.25**2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_limbs_add_up_to_the_sum_of_whole_numbers_to_the_bit(dtype: torch.dtype) -> None:
    """What was summed in one number before: each token's, rounded by itself."""
    now, anchor = pair(64, dtype)
    found = measure(now, Reference.of(anchor), 5).tolist()
    for token_sum, x, bits, power in (
        (CHANGE, (now - anchor), FRACTION, 1),
        (REFERENCE, anchor, FRACTION, 1),
        (CHANGE_SQUARED, (now - anchor), FRACTION_SQUARED, 2),
    ):
        sizes = Reference.of(x).energy * 2.0**-5
        numbers = (sizes**power * 2.0**bits).round().to(torch.int64)
        assert joined(found, token_sum) == int(numbers.sum())


@pytest.mark.parametrize(("tokens", "overflow"), [(MAX_TOKENS, 0), (MAX_TOKENS + 3, 3)])
def test_more_tokens_than_fit_count_as_overflow(tokens: int, overflow: int) -> None:
    slots = [0] * SLOTS
    slots[TOKENS] = tokens
    assert Moments.decode(slots, 0).overflow == overflow


@pytest.mark.parametrize("dtype", DTYPES)
def test_flux_at_rms_300_fits_the_initial_scale(dtype: torch.dtype) -> None:
    now = (torch.randn(1, 64, 3072, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    found = moments(now, None, INITIAL_EXPONENT)
    assert (found.nonfinite, found.overflow) == (0, 0)
    assert found.reference == pytest.approx(now.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("rms", [1e-8, 1e-3, 1.0, 300.0, 1e4])
def test_the_scale_adapts_until_nothing_overflows_and_small_changes_are_seen(rms: float) -> None:
    now, anchor = pair(3072, torch.float32, rms)
    exponent = INITIAL_EXPONENT
    for _ in range(4):
        exponent = moments(now, anchor, exponent).next_exponent(exponent)
    found = moments(now, anchor, exponent)
    change = (now - anchor).double().square().sum(-1)
    assert (found.nonfinite, found.overflow) == (0, 0)
    assert found.change == pytest.approx(change.sum().item(), rel=1e-4)
    assert found.change_squared == pytest.approx(change.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("reference", "tokens", "overflow", "exponent"),
    [
        (640.0, 64, 0, 4),
        (16.0 * 64, 64, 0, 4),
        (0.25, 1, 0, -2),
        (0.0, 64, 0, 7 - 24),
        (0.0, 0, 0, 7),
        (640.0, 64, 1, 7 + 12),
    ],
)
def test_the_next_scale_is_the_power_of_two_above_the_mean_reference(
    reference: float, tokens: int, overflow: int, exponent: int
) -> None:
    found = Moments(0.0, 0.0, reference, tokens, nonfinite=0, overflow=overflow)
    assert found.next_exponent(7) == exponent


def test_a_broken_run_never_drives_the_scale_out_of_range() -> None:
    now, anchor = torch.full((1, 4, 8), math.inf), torch.full((1, 4, 8), -math.inf)
    exponent = INITIAL_EXPONENT
    for _ in range(200):
        exponent = moments(now, anchor, exponent).next_exponent(exponent)
    assert moments(now, anchor, exponent).nonfinite == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_measuring_leaves_its_inputs_alone(dtype: torch.dtype) -> None:
    now, anchor = pair(64, dtype)
    reference = Reference.of(anchor)
    copies = now.clone(), anchor.clone(), reference.energy.clone()
    measure(now, reference, 3)
    assert all(map(torch.equal, (now, anchor, reference.energy), copies))
    assert reference.energy.dtype == torch.float32


def test_one_outlier_token_does_not_overflow() -> None:
    """Trained transformers have tokens of many times the others' norm; they move too."""
    _, anchor = pair(3072, torch.float32)
    anchor[0, 0] *= 40
    now = anchor.clone()
    now[0, 0] *= 1.3
    exponent = moments(now, anchor, INITIAL_EXPONENT).next_exponent(INITIAL_EXPONENT)
    found = moments(now, anchor, exponent)
    assert found.overflow == 0
    assert found.change == pytest.approx(0.09 * anchor[0, 0].square().sum().item(), rel=1e-4)
