"""One rank of `fastcache calibrate`, or of a team of which a rank does not come.

`calibrate_worker.py calibrate FLAGS`: the command. `calibrate_worker.py team`: the waits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import wrap  # noqa: E402

from diffusers_adapters.tiny.flux import tiny_flux  # noqa: E402
from xfuser_fastcache.calibration.team import Ranks  # noqa: E402
from xfuser_fastcache.cli import main  # noqa: E402
from xfuser_fastcache.xdit.loaded import finish, start  # noqa: E402

LIMIT_S = 2.0


def raised(call: Any) -> str:
    """Return the kind and words of what a call raises; "" where it raises nothing."""
    try:
        call()
    except (ValueError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def team() -> None:
    """What two replicas share, what the first says for both, and who is missing in the end."""
    start()
    pipeline, call = tiny_flux(batch=2)
    pipe, _ = wrap(pipeline, call, data_parallel_degree=2)
    ranks = Ranks(pipe.transformer, LIMIT_S)
    rank = dist.get_rank()
    found: dict[str, Any] = {
        "first": ranks.first,
        "drawn by": list(ranks.shared_out(range(5), lambda item: (item, rank))),
        "agreed": ranks.agreed(lambda: rank + 10),
        "error": raised(lambda: ranks.agreed(lambda: int("none" if rank == 0 else "1"))),
        "shares": [list(share) for share in ranks.shares(5)],
        "empty share": raised(lambda: ranks.shares(1)),
    }
    if rank == 0:
        found["missing"] = raised(lambda: ranks.agreed(lambda: 0))
    dist.barrier()
    report(rank, **found)
    finish()


if __name__ == "__main__":
    sys.exit(team() if sys.argv[1] == "team" else main(sys.argv[1:]))
