"""A token counts once: in every layout, also where every rank sees all; conditions never do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from support.counted import counted_tokens
from support.worlds import run_world

from diffusers_adapters.flux import FluxAdapter
from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.consensus.topology import PlainLayout, _context_parallel
from xfuser_fastcache.models import token_layout
from xfuser_fastcache.models.token_layout import TokenCounts, leading_zeros

STEPS = 8
NOISE = 64  # tokens of a tiny FLUX picture, of which Kontext's condition has 32 more
# Of the counting worker's models: a step's tokens, where blocks are measured and where latents are.
TOKENS = {
    "flux, pipeline": (NOISE, NOISE),
    "flux, runner": (NOISE, NOISE),
    "flux-kontext, runner": (NOISE, NOISE),
    "flux-fill, runner": (NOISE, NOISE),
    "sd3, pipeline": (2 * NOISE, 2 * NOISE),
    "wan": (27, 4 * 27),
    "wan-ti2v": (18, 4 * 18),  # a third is the frame that is given
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags", [(), ("--ulysses_degree", "2"), ("--ring_degree", "2")], ids=lambda f: f[:1] or "one"
)
def test_every_layout_counts_each_token_once(flags: tuple[str, ...]) -> None:
    world = run_world("counting_worker.py", 2 if flags else 1, *flags, timeout_s=400)
    for rank in world.values():
        for model, (in_blocks, in_latents) in TOKENS.items():
            for way, case in rank["found"][model].items():
                never = way == "never"
                wanted = in_latents if way in ("output", "never") else in_blocks
                assert case["tokens"] == [wanted], (model, way)
                assert case["nonfinite"] == 0 and case["finite"], (model, way)
                assert (case["hits"] == 0) == never, (model, way)
                assert case["exact"] in (None, never), (model, way)
    digests = [
        [case["digest"] for ways in rank["found"].values() for case in ways.values()]
        for rank in world.values()
    ]
    assert all(found == digests[0] for found in digests)


def generate(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(i) for i in range(len(call["generator"]))]
    return pipe(**{**call, "num_inference_steps": STEPS, "generator": noise}).images


WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "spans": {"granularity": 3, "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "split": {"motion_threshold": 0.3},
    "split, dropped": {"motion_threshold": 0.3, "static_kv": "drop"},
    "merge": {"enable_token_merge": True},
}


@pytest.mark.parametrize("model", ["flux-kontext", "flux-fill"])
@pytest.mark.parametrize("way", WAYS)
def test_conditions_are_not_counted_and_nothing_changes_at_threshold_0(
    model: str, way: str
) -> None:
    pipe, call = TINY_PIPELINES[model](batch=2)
    pipe.set_progress_bar_config(disable=True)
    control = generate(pipe, call)
    for threshold in (0.0, 0.5):
        apply_cache_on_transformer(
            pipe.transformer,
            scheduler=pipe.scheduler,
            cache_ratio_threshold=threshold,
            **WAYS[way],
        )
        with counted_tokens() as seen:
            found = generate(pipe, call)
        statistics = get_cache_statistics(pipe.transformer)
        remove_cache(pipe.transformer)
        narrows = way not in ("stack", "spans", "output")  # computed steps too
        assert torch.equal(found, control) == (threshold == 0 and not narrows)
        assert seen == {2 * NOISE}
        assert found.isfinite().all()
        assert (statistics["block_approx_ratio"] > 0) == (threshold > 0)
        assert (statistics["spatial_approx_ratio"] > 0) == narrows


def test_what_a_condition_holds_is_never_measured() -> None:
    """Whatever picture is to be edited, what is read of blocks and of the forward is the noise."""
    pipe, _ = TINY_PIPELINES["flux-kontext"]()
    adapter, noise = FluxAdapter, torch.randn(1, NOISE, 64)
    ids = torch.zeros(NOISE + 32, 3)
    ids[NOISE:, 0] = 1
    counts = TokenCounts(partial(adapter.image_tokens, pipe.transformer))
    block, forward = (
        adapter.contracts(pipe.transformer, counts)[-1],
        adapter.forward_contract(pipe.transformer, counts),
    )
    for size in (1.0, 1e6, float("nan")):
        given = torch.cat((noise, size * torch.randn(1, 32, 64)), dim=1)
        arguments = {"hidden_states": given, "encoder_hidden_states": noise, "img_ids": ids}
        counts.open((), arguments)
        assert torch.equal(forward.read((), arguments).hidden_states, noise)
        assert torch.equal(block.read((), arguments).hidden_states, noise)
        assert torch.equal(block.image_of(given), noise)
        assert torch.equal(forward.unpack((given,)).hidden_states, noise)


def test_position_ids_are_read_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at their values waits for the device: once, though every step asks."""
    pipe, call = TINY_PIPELINES["flux-kontext"]()
    pipe.set_progress_bar_config(disable=True)
    gc.collect()
    known = len(token_layout._leading)
    reads = []
    cpu = torch.Tensor.cpu

    def counting(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(tuple(x.shape))
        return cpu(x, *args, **kwargs)

    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, forecaster="output")
    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    for _ in range(2):
        generate(pipe, call)
    assert reads.count((NOISE + 32,)) == 2
    gc.collect()
    assert len(token_layout._leading) <= known + 2  # forgotten with the tensors


@pytest.mark.parametrize(
    ("first", "counted"),
    [
        ([0, 0, 0], None),
        ([0, 0, 1], 2),
        ([0, 2, 1], 1),
        ([1, 1], None),
        ([0, 1, 0], None),
        ([], None),
    ],
)
def test_ids_tell_the_image_s_tokens_where_they_come_first(
    first: list[int], counted: int | None
) -> None:
    ids = torch.zeros(len(first), 3)
    ids[:, 0] = torch.tensor(first, dtype=torch.float32)
    ids[:, 1] = 7.0
    assert leading_zeros(ids) == leading_zeros(ids[None].expand(2, -1, -1)) == counted


class Mesh:
    """A device mesh of context parallelism, seen from one rank."""

    def __init__(self, rank: int):
        self.rank = rank

    def get_local_rank(self) -> int:
        return self.rank

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False)])
def test_context_parallelism_of_diffusers_is_seen(rank: int, counts: bool) -> None:
    """Its hooks cut what the transformer is given, so every rank is given all of it."""
    pipe, _ = TINY_PIPELINES["flux"]()
    assert _context_parallel(pipe.transformer) == (0, 1)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    config.context_parallel_config._flattened_mesh = Mesh(rank)
    pipe.transformer._parallel_config = config
    assert _context_parallel(pipe.transformer) == (rank, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = PlainLayout().decision_group(pipe.transformer, whole_forward=True)
        blocks = PlainLayout().decision_group(pipe.transformer)
    finally:
        dist.destroy_process_group()
    assert (whole.counts_tokens, whole.shard) == (counts, 0)
    assert (blocks.counts_tokens, blocks.shard, blocks.shards) == (True, rank, 2)
