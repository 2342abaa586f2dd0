"""Bugs of xfuser: the mend makes the layout run, exactly where it can be exact."""

from __future__ import annotations

import json
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, WorldFailed, launch

from xfuser_fastcache.xdit import mends
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

SD3 = ("--model", "sd3", "--pipefusion_parallel_degree", "2", "--warmup_steps")


def norms(printed: str) -> list[float]:
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [line["norm"] for line in lines if line["norm"] is not None]


@pytest.mark.gloo
def test_sd3_under_pipefusion_crashes_unmended_and_equals_one_rank_mended(tmp_path: Path) -> None:
    """In synchronous steps no patch is stale, so the result is one rank's."""
    with pytest.raises(WorldFailed):
        launch("xdit_control.py", 2, *SD3, "1", timeout_s=120)
    script = tmp_path / "mended.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT / "tests")!r})
            from xfuser_fastcache.xdit import cpu_platform, mends
            cpu_platform.enable_cpu_platform()
            assert len(mends.mend_xfuser()) == 1
            assert mends.mend_xfuser() == []
            import xdit_control
            xdit_control.main()
            """
        )
    )
    (alone,) = norms(launch("xdit_control.py", 1, "--model", "sd3", timeout_s=120))
    # Three steps: all of them synchronous, then two of them asynchronous.
    synchronous, stale = norms(launch(script, 2, *SD3, "3", "1", timeout_s=120))
    assert synchronous == pytest.approx(alone, rel=1e-6)
    assert stale == pytest.approx(alone, rel=1e-2)


def test_a_mended_xfuser_is_left_alone() -> None:
    class Mended:
        def __call__(self, attn: Any) -> None:
            attn_layer = None if self.use_long_ctx_attn_kvcache else attn
            self.update_and_get_kv_cache(attn_layer=attn_layer)

    module = types.ModuleType("attention_processor")
    module.xFuserJointAttnProcessor2_0 = Mended
    assert not mends._updates_kv_cache_twice(module)


def test_the_installed_xfuser_has_the_bug_or_has_been_mended() -> None:
    enable_cpu_platform()
    from xfuser.model_executor.layers import attention_processor

    call = attention_processor.xFuserJointAttnProcessor2_0.__call__
    found = mends._updates_kv_cache_twice(attention_processor)
    assert found or hasattr(call, "__wrapped__")
