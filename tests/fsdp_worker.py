"""One rank of a job whose transformer FSDP has cut, as xDiT's runner cuts it.

`fsdp_worker.py replicas`: two data-parallel replicas that draw a prompt each and share weights.
`fsdp_worker.py kinds KIND FOLDER`: one prompt, and every method; KIND is FSDP1 or FSDP2.

FSDP1 asks for an accelerator; here it is given the host's streams, which are none.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.calibrations import fitted_for  # noqa: E402
from support.flux import STEPS, Flux  # noqa: E402
from support.worlds import report  # noqa: E402
from support.xdit_runs import own_share, wrap  # noqa: E402

from diffusers_adapters.tiny.sd3 import tiny_sd3  # noqa: E402
from xfuser_fastcache import (  # noqa: E402
    apply_cache_on_transformer,
    get_cache_statistics,
    remove_cache,
)
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.groups import XDiTLayout  # noqa: E402

LISTS = ("transformer_blocks", "single_transformer_blocks")
SYNC_TIMEOUT_S = 20.0
# The two prompts of `tiny_sd3` differ in which steps change less than this.
THRESHOLD = 0.17


def digest(latents: torch.Tensor | None) -> str | None:
    """Return the digest of latents; None on a rank without output."""
    if latents is None:
        return None
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


class Gathers:
    """Counts all-gathers of weights, each of one block or of what is outside of blocks."""

    def __init__(self, kind: str) -> None:
        from torch.distributed.fsdp import _flat_param
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group

        self.count = 0
        self.owner, self.name = {
            "FSDP1": (_flat_param.FlatParamHandle, "_all_gather_flat_param"),
            "FSDP2": (_fsdp_param_group, "foreach_all_gather"),
        }[kind]
        self.original = getattr(self.owner, self.name)

    def __enter__(self) -> Gathers:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self.original)


def shard(transformer: Any, group: Any, blocks: tuple[str, ...], kind: str = "FSDP2") -> Any:
    """Cut the weights as xDiT's runner does: by FSDP2 where it quantises or loads sparingly."""
    from torch.distributed.fsdp import _common_utils, fully_sharded_data_parallel
    from xfuser.core.distributed.sharding import shard_component

    def on_host(state: Any, *_: Any) -> Any:
        state._device_handle = _common_utils._FSDPDeviceHandle(torch.device("cpu"), torch.cpu)
        return state

    fully_sharded_data_parallel._init_device_handle = on_host
    two = kind == "FSDP2"
    return shard_component(
        transformer,
        list(blocks),
        group,
        0 if two else None,
        memory_efficient_init=two,
        forward_prefetch=False,
        sync_module_states=False,
    )


def attributes(module: Any) -> dict[str, list[str]]:
    """Return the names that each module has in its own dictionary."""
    return {name: sorted(vars(child)) for name, child in module.named_modules()}


def kinds(kind: str, directory: Path) -> dict[str, Any]:
    """One prompt; uncached, never skipping, skipping, each gate, a calibration, removed."""
    dist.init_process_group("gloo")
    whole = Flux()
    uncached = whole()
    fitted = fitted_for(whole.pipe, STEPS)
    path = directory / f"{dist.get_rank()}.safetensors"
    fitted.save(path)
    flux = Flux()
    flux.pipe.transformer = flux.transformer = shard(
        flux.transformer, dist.group.WORLD, LISTS, kind
    )
    flux()  # FSDP1 gathers what is outside of blocks once and keeps it
    with Gathers(kind) as gathers:
        found: dict[str, Any] = {"uncached": torch.equal(flux(), uncached)}
    found["gathers"] = {"uncached": gathers.count}
    before = attributes(flux.transformer)
    cases = {
        "never": {"cache_ratio_threshold": 0.0},
        "Fast": {},
        "Tea": {"use_cache": "Tea"},
        "Fb": {"use_cache": "Fb"},
        "output": {"forecaster": "output"},
        "calibrated": {"calibration": str(path), "cache_ratio_threshold": 0.3},
    }
    plain = Flux()
    for name, options in cases.items():
        for case in (plain, flux):
            case.cache(**options, sync_timeout_s=SYNC_TIMEOUT_S)
        wanted = plain()
        with Gathers(kind) as gathers:
            drawn = flux()
        found[name] = {
            "same": torch.equal(drawn, wanted),
            "hits": get_cache_statistics(flux.transformer)["block_approx_ratio"],
            "costs": get_cache_statistics(flux.transformer)["blocks"]
            == get_cache_statistics(plain.transformer)["blocks"],
        }
        found["gathers"][name] = gathers.count
        for case in (plain, flux):
            remove_cache(case.transformer)
    found["left"] = attributes(flux.transformer) == before
    found["removed"] = torch.equal(flux(), uncached)
    return found


def replicas() -> dict[str, Any]:
    """Both replicas draw at once, a prompt each, and share the weights of one transformer."""
    from xfuser.core.distributed import get_data_parallel_rank
    from xfuser.core.distributed.parallel_state import get_fs_group

    pipeline, both = tiny_sd3(batch=2)
    both["num_inference_steps"] = 10
    pipe, _ = wrap(pipeline, both, data_parallel_degree=2, fully_shard_degree=2)
    call = own_share(both, 2)
    found: dict[str, Any] = {"replica": get_data_parallel_rank()}
    found["whole"] = digest(pipe(**own_share(both, 2)).images)
    transformer = shard(pipe.transformer, get_fs_group().device_group, LISTS[:1])
    pipe.transformer = transformer
    found["group"] = XDiTLayout().decision_group().ranks
    found["uncached"] = digest(pipe(**call).images)
    apply_cache_on_transformer(
        transformer,
        scheduler=pipe.scheduler,
        cache_ratio_threshold=THRESHOLD,
        sync_timeout_s=SYNC_TIMEOUT_S,
        verify_consensus=True,
    )
    found["latents"] = digest(pipe(**own_share(both, 2)).images)
    statistics = get_cache_statistics(transformer)
    found["decisions"], found["hits"] = (
        statistics["decisions_digest"],
        statistics["block_approx_ratio"],
    )
    remove_cache(transformer)
    found["removed"] = digest(pipe(**own_share(both, 2)).images)
    return found


def main() -> None:
    """Run a case and report."""
    cpu_platform.enable_cpu_platform()
    found = replicas() if sys.argv[1] == "replicas" else kinds(sys.argv[2], Path(sys.argv[3]))
    report(dist.get_rank(), **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
