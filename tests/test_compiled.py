"""What xDiT's `--use_torch_compile` compiles as a whole is compiled block by block for a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.flux import Flux
from torch import nn
from torch._dynamo.testing import CompileCounter

from xfuser_fastcache import CacheConfig, get_cache_statistics, remove_cache
from xfuser_fastcache.consensus.topology import PlainLayout
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.xdit.compiled import compile_by_blocks

SKIPS = CacheConfig.from_dict({"cache_ratio_threshold": 1.0})
BLOCKS = 6


def of_pipelines(flux: Flux, **how: Any) -> None:
    """As xfuser's pipelines do."""
    flux.transformer.forward = torch.compile(flux.transformer.forward, **how)


def of_the_runner(flux: Flux, **how: Any) -> None:
    """As xfuser's runner does with models whose blocks it does not know."""
    flux.pipe.transformer = torch.compile(flux.transformer, **how)


def in_place(flux: Flux, **how: Any) -> None:
    """As xfuser's runner does with HunyuanVideo."""
    flux.transformer.compile(**how)


WAYS = pytest.mark.parametrize(
    "compile_it",
    [
        of_pipelines,
        *(pytest.param(how, marks=pytest.mark.slow) for how in (of_the_runner, in_place)),
    ],
)


def blocks_of(flux: Flux) -> list[nn.Module]:
    model = flux.pipe.transformer
    return [*model.transformer_blocks, *model.single_transformer_blocks]


@WAYS
def test_the_whole_becomes_its_blocks_which_the_cache_skips(
    compile_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counted, whole = CompileCounter(), CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    plain, flux = Flux(), Flux()
    for block in blocks_of(plain):
        block.compile()
    wanted, graphs = plain(), counted.frame_count
    compile_it(flux, backend=whole)
    compile_by_blocks(flux.pipe, SKIPS, PlainLayout())
    flux.transformer = flux.pipe.transformer
    assert torch.equal(flux.cache(cache_ratio_threshold=0.0)(), wanted)
    remove_cache(flux.transformer)
    flux.cache()()
    assert get_cache_statistics(flux.transformer)["block_approx_ratio"] > 0
    assert whole.frame_count == 0
    # Two kinds of blocks have one graph each; the pipelines' blocks share them.
    assert 0 < graphs == counted.frame_count


@WAYS
def test_what_stands_in_for_the_whole_forward_keeps_the_whole(compile_it: Any) -> None:
    torch._dynamo.reset()
    whole = CompileCounter()
    flux = Flux()
    wanted = flux()
    compile_it(flux, backend=whole)
    config = CacheConfig.from_dict({"forecaster": "output"})
    compile_by_blocks(flux.pipe, config, PlainLayout())
    flux.transformer = flux.pipe.transformer
    assert all(block._compiled_call_impl is None for block in blocks_of(flux))
    flux.cache(forecaster="output", cache_ratio_threshold=0.0)
    assert torch.allclose(flux(), wanted, atol=1e-5)
    assert hook_on(flux.transformer) is not None
    assert whole.frame_count > 0
    remove_cache(flux.transformer)
    assert hook_on(flux.transformer) is None


def test_what_was_not_compiled_is_left_alone() -> None:
    flux = Flux()
    before = dict(vars(flux.transformer))
    compile_by_blocks(flux.pipe, SKIPS, PlainLayout())
    assert vars(flux.transformer) == before
    assert all(block._compiled_call_impl is None for block in blocks_of(flux))
