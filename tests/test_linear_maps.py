"""Linear maps: their arithmetic, their file, how they are fitted and chosen, what they forecast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.calibration.maps import Choice, choose
from xfuser_fastcache.calibration.ridge import FORMS, Form, RidgeSums, error, fit
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


# ---- sums -------------------------------------------------------------------------------------


def sums_of(dx: torch.Tensor, dr: torch.Tensor, **options: torch.dtype) -> RidgeSums:
    sums = RidgeSums(dx.shape[-1], **options)
    sums.add(dx, dr)
    return sums


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


def test_a_map_worse_than_reuse_on_held_out_generations_is_dropped() -> None:
    true = TRUE_MAPS["diagonal"]
    opposite = LinearMap(diagonal=-2.0 * random(D, seed=20))
    held_out = generations(6, 100, opposite)
    assert choose(generations(6, 0, true), held_out).linear_map is None
    assert choose(generations(6, 0, opposite), held_out).linear_map is not None


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
