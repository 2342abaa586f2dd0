"""One rank of sequence parallelism: what computed and skipped steps communicate.

FLUX by xfuser's pipeline class, which is given its share of the tokens, and FLUX.1-Kontext by the
class of xfuser's runner, which cuts what it is given and gathers what it puts out.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.matrix import STEPS, build  # noqa: E402
from support.worlds import report  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from xfuser_fastcache import apply_cache_on_transformer, remove_cache  # noqa: E402
from xfuser_fastcache.hooks import hook_on  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402

MODELS = ("flux", "flux-kontext")
FORECASTERS = ("taylor", "output")
MASK = [1, 1, 0, 1, 0, 0, 0, 1]


class Collectives(TorchDispatchMode):
    """Counts the model's collectives of each step; the cache's own do not pass here.

    Attributes:
        steps: of each step, name -> elements that this rank was left with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, list[int]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, if it is one."""
        space, name = op.name().split("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name and self.steps:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.steps[-1].setdefault(name, []).append(max(x.numel() for x in tensors))
        return op(*args, **(kwargs or {}))


def counted(pipe: Any, call: dict[str, Any], forecaster: str) -> dict[str, Any]:
    """Return the collectives of one generation's steps, computed and skipped."""
    apply_cache_on_transformer(
        pipe.transformer, scheduler=pipe.scheduler, steps_mask=MASK, forecaster=forecaster
    )
    engine = hook_on(pipe.transformer).engine
    seen, opened = Collectives(), engine.open

    def opens(arrival: Any) -> None:
        seen.steps.append({})
        opened(arrival)

    engine.open = opens
    vectors = engine.consensus.collectives
    with seen:
        pipe(**call)
    vectors = engine.consensus.collectives - vectors
    remove_cache(pipe.transformer)
    found: dict[str, Any] = defaultdict(list)
    for computed, step in zip(MASK, seen.steps, strict=True):
        found["computed" if computed else "skipped"].append(step)
    return {**found, "vectors": vectors}


def main() -> None:
    """Run the cases and report."""
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    assert len(MASK) == STEPS
    found: dict[str, Any] = {}
    for model in MODELS:
        pipe, call = build(model, 1, ulysses_degree=2)
        found[model] = {name: counted(pipe, call, name) for name in FORECASTERS}
    report(dist.get_rank(), **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
