"""One rank whose attention follows a schedule of xfuser's: which backend each forward pass has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.worlds import report  # noqa: E402
from support.xdit_runs import own_share, wrap  # noqa: E402

from diffusers_adapters.tiny.wan import tiny_wan  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

STEPS = 8
# The second generation must begin where a skipped step has ended the first one.
MASK = [1, 1, 0, 1, 0, 1, 1, 0]


def main() -> None:
    """Draw two videos uncached, and two by a mask."""
    cpu_platform.enable_cpu_platform()
    from xfuser.core.distributed import get_runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.core.distributed.attention_schedule import AttentionSchedule

    from xfuser_fastcache import apply_cache_on_transformer

    pipe, call = tiny_wan()
    call["num_inference_steps"] = STEPS
    pipe, _ = wrap(pipe, call)
    state, calls = get_runtime_state(), 2 * STEPS
    kinds = [AttentionBackendType.SDPA, AttentionBackendType.SDPA_MATH]
    schedule = [kinds[index // 3 % 2] for index in range(calls)]
    state.set_attention_schedule(AttentionSchedule(schedule), total_steps=calls)
    ran: list[str] = []
    pipe.transformer.proj_out.register_forward_hook(
        lambda *_: ran.append(state.attention_backend.name)
    )

    def drawn() -> list[str]:
        ran.clear()
        for _ in range(2):
            pipe(**own_share(call, 1))
        return list(ran)

    found: dict[str, Any] = {"uncached": drawn()}
    apply_cache_on_transformer(pipe.transformer, steps_mask=MASK)
    found["cached"] = drawn()
    report(0, found=found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
