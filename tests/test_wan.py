"""Wan in plain diffusers: what is measured of each version, two experts, sizes of real videos."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.counted import counted_tokens
from support.families import made
from support.stack import EVER
from support.worlds import ROOT
from torch import nn

from diffusers_adapters.tiny import TINY_MODELS
from diffusers_adapters.tiny.wan import tiny_wan
from diffusers_adapters.wan import WanAdapter
from xfuser_fastcache import get_cache_statistics, get_cache_trace
from xfuser_fastcache.apply import (
    apply_cache_on_pipeline,
    denoisers_of,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.cli import main
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.gates.base import Evidence
from xfuser_fastcache.gates.chi_square import ChiSquareGate
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.measurements.moments import Moments, Reference, measure
from xfuser_fastcache.models.token_layout import TokenCounts
from xfuser_fastcache.xdit.anchors import bytes_held, forecasters
from xfuser_fastcache.xdit.families import Example

pytestmark = pytest.mark.usefixtures("without_gradients")
STEPS, SWITCH = 10, 4
SPANS = ("adacorrection", "damped_taylor", "linear", "linear_taylor", "reuse", "taylor2")
MASK = [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "spans": {"granularity": 2},
    "split": {"motion_threshold": 0.3},
    "first block": {"use_cache": "Fb"},
}


@pytest.mark.parametrize(
    "name", [n for n, tiny in TINY_MODELS.items() if n != "wan" and "wan" in tiny.adapter]
)
def test_only_noise_is_measured_and_nothing_changes_at_threshold_0(name: str) -> None:
    pipe, generate = made(name, STEPS)
    control = generate()
    noise = 8 if name == "wan-ti2v" else 12  # the first of three frames is given
    for way, options in WAYS.items():
        for threshold in (0.0, 12.0):
            apply_cache_on_pipeline(pipe, cache_ratio_threshold=threshold, **options)
            with counted_tokens() as seen:
                found = generate()
            statistics = [get_cache_statistics(one) for one in denoisers_of(pipe).values()]
            remove_cache_from_pipeline(pipe)
            exact = threshold == 0 and way != "split"  # whose computed steps are narrowed
            assert torch.equal(found, control) == exact, way
            assert found.isfinite().all(), way
            for one in statistics:
                assert (one["block_approx_ratio"] > 0) == (threshold > 0), way
                assert (one["clock"], one["recomputed"]) == ("scheduler", 0), way
            assert sum(one["steps"] for one in statistics) == STEPS
            # Of the forward pass latents are measured, four in a token.
            wanted = {"default": {4 * noise}, "first block": set()}.get(way, {noise})
            assert seen == wanted, way
    assert torch.equal(generate(), control)


def test_what_stands_in_by_default_is_as_large_as_the_latents_unless_more_is_asked_for() -> None:
    pipe, _ = made("wan", STEPS)
    for options, forecaster in (
        ({}, "data"),
        ({"cache_ratio_threshold": 0.1}, "output"),
        ({"steps_mask": MASK}, "output"),
        ({"computed_steps": 2}, "data"),
        ({"forecaster": "reuse"}, "reuse"),
        ({"granularity": "block"}, "damped_taylor"),
        ({"enable_token_merge": True}, "damped_taylor"),
        ({"enable_adacorrection": True}, "adacorrection"),
        ({"use_cache": "TaylorSeer"}, "taylor"),
        ({"use_cache": "Tea"}, "reuse"),
        ({"gate": {"any_of": ["Fast", "Fb"]}}, "damped_taylor"),
    ):
        apply_cache_on_pipeline(pipe, **options)
        found = hook_on(pipe.transformer).engine.config.forecaster
        remove_cache_from_pipeline(pipe)
        assert (found if isinstance(found, str) else found["name"]) == forecaster, options


def test_what_is_given_is_never_measured() -> None:
    """Whatever the first frame of TI2V holds, or the channels behind the noise of I2V."""
    model = SimpleNamespace(
        config=SimpleNamespace(patch_size=(1, 2, 2), in_channels=36, out_channels=16)
    )
    counts = TokenCounts(lambda args, kwargs: WanAdapter.image_tokens(model, args, kwargs))
    forward = WanAdapter.forward_contract(model, counts)
    noise = torch.randn(1, 16, 3, 4, 4)
    timestep = torch.cat((torch.zeros(1, 4), torch.full((1, 8), 700.0)), dim=1)
    seen = []
    for size in (1.0, 1e6, float("nan")):
        video = torch.cat((noise, torch.full((1, 20, 3, 4, 4), size)), dim=1)
        video[:, :, 0] = size
        arguments = {"hidden_states": video, "timestep": timestep}
        counts.open((), arguments)
        assert counts.image == range(4, 12)
        seen.append(forward.read((), arguments).hidden_states)
    assert seen[0].shape == (1, 2 * 16, 16)
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert torch.equal(seen[0][0, 16 + 4 + 1], noise[0, :, 2, 1, 1])


def test_timesteps_of_tokens_are_looked_at_once_a_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which waits for a GPU."""
    pipe, generate = made("wan-ti2v", STEPS)
    asked: list[int] = []
    image_tokens = WanAdapter.image_tokens.__func__

    def counting(cls: Any, *arguments: Any) -> range:
        asked.append(1)
        return image_tokens(cls, *arguments)

    monkeypatch.setattr(WanAdapter, "image_tokens", classmethod(counting))
    apply_cache_on_pipeline(pipe)
    generate()
    generate()
    assert len(asked) == 2


# LightX2V's files for Wan, but for what is no option of a cache: target sizes, attention, seed.
_T2V = {"infer_steps": 50, "target_height": 480, "sample_shift": 8, "text_len": 512}
_POLYNOMIALS = [
    [-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02],
    [2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01],
]
_TEA = {"coefficients": _POLYNOMIALS, "teacache_thresh": 0.26}
LIGHTX2V: dict[str, dict[str, Any]] = {
    "wan_t2v_1_3b_tea_480p": {**_T2V, **_TEA, "feature_caching": "Tea", "use_ret_steps": True},
    "wan_t2v_taylorseer": {**_T2V, "feature_caching": "TaylorSeer"},
    "wan_i2v_ada": {**_T2V, "infer_steps": 40, "feature_caching": "Ada"},
    "wan_t2v_custom_1_3b": {
        **_T2V, **_TEA, "feature_caching": "Custom", "use_ret_steps": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHTX2V)
def test_lightx2v_s_files_for_wan_load_and_skip(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(LIGHTX2V[name]))
    config = CacheConfig.from_file(path)
    assert config.use_cache == LIGHTX2V[name]["feature_caching"]
    model = "wan-i2v" if "i2v" in name else "wan"
    pipe, generate = made(model, config.num_steps)
    apply_cache_on_pipeline(pipe, config=config)
    video = generate()
    found = get_cache_statistics(pipe.transformer)
    assert video.isfinite().all() and found["steps"] == config.num_steps
    assert 0.1 < found["block_approx_ratio"] < 1


def test_tea_measures_the_timesteps_projection_and_knows_the_published_polynomials() -> None:
    pipe, generate = made("wan", STEPS)
    apply_cache_on_pipeline(pipe, use_cache="Tea", cache_ratio_threshold=0.26)
    generate()
    judged = {row["step"]: row["statistic"] for row in get_cache_trace(pipe.transformer)}
    remove_cache_from_pipeline(pipe)
    projections: list[torch.Tensor] = []
    handle = pipe.transformer.condition_embedder.register_forward_hook(
        lambda module, args, output: projections.append(output[1])
    )
    generate()
    handle.remove()
    before, after = projections[0], projections[2]  # two calls a step
    change = (after - before).abs().sum() / before.abs().sum()
    assert judged[1] == pytest.approx(float(change), rel=1e-5)
    assert WanAdapter.tea_polynomial_of(_width(40))[0] == -3.03318725e5
    assert WanAdapter.tea_polynomial_of(_width(24)) is None
    assert WanAdapter.tea_polynomial_of(_width(40, channels=36)) is None
    assert list(WanAdapter.tea_polynomial_of(_width(12)) or ()) == _POLYNOMIALS[0]


def _width(heads: int, channels: int = 16) -> Any:
    """Return a model of so many heads and input channels."""
    sizes = {"in_channels": channels, "out_channels": 16}
    config = {"num_attention_heads": heads, "attention_head_dim": 128, **sizes}
    return SimpleNamespace(config=SimpleNamespace(**config))


def decided(transformer: nn.Module, branch: int) -> dict[int, str]:
    """Return step -> decision of a branch in the last generation."""
    rows = get_cache_trace(transformer)
    return {row["step"]: row["decision"] for row in rows if row["branch"] == branch}


def held(transformer: nn.Module) -> bool:
    """Say whether a transformer's cache holds anchors."""
    branches = hook_on(transformer).engine.branches.values()
    return any(
        memory.anchors
        for local in branches
        for patches in local.memories.values()
        for memory in patches.values()
    )


@pytest.mark.parametrize("options", [{"steps_mask": MASK}, {"cache_ratio_threshold": EVER}])
def test_through_the_boundary_steps_count_on_and_no_forecast_crosses(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, generate = made("wan22", STEPS)
    apply_cache_on_pipeline(pipe, **options)
    one, two = pipe.transformer, pipe.transformer_2
    awaited: dict[int, bool] = {}
    holders: dict[int, tuple[bool, bool]] = {}
    expected: list[str | None] = [None]
    dog = hook_on(one).engine.watchdog
    monkeypatch.setattr(dog, "expect", lambda place: expected.__setitem__(0, place))
    monkeypatch.setattr(dog, "rest", lambda: expected.__setitem__(0, None))
    step = pipe.scheduler.step

    def spied(*args: Any, **kwargs: Any) -> Any:
        index = len(holders)
        holders[index], awaited[index] = (held(one), held(two)), expected[0] is not None
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", spied)
    first = generate()
    assert first.isfinite().all()
    assert [any(pair) for pair in holders.values()] == [True] * STEPS
    # The first one's anchors are freed at the switch, and nobody waits for it any more.
    assert [pair[0] for pair in holders.values()] == [at < SWITCH for at in range(STEPS)]
    assert list(awaited.values()) == [at < SWITCH for at in range(STEPS)]
    for branch in (0, 1):
        early, late = decided(one, branch), decided(two, branch)
        assert (list(early), list(late)) == ([*range(SWITCH)], [*range(SWITCH, STEPS)])
        assert late[SWITCH] == "forced"  # whatever a mask says: it has nothing to look back on
        if "steps_mask" in options:
            skipped = {at for at, word in {**early, **late}.items() if word == "skipped"}
            assert skipped == {at for at in range(STEPS) if not MASK[at]} - {SWITCH}
        else:
            assert early[SWITCH - 1] == "skipped" and late[STEPS - 1] == "forced"
    monkeypatch.undo()
    assert torch.equal(generate(), first)


# ---- real sizes, by shapes alone ----------------------------------------------------------------

FRAMES, HEIGHT, WIDTH = 21, 90, 160  # latents of 720p x 81 frames
TOKENS = FRAMES * HEIGHT * WIDTH // 4
RANKS = (1, 2, 3, 7, 8, 16, 64)


def summed(ranks: int, given: int, shard_of: Any) -> Moments:
    """Return what so many ranks measure together of a model that cuts its tokens by itself.

    Args:
        ranks: that share the tokens, padded to a multiple.
        given: tokens of the first frame whose timestep is 0.
        shard_of: which tokens of how many a rank's are -> its hidden states now, and at its anchor.
    """
    model = SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2)))
    latents = torch.empty(1, 16, FRAMES, HEIGHT, WIDTH, device="meta")
    timestep = torch.ones(1, TOKENS)
    timestep[:, :given] = 0
    block = tiny_wan()[0].transformer.blocks[0]
    rows = -(-TOKENS // ranks)
    total = torch.zeros(9, dtype=torch.int64)
    for rank in range(ranks):
        counts = TokenCounts(
            lambda args, kwargs: WanAdapter.image_tokens(model, args, kwargs), shard=rank
        )
        counts.open((), {"hidden_states": latents, "timestep": timestep})
        contract = WanAdapter.block_lists["blocks"].of(block, counts)
        now, anchor = (contract.image_of(x) for x in shard_of(rank * rows, rows))
        total += measure(now, Reference.of(anchor), 0)
    return Moments.decode(total.tolist(), 0)


@pytest.mark.parametrize("given", [0, HEIGHT * WIDTH // 4], ids=["T2V", "TI2V"])
def test_a_720p_video_of_81_frames_neither_overflows_nor_fails_to_be_skipped(given: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = TOKENS + max(RANKS)
    anchor = torch.randn(1, rows, 4, generator=generator)
    now = anchor + 0.01 * torch.randn(1, rows, 4, generator=generator)
    # What is given, and what pads, must not be seen.
    now[:, :given], now[:, TOKENS:] = float("nan"), 1e9

    def shard_of(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(x[:, first : first + count] for x in (now, anchor))

    found = {ranks: summed(ranks, given, shard_of) for ranks in RANKS}
    assert len(set(map(repr, found.values()))) == 1
    one = found[1]
    assert (one.tokens, one.nonfinite, one.overflow) == (TOKENS - given, 0, 0)
    evidence = Evidence(
        change=one.change, change_squared=one.change_squared, reference=one.reference,
        tokens=one.tokens, dim=4, lag=1, noise_levels=(0.8, 0.9, None),
    )  # fmt: skip
    verdict = ChiSquareGate(cache_ratio_threshold=0.05).judge(evidence)
    assert (
        verdict.may_skip and not ChiSquareGate(cache_ratio_threshold=0.005).judge(evidence).may_skip
    )


def test_latents_of_the_whole_forward_pass_neither_overflow_where_64_ranks_count_them() -> None:
    """Which xDiT's runner gathers on every rank; one of them counts, and all of them could."""
    model = SimpleNamespace(
        config=SimpleNamespace(patch_size=(1, 2, 2), in_channels=16, out_channels=16)
    )
    counts = TokenCounts(lambda args, kwargs: WanAdapter.image_tokens(model, args, kwargs))
    forward = WanAdapter.forward_contract(model, counts)
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH, generator=generator)
    noise = torch.randn(anchor.shape, generator=generator)
    read = []
    for latents in (anchor, anchor + 0.01 * noise):
        arguments = {"hidden_states": latents, "timestep": torch.ones(1)}
        counts.open((), arguments)
        read.append(forward.read((), arguments).hidden_states)
    own = measure(read[1], Reference.of(read[0]), 0)
    one, all_of_64 = (Moments.decode((ranks * own).tolist(), 0) for ranks in (1, 64))
    assert (one.tokens, one.overflow, all_of_64.overflow) == (FRAMES * HEIGHT * WIDTH, 0, 0)
    assert all_of_64.tokens == 64 * one.tokens
    assert all_of_64.change / all_of_64.reference == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"forecaster": "output"}, "output"),
        ({"computed_steps": 6, "forecaster": "data"}, "data"),
        *(({"forecaster": name}, name) for name in forecasters() if name in SPANS),
    ],
)
def test_what_anchors_take_is_what_their_shapes_say(options: dict[str, Any], name: str) -> None:
    pipe, generate = made("wan", STEPS)
    apply_cache_on_pipeline(pipe, cache_ratio_threshold=EVER, **options)
    generate()
    held = get_cache_statistics(pipe.transformer)["cache_bytes"]
    tiny = Example("tiny", (16, 3, 4, 4), patch=4, width=16)
    found = bytes_held(forecasters()[name], tiny, dtype=torch.float32)
    assert held == pytest.approx(found, rel=0.04)  # a budget keeps no sizes of tokens
    # A rank of sequence parallelism holds its share of tokens, and all latents.
    share = bytes_held(forecasters()[name], tiny, ranks=4, dtype=torch.float32) / found
    assert share == pytest.approx(1.0 if name in ("output", "data") else 0.25, abs=0.03)


def test_the_page_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--anchors"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "video.md").read_text()
