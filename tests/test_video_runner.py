"""CogVideoX and ConsisID as xfuser loads them; its runner knows neither."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from support.worlds import ROOT, run_world

from diffusers_adapters.tiny import TINY_PIPELINES


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("name", ["CogVideoX", "ConsisID"])
def test_xfusers_pipeline_takes_cache_args(tmp_path: Path, name: str) -> None:
    """In `from_pretrained`, and so in the constructor that it calls.

    diffusers has ConsisID's class only beside OpenCV, which nothing here calls.
    """
    pipe, _ = TINY_PIPELINES[name.lower()]()
    pipe.save_pretrained(tmp_path / name)
    script = tmp_path / "load.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import diffusers
            from diffusers_adapters.tiny import TINY_PIPELINES
            from support.films import frames_of
from support.worlds import report
            from xfuser_fastcache import get_cache_statistics
            from xfuser_fastcache.xdit import cpu_platform
            tiny, call = TINY_PIPELINES[{name.lower()!r}]()
            setattr(diffusers, type(tiny).__name__, type(tiny))
            cpu_platform.enable_cpu_platform()
            import torch.distributed as dist
            from xfuser import xFuserArgs, xFuser{name}Pipeline
            engine_config, _ = xFuserArgs(height=64, width=64, ulysses_degree=2).create_config()
            pipe = xFuser{name}Pipeline.from_pretrained(
                {str(tmp_path / name)!r},
                engine_config=engine_config,
                cache_args={{"use_cache": "Fast", "cache_ratio_threshold": 12.0}},
                **dict.fromkeys(("text_encoder", "tokenizer")),
                vae=tiny.vae,
            )
            pipe.set_progress_bar_config(disable=True)
            pipe(**{{**call, "num_inference_steps": 8}})
            found = get_cache_statistics(pipe.transformer)
            report(dist.get_rank(), found=[found["steps"], found["block_approx_ratio"] > 0])
            cpu_platform.finish()
            """
        )
    )
    assert [rank["found"] for rank in run_world(script, 2).values()] == [[8, True]] * 2


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("model", ["cogvideox", "consisid"])
def test_a_model_is_refused_under_pipefusion(tmp_path: Path, model: str) -> None:
    """xDiT draws something wrong there, and says nothing."""
    script = tmp_path / "refused.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            from support.matrix import build
            from support.films import frames_of
from support.worlds import report
            from xfuser_fastcache import apply_cache_on_transformer
            from xfuser_fastcache.xdit import cpu_platform
            cpu_platform.enable_cpu_platform()
            import torch.distributed as dist
            pipe, _ = build({model!r}, 1, pipefusion_parallel_degree=2)
            try:
                apply_cache_on_transformer(pipe.transformer)
            except ValueError as error:
                report(dist.get_rank(), found=str(error))
            cpu_platform.finish()
            """
        )
    )
    for rank in run_world(script, 2).values():
        assert "under PipeFusion: in xDiT its stages hand nothing on" in rank["found"]
