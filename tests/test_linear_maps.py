"""Linear maps: their arithmetic, their file, how they are fitted and chosen, what they forecast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps, bucket_of, online_slope
from xfuser_fastcache.calibration import ridge as ridge_module
from xfuser_fastcache.calibration.maps import Choice, choose, gap_edges
from xfuser_fastcache.calibration.ridge import FORMS, Form, RidgeSums, error, fit, pooled
from xfuser_fastcache.forecasters.base import Forecaster, LinearMapForecaster
from xfuser_fastcache.forecasters.linear import LinearForecaster
from xfuser_fastcache.forecasters.linear_taylor import LinearTaylorForecaster
from xfuser_fastcache.measurements.moments import Reference
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.state.local import Anchor, Memory

D = 6
EVERY_FORM = {
    "diagonal": ("diagonal",),
    "diagonal with bias": ("diagonal", "bias"),
    "low rank": ("diagonal", "u", "v", "bias"),
    "low rank alone": ("u", "v"),
    "full": ("full", "bias"),
    "bias": ("bias",),
}
every_form = pytest.mark.parametrize("names", EVERY_FORM.values(), ids=EVERY_FORM)
linear_forecasters = pytest.mark.parametrize("make", [LinearForecaster, LinearTaylorForecaster])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_map(names: tuple[str, ...], rank: int = 2, seed: int = 0, dim: int = D) -> LinearMap:
    shapes = {"diagonal": (dim,), "u": (dim, rank), "v": (dim, rank), "full": (dim, dim)}
    shapes["bias"] = (dim,)
    return LinearMap(**{n: random(*shapes[n], seed=seed + i) for i, n in enumerate(names)})


def dense(linear_map: LinearMap) -> torch.Tensor:
    """The map's slope as one matrix, built from its tensors without its own arithmetic."""
    held = linear_map.tensors()
    matrix = torch.zeros(linear_map.dim, linear_map.dim, dtype=torch.float64)
    if "diagonal" in held:
        matrix = matrix + torch.diag(held["diagonal"].double())
    if "u" in held:
        matrix = matrix + torch.einsum("ir,jr->ij", held["u"].double(), held["v"].double())
    return matrix + held.get("full", torch.zeros(())).double()


def expected_change(linear_map: LinearMap, dx: torch.Tensor) -> torch.Tensor:
    bias = linear_map.tensors().get("bias", torch.zeros(()))
    return torch.einsum("ij,...j->...i", dense(linear_map), dx) + bias.double()


# ---- the map ----------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D)])
def test_change_is_the_equation(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    fitted, dx = some_map(names), random(*shape, seed=9)
    torch.testing.assert_close(fitted.change(dx), expected_change(fitted, dx))


def test_rank_zero_is_the_diagonal_alone() -> None:
    fitted, dx = some_map(("diagonal", "u", "v"), rank=0), random(3, D, seed=9)
    torch.testing.assert_close(fitted.change(dx), dx * fitted.diagonal)
    assert fitted.multiply_adds_per_token == D


@pytest.mark.parametrize(
    ("names", "cost", "numbers"),
    [
        (("diagonal",), D, D),
        (("diagonal", "u", "v", "bias"), D + 2 * D * 2, 2 * D + 2 * D * 2),
        (("full", "bias"), D * D, D * D + D),
        (("bias",), 0, D),
    ],
)
def test_cost_and_bytes(names: tuple[str, ...], cost: int, numbers: int) -> None:
    fitted = some_map(names)
    assert (fitted.multiply_adds_per_token, fitted.nbytes(), fitted.dim) == (cost, 8 * numbers, D)
    fitted.to(torch.bfloat16, "cpu")
    assert fitted.nbytes() == (8 + 2) * numbers, "a kept copy counts too"


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_change_keeps_the_dtype_of_the_input(names: tuple[str, ...], dtype: torch.dtype) -> None:
    fitted, dx = some_map(names), random(2, 3, D, seed=9).to(dtype)
    found = fitted.change(dx)
    assert (found.dtype, found.shape) == (dtype, dx.shape)
    wanted = expected_change(fitted, dx.double())
    # Each product and sum rounds at the scale of what is added up.
    scale = dense(fitted).abs().sum() * dx.double().abs().amax() + 1
    assert (found.double() - wanted).abs().amax() <= 2 * torch.finfo(dtype).eps * scale


def test_a_map_is_cast_once_for_each_dtype() -> None:
    fitted = some_map(("full", "bias"))
    assert fitted.to(torch.float64, "cpu") is fitted
    cast = fitted.to(torch.float32, "cpu")
    assert cast.full is not None and cast.full.dtype == torch.float32
    assert fitted.to(torch.float32, torch.device("cpu")) is cast
    assert fitted.to(torch.bfloat16, "cpu") is not cast


def test_a_map_in_training_is_cast_anew_and_gets_gradients() -> None:
    slope = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    tuned, dx = LinearMap(diagonal=slope), random(3, D).float()
    optimizer = torch.optim.SGD([slope], lr=1.0)
    for steps in (0, 1, 2):
        wanted = -steps * dx.sum(0)
        found = tuned.change(dx)
        torch.testing.assert_close(found, dx * wanted)
        optimizer.zero_grad()
        found.sum().backward()
        optimizer.step()


@every_form
def test_a_map_survives_its_file_to_the_bit(names: tuple[str, ...], tmp_path: Path) -> None:
    one, ten = some_map(names), some_map(("diagonal",), seed=40)
    path = tmp_path / "maps.safetensors"
    save_file(one.to_tensors("span.1.image") | ten.to_tensors("span.10.image"), path)
    flat = load_file(path)
    for prefix, wrote in (("span.1.image", one), ("span.10.image", ten)):
        read = LinearMap.from_tensors(flat, prefix)
        assert read is not None and read.tensors().keys() == wrote.tensors().keys()
        for name, tensor in wrote.tensors().items():
            assert torch.equal(read.tensors()[name], tensor)
    assert LinearMap.from_tensors(flat, "span.2.image") is None
    assert LinearMap.from_tensors(flat, "span.1.im") is None


vector, square = torch.zeros(4), torch.zeros(4, 4)
BROKEN = {
    "unknown key": ({"diagonal": vector, "slope": vector}, ["s.slope", "(4,)", "diagonal, u, v"]),
    "nested key": ({"u.weight": square}, ["s.u.weight", "(4, 4)", "unknown"]),
    "bias of another width": (
        {"diagonal": vector, "bias": torch.zeros(3)},
        ["s.bias", "(3,)", "(D)", "D = 4"],
    ),
    "u of another width": (
        {"diagonal": vector, "u": torch.zeros(5, 2), "v": torch.zeros(5, 2)},
        ["s.u", "(5, 2)", "(D, r)", "D = 4"],
    ),
    "two ranks": ({"u": torch.zeros(4, 2), "v": torch.zeros(4, 3)}, ["s.v", "(4, 3)", "r = 2"]),
    "rank above D": ({"u": torch.zeros(4, 5), "v": torch.zeros(4, 5)}, ["s.u", "(4, 5)", "r <= D"]),
    "full not square": ({"full": torch.zeros(4, 3)}, ["s.full", "(4, 3)", "(D, D)"]),
    "diagonal as a matrix": ({"diagonal": square}, ["s.diagonal", "(4, 4)", "allowed: (D)"]),
    "u without v": ({"u": square}, ["s.u", "without v"]),
    "v without u": ({"v": square}, ["s.v", "without u"]),
    "full and diagonal": ({"full": square, "diagonal": vector}, ["s.full", "['diagonal']"]),
    "integers": ({"diagonal": vector.int()}, ["s.diagonal", "torch.int32", "floating-point"]),
    "two dtypes": (
        {"diagonal": vector, "bias": vector.half()},
        ["s.bias", "torch.float16", "torch.float32"],
    ),
    "two devices": ({"diagonal": vector, "bias": vector.to("meta")}, ["s.bias", "meta", "cpu"]),
    "not a number": ({"diagonal": vector + math.nan}, ["s.diagonal", "(4,)", "finite"]),
    "infinite": ({"full": square, "bias": vector + math.inf}, ["s.bias", "(4,)", "finite"]),
}


@pytest.mark.parametrize(("tensors", "words"), BROKEN.values(), ids=BROKEN)
def test_from_tensors_refuses(tensors: dict[str, torch.Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        LinearMap.from_tensors({f"s.{name}": t for name, t in tensors.items()}, "s")
    message = str(caught.value)
    assert message.startswith(words[0]), message
    assert all(word in message for word in words), message


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="for no map, use None"):
        LinearMap()


# ---- the maps of a span -----------------------------------------------------------------------


def test_buckets_are_open_below_and_closed_above() -> None:
    near, far, words = (some_map(("diagonal",), seed=i) for i in range(3))
    maps = SpanMaps((0.1, 0.3), image=(near, far), text=(None, words))
    picked = {gap: maps.at(gap) for gap in (0.0, 1e-9, 0.1, 0.100001, 0.3, 0.300001)}
    assert list(picked.values()) == [
        (None, None),
        (near, None),
        (near, None),
        (far, words),
        (far, words),
        (None, None),
    ]
    assert maps.nbytes() == 3 * D * 8


def test_tokens_of_several_gaps_each_get_the_change_of_their_own() -> None:
    """What each token gets is what `at` gives for its gap; no text is corrected."""
    near, far = (some_map(("full", "bias"), seed=i) for i in range(2))
    maps = SpanMaps((0.125, 0.25, 0.5), image=(near, None, far), text=(near, near, near))
    gaps = torch.tensor([[0.0, 0.0625, 0.125, 0.1875], [0.3125, 0.5, 0.5625, 0.125]])[..., None]
    dx = random(2, 4, D, seed=9)
    found = maps.change_of_each(dx, gaps)
    for token in ((i, j) for i in range(2) for j in range(4)):
        used, _ = maps.at(float(gaps[token]))
        wanted = torch.zeros(D) if used is None else used.change(dx[token])
        torch.testing.assert_close(found[token], wanted.to(dx.dtype))
    assert maps.multiply_adds_of_each(Streams(dx)) == 2 * D * D
    assert maps.multiply_adds_of_each(Streams(dx, dx[:, :1])) == 2 * D * D * 4 / 5


@pytest.mark.parametrize("edges", [(0.2, 0.1), (0.1, 0.1), (0.0, 0.1), (math.nan,), (math.inf,)])
def test_edges_that_do_not_ascend_are_refused(edges: tuple[float, ...]) -> None:
    none = (None,) * len(edges)
    with pytest.raises(ValueError, match="edges are .*allowed: finite, ascending, above 0"):
        SpanMaps(edges, none, none)


@pytest.mark.parametrize("stream", ["image", "text"])
def test_maps_that_are_not_one_an_edge_are_refused(stream: str) -> None:
    maps = {"image": (None, None), "text": (None, None)} | {stream: (None,)}
    with pytest.raises(ValueError, match=f"{stream} holds 1 maps; allowed: 2"):
        SpanMaps((0.1, 0.2), **maps)


def test_gap_edges_lie_between_gaps_and_share_them_out() -> None:
    levels = [1.0, 0.98, 0.94, 0.87, 0.75, 0.55, 0.3, 0.0]
    gaps = sorted(a - b for lag in (1, 2, 3) for a, b in zip(levels, levels[lag:], strict=False))
    edges = gap_edges(levels, max_lag=3, buckets=3)
    held = [sum(bucket_of(edges, gap) == bucket for gap in gaps) for bucket in range(3)]
    assert held == [6, 6, 6]
    assert min(abs(gap - edge) for gap in gaps for edge in edges) > 1e-3


def test_gap_edges_of_even_steps_are_lags_and_levels_may_repeat() -> None:
    levels = [1 - 0.1 * step for step in range(10)]
    edges = gap_edges(levels, max_lag=4, buckets=4)
    assert edges == pytest.approx((0.15, 0.25, 0.35, 0.404))
    for lag in (1, 2, 3, 4):
        gaps = [a - b for a, b in zip(levels, levels[lag:], strict=False)]
        assert {bucket_of(edges, gap) for gap in gaps} == {lag - 1}
    assert gap_edges([1.0, 1.0, 0.5, 0.5], max_lag=3, buckets=2) == pytest.approx((0.505,))


@pytest.mark.parametrize(
    ("levels", "lag", "buckets"), [([1], 1, 1), ([1, 1], 1, 1), ([1, 0], 0, 1), ([1, 0], 1, 0)]
)
def test_gap_edges_refuses_where_there_is_no_gap(
    levels: list[float], lag: int, buckets: int
) -> None:
    with pytest.raises(ValueError, match="no gap to part"):
        gap_edges(levels, lag, buckets)


# ---- sums -------------------------------------------------------------------------------------


def sums_of(dx: torch.Tensor, dr: torch.Tensor, **options: torch.dtype) -> RidgeSums:
    sums = RidgeSums(dx.shape[-1], **options)
    sums.add(dx, dr)
    return sums


def assert_same_sums(found: RidgeSums, wanted: RidgeSums) -> None:
    assert found.tokens == wanted.tokens
    for name in ("mean_dx", "mean_dr", "dx_dx", "dx_dr", "dr_dr"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


def test_sums_are_what_they_say() -> None:
    x, r = random(50, D) + 3, random(50, D, seed=1) - 2
    found = sums_of(x, r)
    torch.testing.assert_close(found.mean_dx, x.mean(0))
    torch.testing.assert_close(found.mean_dr, r.mean(0))
    torch.testing.assert_close(found.dx_dx, 49 * torch.cov(x.T))
    torch.testing.assert_close(found.dx_dr, 49 * torch.cov(torch.cat((x, r), 1).T)[:D, D:])
    torch.testing.assert_close(found.dr_dr, (r - r.mean(0)).square().sum())


def test_adding_and_merging_in_parts_is_adding_at_once() -> None:
    x, r = random(2, 30, D) + 5, random(2, 30, D, seed=1) - 4
    at_once = sums_of(x, r)
    parts = [sums_of(x[:, a:b], r[:, a:b]) for a, b in ((0, 1), (1, 20), (20, 30))]
    before = [pooled([part]) for part in parts]
    assert_same_sums(pooled([*parts, RidgeSums(D)]), at_once)
    for part, old in zip(parts, before, strict=True):
        assert_same_sums(part, old)
    grown = RidgeSums(D)
    for row in range(2):
        grown.add(x[row], r[row])
    grown.add(x[:, :0], r[:, :0])
    assert_same_sums(grown, at_once)


def test_memory_does_not_grow_with_tokens() -> None:
    sums = RidgeSums(D)
    for seed in range(3):
        sums.add(random(100, D, seed=seed), random(100, D, seed=seed))
        assert sums.nbytes() == 8 * (2 * D * D + 2 * D + 1)
    assert sums_of(random(9, D), random(9, D), dtype=torch.float32).nbytes() == sums.nbytes() / 2


def test_float32_sums_lose_no_digits_to_a_large_mean() -> None:
    slope, x = torch.linspace(-1, 1, D, dtype=torch.float64), random(4000, D)
    x, r = x + 300, slope * x + 200
    found = RidgeSums(D, dtype=torch.float32)
    for part in range(0, 4000, 500):
        found.add(x[part : part + 500], r[part : part + 500])
    torch.testing.assert_close(fit(found, "diagonal").diagonal, slope.float(), atol=1e-4, rtol=0.0)


def test_what_cannot_be_counted_in_is_refused_and_changes_nothing() -> None:
    sums, good = sums_of(random(9, D), random(9, D)), random(4, D)
    before = pooled([sums])
    for bad in (math.nan, math.inf):
        broken = good.clone()
        broken[1, 2] = bad
        for pair in ((good, broken), (broken, good)):
            with pytest.raises(ValueError, match="not finite"):
                sums.add(*pair)
    for dx, dr in ((good, good[:3]), (good[:, :3], good[:, :3])):
        with pytest.raises(ValueError, match=r"dx has shape .*dr \(.*ends in 6"):
            sums.add(dx, dr)
    with pytest.raises(ValueError, match="dim 3; allowed: 6"):
        sums.merge(RidgeSums(3))
    assert_same_sums(sums, before)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_error_from_sums_is_the_error_on_tokens(names: tuple[str, ...], dtype: torch.dtype) -> None:
    x, r = random(2, 40, D) + 1, random(2, 40, D, seed=1) - 2
    fitted = some_map(names, seed=5).to(dtype, "cpu")
    parts = [sums_of(x[i], r[i]) for i in range(2)]
    direct = (expected_change(fitted, x) - r).square().mean().item()
    assert error(pooled(parts), fitted) == pytest.approx(direct, rel=1e-12)
    assert error(pooled(parts), None) == pytest.approx(r.square().mean().item(), rel=1e-12)
    # Judging a map leaves no copy behind.
    assert fitted.nbytes() == sum(t.nbytes for t in fitted.tensors().values())


def test_error_needs_tokens() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        error(RidgeSums(D), None)


# ---- the fit ----------------------------------------------------------------------------------

RANK = 2
TRUE_MAPS: dict[Form, LinearMap] = {
    "diagonal": some_map(("diagonal", "bias"), seed=20),
    "low_rank": some_map(("diagonal", "u", "v", "bias"), rank=RANK, seed=30),
    "full": some_map(("full", "bias"), seed=40),
}


def correlated(tokens: int, seed: int = 0, dim: int = D) -> torch.Tensor:
    """Inputs with correlated channels of unlike scales, and means that are not 0."""
    return random(tokens, dim, seed=seed) @ random(dim, dim, seed=77) + 2


def rank_of(form: Form) -> int:
    return RANK if form == "low_rank" else 0


@pytest.mark.parametrize("form", FORMS)
def test_a_known_map_is_recovered_from_noisy_data(form: Form) -> None:
    # Only where r is small beside D is a low rank told from a diagonal.
    dim = 16 if form == "low_rank" else D
    true = some_map(tuple(TRUE_MAPS[form].tensors()), dim=dim, seed=20)
    x = random(20000, dim) + 2 if form == "low_rank" else correlated(20000)
    r = true.change(x) + 0.3 * random(20000, dim, seed=1)
    found = fit(sums_of(x, r), form, rank_of(form), ridge=1e-7)
    assert found.tensors().keys() == true.tensors().keys()
    torch.testing.assert_close(dense(found), dense(true), atol=0.02, rtol=0)
    wanted = true.change(x.mean(0))
    torch.testing.assert_close(expected_change(found, x.mean(0)), wanted, atol=0.02, rtol=0)
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors().values())


@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize("ridge", [0.0, 1e-10])
def test_an_affine_map_without_noise_is_recovered_exactly(form: Form, ridge: float) -> None:
    true, x = TRUE_MAPS[form], correlated(300)
    found = fit(sums_of(x, true.change(x)), form, ridge=ridge)
    for name, tensor in true.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor.float())


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0, 30.0])
def test_full_and_diagonal_minimise_the_ridge_objective(ridge: float) -> None:
    x, n = correlated(40), 40
    r = TRUE_MAPS["full"].change(x) + random(n, D, seed=1)
    centred, mean = x - x.mean(0), x.mean(0)
    penalty = ridge * centred.square().mean()
    # Ridge as least squares with pseudo-observations of 0; the constant is one more regressor.
    rows = torch.cat((centred, (n * penalty).sqrt() * torch.eye(D)))
    targets = torch.cat((r - r.mean(0), torch.zeros(D, D)))
    full = torch.linalg.lstsq(rows, targets).solution.T
    single = torch.stack(
        [torch.linalg.lstsq(rows[:, d : d + 1], targets[:, d : d + 1]).solution for d in range(D)]
    ).flatten()
    constant = torch.linalg.lstsq(
        torch.cat((torch.ones(n, 1), torch.full((1, 1), math.sqrt(n * ridge)))).double(),
        torch.cat((r, torch.zeros(1, D))),
    ).solution[0]
    sums = sums_of(x, r)
    for form, name, wanted in (("full", "full", full), ("diagonal", "diagonal", single)):
        found = fit(sums, form, ridge=ridge)
        torch.testing.assert_close(found.tensors()[name], wanted.float(), atol=1e-5, rtol=1e-5)
        at_mean = expected_change(found, mean)
        torch.testing.assert_close(at_mean, constant, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_more_ridge_brings_the_map_nearer_to_none(form: Form) -> None:
    x = correlated(200)
    sums = sums_of(x, TRUE_MAPS["full"].change(x))
    ridges = (0.0, 0.01, 0.1, 1.0, 10.0, 1e4, math.inf)
    fitted = [fit(sums, form, rank_of(form), ridge) for ridge in ridges]
    norms = [dense(found).norm().item() for found in fitted]
    assert all(strong < weak for weak, strong in itertools.pairwise(norms)), norms
    assert not fitted[-1].change(x.float()).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [0.0, 1.0, math.inf])
def test_without_data_the_map_is_zero(form: Form, ridge: float) -> None:
    still = torch.zeros(5, D)
    for sums in (RidgeSums(D), sums_of(still, still)):
        assert not fit(sums, form, rank_of(form), ridge).change(random(3, D)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_directions_that_rest_get_no_slope(form: Form, dtype: torch.dtype) -> None:
    true, x = TRUE_MAPS["full"], correlated(200)
    x[:, 3] = 7.0
    x[:, 4] = 0.3 * x[:, 5] + 0.7 * x[:, 0]
    found = fit(sums_of(x, true.change(x), dtype=dtype), form, rank_of(form), ridge=0.0)
    rests = torch.zeros(2, D, dtype=torch.float64)
    rests[0, 3] = 1.0
    rests[1, 4], rests[1, 5], rests[1, 0] = 1.0, -0.3, -0.7
    moved = dense(found) @ rests.T
    torch.testing.assert_close(moved[:, 0], torch.zeros(D).double(), atol=1e-4, rtol=0)
    if form == "full":
        torch.testing.assert_close(moved[:, 1], torch.zeros(D).double(), atol=1e-4, rtol=0)
        assert error(sums_of(x, true.change(x)), found) < 1e-6


def test_low_rank_of_rank_zero_is_the_diagonal_form_and_of_rank_d_as_good_as_full() -> None:
    x = correlated(200)
    sums = sums_of(x, TRUE_MAPS["full"].change(x) + random(200, D, seed=1))
    torch.testing.assert_close(
        fit(sums, "low_rank", 0, 0.1).diagonal, fit(sums, "diagonal", ridge=0.1).diagonal
    )
    wanted = error(sums, fit(sums, "full"))
    assert error(sums, fit(sums, "low_rank", D)) == pytest.approx(wanted, rel=1e-5)


def test_the_true_rank_is_found_beside_a_diagonal() -> None:
    dim, true_rank = 16, 3
    true = some_map(("diagonal", "u", "v"), rank=true_rank, dim=dim)
    x, fresh = random(4000, dim), random(4000, dim, seed=8)
    noise = 0.1
    sums = sums_of(x, true.change(x) + noise * random(4000, dim, seed=1))
    new = sums_of(fresh, true.change(fresh) + noise * random(4000, dim, seed=9))
    errors = [error(new, fit(sums, "low_rank", rank, 1e-6)) for rank in range(6)]
    floor = noise**2
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors[:4])), errors
    assert errors[true_rank - 1] > 10 * floor, errors
    assert all(floor * 0.95 < left < floor * 1.1 for left in errors[true_rank:]), errors


def test_low_rank_weighs_directions_by_how_much_the_input_moves_along_them() -> None:
    # Along the last channels the input hardly moves; the slope there is large, and matters little.
    dim, scales = 8, torch.tensor([1.0] * 4 + [1e-3] * 4, dtype=torch.float64)
    slope = random(dim, dim) * torch.tensor([1.0] * 4 + [30.0] * 4, dtype=torch.float64)
    slope.fill_diagonal_(0.0)
    x = random(5000, dim, seed=1) * scales
    sums = sums_of(x, x @ slope.T)
    found = error(sums, fit(sums, "low_rank", 3))
    left, values, right = torch.linalg.svd(slope)
    raw = LinearMap(u=left[:, :3] * values[:3], v=right[:3].T)
    assert found < 0.2 * error(sums, raw)
    # Eckart-Young on the moves themselves: no matrix of this rank does better; the diagonal helps.
    moves = torch.linalg.svdvals((x - x.mean(0)) @ slope.T)
    assert found <= moves[3:].square().sum().item() / x.numel() * (1 + 1e-6)


def test_rounds_let_diagonal_and_low_rank_share(monkeypatch: pytest.MonkeyPatch) -> None:
    dim = 16
    true = some_map(("diagonal", "u", "v"), rank=2, dim=dim)
    x = random(2000, dim)
    sums = sums_of(x, true.change(x))
    errors = []
    for rounds in (1, 2, ridge_module.ROUNDS):
        monkeypatch.setattr(ridge_module, "ROUNDS", rounds)
        errors.append(error(sums, fit(sums, "low_rank", 2)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


@pytest.mark.parametrize(
    ("form", "rank", "ridge", "message"),
    [
        ("sparse", 0, 0.0, "form is 'sparse'; allowed: diagonal, low_rank, full"),
        ("low_rank", D + 1, 0.0, "rank is 7 with form 'low_rank'; allowed: 0 to 6"),
        ("low_rank", -1, 0.0, "rank is -1 with form 'low_rank'; allowed: 0 to 6"),
        ("full", 2, 0.0, "rank is 2 with form 'full'; allowed: 0 to 0"),
        ("diagonal", 0, -0.1, "ridge is -0.1; allowed: a number from 0"),
        ("diagonal", 0, math.nan, "ridge is nan; allowed: a number from 0"),
    ],
)
def test_fit_refuses(form: Form, rank: int, ridge: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(sums_of(random(9, D), random(9, D)), form, rank, ridge)


# ---- the choice -------------------------------------------------------------------------------


def generations(
    count: int,
    seed: int,
    true: LinearMap | None = None,
    dim: int = D,
    drift: float = 0.3,
    tokens: int = 60,
) -> list[RidgeSums]:
    """Sums of generations, each with a drift of its own that no map can know."""
    made = []
    for index in range(count):
        x, noise, own = (
            random(rows, dim, seed=seed + 3 * index + part)
            for part, rows in enumerate((tokens, tokens, 1))
        )
        r = noise + drift * own
        made.append(sums_of(x, r if true is None else r + true.change(x)))
    return made


def chosen(choice: Choice) -> tuple[str, int]:
    assert choice.candidate is not None
    return choice.candidate.form, choice.candidate.rank


def test_pure_noise_is_reused() -> None:
    found = [
        choose(generations(8, seed), generations(8, seed + 500), ranks=(2,))
        for seed in range(0, 10000, 1000)
    ]
    assert [choice.linear_map for choice in found] == [None] * 10
    for choice in found:
        assert choice.candidate is None and choice.held_out_error == choice.reuse_error
        assert len(choice.table) == 5 + 5 + 5


@pytest.mark.parametrize("form", FORMS)
def test_the_form_that_made_the_data_is_chosen(form: Form) -> None:
    dim = 12
    names = {"diagonal": ("diagonal",), "low_rank": ("diagonal", "u", "v"), "full": ("full",)}
    true = some_map(names[form], rank=RANK, dim=dim, seed=3)
    fit_on, held_out = (generations(6, seed, true, dim, tokens=200) for seed in (0, 100))
    choice = choose(fit_on, held_out, ranks=(1, RANK, 4))
    assert chosen(choice) == (form, rank_of(form))
    assert choice.linear_map is not None and choice.candidate is not None
    assert choice.held_out_error == choice.candidate.held_out_error
    assert choice.held_out_error < 1.3 < 1.7 < choice.reuse_error
    errors = [error(sums, choice.linear_map) for sums in held_out]
    assert choice.held_out_error == pytest.approx(sum(errors) / 6)


def test_the_table_says_what_was_tried() -> None:
    fit_on, held_out = (generations(4, seed, TRUE_MAPS["diagonal"]) for seed in (0, 100))
    choice = choose(fit_on, held_out, ranks=(1, 2, 3, 64), ridges=(0.1, 1.0))
    tried = [(row.form, row.rank, row.ridge) for row in choice.table]
    forms = [("diagonal", 0), ("low_rank", 1), ("low_rank", 2), ("full", 0)]
    assert tried == [(*form, ridge) for form in forms for ridge in (0.1, 1.0)]
    for row in choice.table:
        fitted = fit(pooled(fit_on), row.form, row.rank, row.ridge)
        gains = torch.tensor([error(sums, None) - error(sums, fitted) for sums in held_out])
        assert row.multiply_adds_per_token == fitted.multiply_adds_per_token
        assert row.improvement == pytest.approx(gains.mean().item())
        assert row.standard_error == pytest.approx(gains.std().item() / 2)
        assert row.improvement == pytest.approx(choice.reuse_error - row.held_out_error)


def test_a_ridge_is_chosen_that_suits_the_data() -> None:
    true = TRUE_MAPS["full"]
    few = choose(generations(1, 0, true, tokens=9), generations(8, 50, true), forms=("full",))
    many = choose(generations(8, 0, true), generations(8, 50, true), forms=("full",))
    assert few.candidate is not None and many.candidate is not None
    assert few.candidate.ridge > many.candidate.ridge
    for choice in (few, many):
        assert choice.held_out_error == min(row.held_out_error for row in choice.table)


def test_a_map_worse_than_reuse_on_held_out_generations_is_dropped() -> None:
    true = TRUE_MAPS["diagonal"]
    opposite = LinearMap(diagonal=-2.0 * random(D, seed=20))
    held_out = generations(6, 100, opposite)
    assert choose(generations(6, 0, true), held_out).linear_map is None
    assert choose(generations(6, 0, opposite), held_out).linear_map is not None


def test_a_gain_on_one_generation_alone_is_not_clear() -> None:
    true = LinearMap(diagonal=torch.full((D,), 3.0, dtype=torch.float64))
    fit_on = generations(6, 0, true)
    one_of_six = [*generations(1, 100, true), *generations(5, 200)]
    shrunk = {"forms": ("diagonal",), "ridges": (30.0,)}
    choice = choose(fit_on, one_of_six, **shrunk)
    assert choice.table[0].improvement > 0
    assert choice.linear_map is None
    assert choose(fit_on, one_of_six, **shrunk, margin=0.0).linear_map is not None


def test_equal_errors_take_the_cheapest_form() -> None:
    # Full and low rank fit the diagonal truth as well, on sums with next to no noise.
    true = TRUE_MAPS["diagonal"]
    choice = choose(generations(4, 0, true, tokens=500), generations(4, 50, true, tokens=500))
    assert chosen(choice) == ("diagonal", 0)


def test_equal_costs_take_the_lowest_error() -> None:
    true, firsts = TRUE_MAPS["diagonal"], []
    for seed in range(0, 1000, 100):
        fit_on, held_out = generations(4, seed, true), generations(2, seed + 50, true)
        choice = choose(fit_on, held_out, forms=("diagonal",))
        errors = [row.held_out_error for row in choice.table]
        assert choice.held_out_error == min(errors)
        firsts.append(errors[0] == min(errors))
    assert not all(firsts)


@pytest.mark.parametrize("held", [0, 1])
def test_fewer_than_two_held_out_generations_are_no_evidence(held: int) -> None:
    true = TRUE_MAPS["diagonal"]
    fit_on, held_out = generations(4, 0, true), generations(held, 50, true)
    choice = choose(fit_on, [*held_out, RidgeSums(D), RidgeSums(D)])
    assert choice.linear_map is None and choice.table == ()
    assert math.isnan(choice.reuse_error) == (held == 0)


def test_empty_generations_are_passed_over() -> None:
    true = TRUE_MAPS["diagonal"]
    fit_on, held_out = (generations(4, seed, true) for seed in (0, 100))
    empty = RidgeSums(D)
    assert choose([empty, *fit_on], [empty, *held_out]).table == choose(fit_on, held_out).table
    nothing = choose([empty], held_out)
    assert (nothing.linear_map, nothing.table) == (None, ())
    assert nothing.reuse_error == choose(fit_on, held_out).reuse_error
    with pytest.raises(ValueError, match="fit_sums is empty"):
        choose([], held_out)


# ---- forecasts --------------------------------------------------------------------------------

IMAGE = some_map(("diagonal", "u", "v"), seed=50)
TEXT = some_map(("full",), seed=60)


def streams(seed: int, text: bool = True, dtype: torch.dtype = torch.float64) -> Streams:
    words = random(2, 3, D, seed=seed + 1000).to(dtype) if text else None
    return Streams(random(2, 5, D, seed=seed).to(dtype), words)


def anchor(noise_level: float, inputs: Streams, residual: Streams) -> Anchor:
    return Anchor(noise_level, inputs, residual, Reference.of(inputs.hidden_states))


def remember(forecaster: Forecaster, *anchors: Anchor) -> Memory:
    memory = Memory()
    for computed in anchors:
        memory = forecaster.update(memory, computed)
    return memory


def by_stream(function: Callable[..., torch.Tensor], *given: Streams) -> Streams:
    """`Streams.map` of a function that is also told the stream's map."""
    words = [each.encoder_hidden_states for each in given]
    lacks = any(each is None for each in words)
    image = function(IMAGE, *(each.hidden_states for each in given))
    return Streams(image, None if lacks else function(TEXT, *words))


def assert_close(found: Streams, wanted: Streams) -> None:
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
    torch.testing.assert_close(found.encoder_hidden_states, wanted.encoder_hidden_states)


def one_bucket() -> SpanMaps:
    return SpanMaps((1.0,), (IMAGE,), (TEXT,))


both_streams = pytest.mark.parametrize("text", [True, False], ids=["image and text", "image"])


@both_streams
def test_linear_is_exact_where_the_residual_is_affine_in_the_input(text: bool) -> None:
    constant = streams(1, text)

    def residual(x: Streams) -> Streams:
        return by_stream(lambda held, x, c: expected_change(held, x) + c, x, constant)

    forecaster = LinearForecaster(one_bucket())
    memory = remember(forecaster, *(anchor(s, x, residual(x)) for s, x in levels_and_inputs(text)))
    now = streams(5, text)
    assert_close(forecaster.forecast(memory, now, 0.1), now.map(torch.add, residual(now)))


def levels_and_inputs(text: bool) -> list[tuple[float, Streams]]:
    return [(0.97, streams(10, text)), (0.6, streams(11, text)), (0.5, streams(12, text))]


@both_streams
@pytest.mark.parametrize("sigma", [0.45, 0.1, 0.0])
def test_linear_taylor_is_exact_on_a_map_plus_a_line_in_sigma(text: bool, sigma: float) -> None:
    constant, drift = streams(1, text), streams(2, text)

    def residual(x: Streams, level: float) -> Streams:
        def of(held: LinearMap, x: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            return expected_change(held, x) + c + level * d

        return by_stream(of, x, constant, drift)

    forecaster = LinearTaylorForecaster(one_bucket())
    anchors = (anchor(s, x, residual(x, s)) for s, x in levels_and_inputs(text))
    memory, now = remember(forecaster, *anchors), streams(5, text)
    wanted = now.map(torch.add, residual(now, sigma))
    assert_close(forecaster.forecast(memory, now, sigma), wanted)


@both_streams
@pytest.mark.parametrize("maps", [None, one_bucket()], ids=["online", "fitted"])
def test_linear_taylor_is_exact_where_all_is_linear_in_sigma(
    maps: SpanMaps | None, text: bool
) -> None:
    start, direction, constant, drift = (streams(seed, text) for seed in range(4))

    def line(a: Streams, b: Streams, level: float) -> Streams:
        return a.map(lambda a, b: a + level * b, b)

    forecaster = LinearTaylorForecaster(maps)
    memory = remember(
        forecaster,
        *(
            anchor(s, line(start, direction, s), line(constant, drift, s))
            for s in (0.9, 0.83, 0.51)
        ),
    )
    now = line(start, direction, 0.2)
    wanted = now.map(torch.add, line(constant, drift, 0.2))
    assert_close(forecaster.forecast(memory, now, 0.2), wanted)


@both_streams
@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "online"])
def test_linear_taylor_extrapolates_what_the_map_leaves_over(fitted: bool, text: bool) -> None:
    forecaster = LinearTaylorForecaster(one_bucket() if fitted else None)
    old, new, now = (streams(seed, text) for seed in (1, 2, 3))
    before, latest = streams(4, text), streams(5, text)
    memory = remember(forecaster, anchor(0.9, old, before), anchor(0.7, new, latest))
    weight = (0.2 - 0.7) / (0.7 - 0.9)

    def forecast(held: LinearMap, *given: torch.Tensor) -> torch.Tensor:
        x, x0, x1, r0, r1 = given
        if not fitted:
            held = LinearMap(diagonal=online_slope(x0 - x1, r0 - r1))
        moved, moved_before = (expected_change(held, dx) for dx in (x - x0, x0 - x1))
        return x + r0 + moved + weight * ((r0 - r1) - moved_before)

    wanted = by_stream(forecast, now, new, old, latest, before)
    assert_close(forecaster.forecast(memory, now, 0.2), wanted)


@both_streams
@pytest.mark.parametrize("maps", [None, one_bucket()], ids=["online", "fitted"])
@pytest.mark.parametrize("levels", [(0.7,), (0.7, 0.7)], ids=["one anchor", "one level"])
def test_without_a_line_through_two_anchors_linear_taylor_is_linear(
    levels: tuple[float, ...], maps: SpanMaps | None, text: bool
) -> None:
    anchors = [
        anchor(level, streams(i, text), streams(i + 7, text)) for i, level in enumerate(levels)
    ]
    now = streams(20, text)
    found, wanted = (
        make(maps).forecast(remember(make(maps), *anchors), now, 0.3)
        for make in (LinearTaylorForecaster, LinearForecaster)
    )
    assert_close(found, wanted)
    reused = now.map(torch.add, anchors[-1].residual)
    changed = not torch.equal(found.hidden_states, reused.hidden_states)
    assert changed == (maps is not None or len(levels) == 2)


@linear_forecasters
def test_with_maps_nothing_is_fitted_online(make: type[LinearMapForecaster]) -> None:
    anchors = [anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6))]
    assert remember(make(one_bucket()), *anchors).slope is None
    assert remember(make(), *anchors).slope is not None


def test_the_map_follows_gap_and_stream() -> None:
    near, far = some_map(("diagonal", "bias"), seed=70), some_map(("diagonal", "bias"), seed=80)
    forecaster = LinearForecaster(SpanMaps((0.1, 0.3), image=(near, far), text=(None, near)))
    memory = remember(forecaster, anchor(0.6, streams(1), streams(2)))
    now, x0 = streams(5), streams(1)
    reused = now.map(torch.add, streams(2))
    moved = now.map(torch.sub, x0)
    cases = [(0.55, near, None), (0.4, far, near), (0.8, far, near), (0.2, None, None)]
    for level, image, text in [*cases, (0.6, None, None)]:
        found = forecaster.forecast(memory, now, level)
        hidden, words = reused.hidden_states, reused.encoder_hidden_states
        assert words is not None and moved.encoder_hidden_states is not None
        if image is not None:
            hidden = hidden + expected_change(image, moved.hidden_states)
        if text is not None:
            words = words + expected_change(text, moved.encoder_hidden_states)
        assert_close(found, Streams(hidden, words))


@linear_forecasters
@pytest.mark.parametrize("fitted", [True, False])
def test_a_text_stream_that_the_span_drops_stays_away(
    make: type[LinearMapForecaster], fitted: bool
) -> None:
    # The last block of SD3 reads the text and does not return it.
    forecaster = make(one_bucket() if fitted else None)
    anchors = [
        anchor(level, streams(i), streams(i + 7, text=False)) for i, level in enumerate((0.9, 0.6))
    ]
    found = forecaster.forecast(remember(forecaster, *anchors), streams(5), 0.3)
    assert found.encoder_hidden_states is None
    _, dr = forecaster.pair(remember(forecaster, *anchors), streams(5), streams(6, text=False), 0.3)
    assert dr.encoder_hidden_states is None


@linear_forecasters
@both_streams
def test_a_pair_is_what_the_map_is_given_and_what_would_make_the_forecast_true(
    make: type[LinearMapForecaster], text: bool
) -> None:
    plain = make(SpanMaps((1.0,), (None,), (None,)))
    anchors = [
        anchor(level, streams(i, text), streams(i + 7, text)) for i, level in enumerate((0.9, 0.6))
    ]
    memory, now, truth = remember(plain, *anchors), streams(5, text), streams(6, text)
    dx, dr = plain.pair(memory, now, truth, 0.3)
    uncorrected = plain.forecast(memory, now, 0.3)
    assert_close(uncorrected.map(torch.add, dr), now.map(torch.add, truth))
    mapped = make(one_bucket()).forecast(memory, now, 0.3)
    assert_close(
        mapped, by_stream(lambda held, y, x: y + expected_change(held, x), uncorrected, dx)
    )


@linear_forecasters
def test_a_map_fitted_on_pairs_is_the_one_that_made_them(make: type[LinearMapForecaster]) -> None:
    true, drift = IMAGE, random(D, seed=3)
    sums, forecaster = RidgeSums(D), make()
    for seed in range(20):
        inputs = [random(2, 5, D, seed=100 * seed + step) for step in range(3)]
        levels = (0.9, 0.6, 0.4)
        *computed, (now, residual) = [
            (Streams(x), Streams(expected_change(true, x) + level * drift))
            for x, level in zip(inputs, levels, strict=True)
        ]
        memory = remember(
            forecaster, *(anchor(s, x, r) for s, (x, r) in zip(levels, computed, strict=False))
        )
        dx, dr = forecaster.pair(memory, now, residual, 0.4)
        sums.add(dx.hidden_states, dr.hidden_states)
    found = fit(sums, "full")
    torch.testing.assert_close(dense(found), dense(true), atol=1e-5, rtol=1e-5)
    # The drift is linear's constant; with Taylor nothing is left over.
    left = drift * (0.4 - 0.6) if make is LinearForecaster else torch.zeros(D)
    assert found.bias is not None
    torch.testing.assert_close(found.bias.double(), left.double(), atol=1e-5, rtol=1e-5)


@linear_forecasters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecasts_with_maps_keep_dtype_and_its_precision(
    make: type[LinearMapForecaster], dtype: torch.dtype
) -> None:
    """A smooth path: what the map corrects is far smaller than the states themselves."""

    def path(level: float) -> torch.Tensor:
        return 8 * random(2, 40, D) + level * random(2, 40, D, seed=1) + level**2

    levels = (0.5, 0.48, 0.46)
    rounded = [Streams(path(level).to(dtype), path(level).to(dtype)) for level in levels]
    exact = [each.map(torch.Tensor.double) for each in rounded]

    def forecast(states: list[Streams]) -> Streams:
        forecaster = make(one_bucket())
        anchors = [anchor(s, x, x) for s, x in zip(levels, states, strict=False)][:2]
        return forecaster.forecast(remember(forecaster, *anchors), states[2], levels[2])

    found, wanted = forecast(rounded), forecast(exact)
    for name in ("hidden_states", "encoder_hidden_states"):
        low, high = getattr(found, name), getattr(wanted, name)
        assert low.dtype == dtype
        assert (low.double() - high).abs().amax() <= torch.finfo(dtype).eps * high.abs().amax()


@linear_forecasters
def test_a_surprise_in_bf16_is_rounded_at_its_own_scale(make: type[LinearMapForecaster]) -> None:
    levels = (0.5, 0.48, 0.46)
    path = [
        Streams((8 * random(2, 40, D) + level * random(2, 40, D, seed=1)).bfloat16())
        for level in levels
    ]
    before, latest, now = path

    def surprise(states: list[Streams]) -> torch.Tensor:
        anchors = [anchor(s, x, x) for s, x in zip(levels, states[:2], strict=False)]
        memory = remember(make(one_bucket()), *anchors)
        dx, _ = make(one_bucket()).pair(memory, states[2], states[2], levels[2])
        return dx.hidden_states.double()

    exact = surprise([state.map(torch.Tensor.double) for state in path])
    step = now.map(torch.sub, latest).hidden_states.abs().amax()
    last = latest.map(torch.sub, before).hidden_states.abs().amax()
    off = (surprise(path) - exact).abs().amax()
    assert off <= torch.finfo(torch.bfloat16).eps * (step + last)


@linear_forecasters
def test_at_its_anchor_a_map_with_a_bias_returns_what_was_computed(
    make: type[LinearMapForecaster],
) -> None:
    biased = some_map(("diagonal", "bias"))
    forecaster = make(SpanMaps((1.0,), (biased,), (biased,)))
    anchors = [anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6))]
    found = forecaster.forecast(remember(forecaster, *anchors), streams(1), 0.6)
    assert_close(found, streams(1).map(torch.add, streams(8)))


@linear_forecasters
def test_anchors_are_kept_as_far_as_they_are_looked_back_on(
    make: type[LinearMapForecaster],
) -> None:
    anchors = [anchor(1 - i / 10, streams(i), streams(i)) for i in range(4)]
    depth = {LinearForecaster: 1, LinearTaylorForecaster: 2}[make]
    assert remember(make(), *anchors).anchors == tuple(reversed(anchors))[:depth]


@linear_forecasters
@pytest.mark.parametrize("fitted", [True, False])
def test_a_split_memory_forecasts_each_patch_as_the_whole(
    make: type[LinearMapForecaster], fitted: bool
) -> None:
    forecaster = make(one_bucket() if fitted else None)
    anchors = [anchor(level, streams(i), streams(i + 7)) for i, level in enumerate((0.9, 0.6))]
    memory, now = remember(forecaster, *anchors), streams(5)
    whole = forecaster.forecast(memory, now, 0.3)
    parts = zip(memory.split((2, 3)), now.split((2, 3)), whole.split((2, 3)), strict=True)
    for patch, part, wanted in parts:
        assert_close(forecaster.forecast(patch, part, 0.3), wanted)
