"""docs/extending.md, executed: a model of another package, by entry point. Pure CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)

from xfuser_fastcache import (
    apply_cache_on_pipeline,
    get_cache_statistics,
    remove_cache_from_pipeline,
)
from xfuser_fastcache.plugins import look_again

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text("utf-8")
STEPS = 8


def block(mark: str) -> str:
    """Return the code under a mark of the page."""
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's package as pip would lay it out: the module, and metadata beside it."""
    (tmp_path / "aura_flow.py").write_text(block("file: aura_flow.py"))
    project = block("file: aura_flow.toml")
    name, version = (re.search(rf'{key} = "(.+)"', project)[1] for key in ("name", "version"))
    group, entry = re.search(r'entry-points\."(.+)"\]\n(.+)', project).groups()
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + entry.replace('"', "") + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    look_again()
    yield
    look_again()


def aura_flow() -> tuple[AuraFlowPipeline, dict[str, Any]]:
    """Return a tiny AuraFlow with random weights, and the arguments of a call with guidance."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    ).eval()
    vae = AutoencoderKL(  # for its factor of 8
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
    )
    pipe = AuraFlowPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "height": 128,
        "width": 128,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    for prefix, value in (("", 1.0), ("negative_", 0.0)):
        call[f"{prefix}prompt_embeds"] = torch.full((1, 8, 32), value)
        call[f"{prefix}prompt_attention_mask"] = torch.ones(1, 8)
    return pipe, call


def drawn(pipe: AuraFlowPipeline, call: dict[str, Any]) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(1)).images


def test_the_pages_program_skips_blocks(installed: None, capsys: Any) -> None:
    pipe, call = aura_flow()
    exec(block("program"), {"pipe": pipe, "call": call})
    assert 0.2 < float(capsys.readouterr().out) < 0.9


WAYS: dict[str, dict[str, Any]] = {
    "spans": {},
    "output": {"forecaster": "output"},
    "first block": {"use_cache": "Fb"},
    "modulated input": {"use_cache": "Tea"},
    "blocks": {"granularity": "block"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_pages_model_runs_cached(installed: None, way: str) -> None:
    pipe, call = aura_flow()
    uncached = drawn(pipe, call)
    for threshold, changes in ((0.0, False), (10.0, True)):
        apply_cache_on_pipeline(pipe, cache_ratio_threshold=threshold, **WAYS[way])
        found, statistics = drawn(pipe, call), get_cache_statistics(pipe.transformer)
        assert torch.equal(found, uncached) != changes
        assert found.isfinite().all()
        assert (statistics["block_approx_ratio"] > 0.2) == changes
        assert (statistics["steps"], statistics["clock"]) == (STEPS, "scheduler")
        remove_cache_from_pipeline(pipe)
    assert torch.equal(drawn(pipe, call), uncached)


@pytest.mark.parametrize("static_kv", ["reuse", "drop"])
def test_its_tokens_may_stand_still(installed: None, static_kv: str) -> None:
    pipe, call = aura_flow()
    uncached = drawn(pipe, call)
    for threshold, changes in ((0.0, False), (0.5, True)):
        apply_cache_on_pipeline(
            pipe, cache_ratio_threshold=0.0, motion_threshold=threshold, static_kv=static_kv
        )
        found, statistics = drawn(pipe, call), get_cache_statistics(pipe.transformer)
        assert torch.equal(found, uncached) != changes
        assert (statistics["spatial_approx_ratio"] > 0.2) == changes
        remove_cache_from_pipeline(pipe)


def test_it_is_refused_where_it_is_not_installed() -> None:
    pipe, _ = aura_flow()
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel"):
        apply_cache_on_pipeline(pipe)
