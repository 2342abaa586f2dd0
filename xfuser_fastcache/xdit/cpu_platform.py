"""Runs an unmodified xfuser on the CPU over gloo.

xfuser supports accelerators only: without one it does not even import. `enable_cpu_platform`
mends what stands in the way while xfuser's modules load, from one table. It is meant for tests and
for trying a layout out; it does nothing where there is an accelerator.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from xfuser_fastcache.patching import PatchingFinder
from xfuser_fastcache.xdit.compat import (
    IncompatibleXfuserError,
    check_xfuser_version,
    has_accelerator,
    replace,
    require,
)
from xfuser_fastcache.xdit.gloo_waits import PIPELINE, pending_sends, receive, send

logger = logging.getLogger("xfuser_fastcache")

_CPU_ATTENTION = ("SDPA", "SDPA_MATH", "SDPA_FLASH")


def enable_cpu_platform() -> bool:
    """Make xfuser usable on a machine without an accelerator.

    Call it before the first import of xfuser. Where xfuser is imported already (it can be under a
    CUDA build of torch without a GPU) its modules are mended in place. Calling again changes
    nothing.

    Returns:
        True where xfuser now runs on the CPU, False where an accelerator is present, in which case
        nothing was changed.

    Raises:
        IncompatibleXfuserError: xfuser is missing or not a known version, or an attribute that has
            to be replaced does not exist (raised here, or by the import of that module).

    """
    if has_accelerator():
        return False
    version = check_xfuser_version()
    if _FINDER in sys.meta_path:
        return True
    if "xfuser" not in sys.modules:
        # An import that failed leaves submodules behind, in which the next one runs in circles.
        for name in [name for name in sys.modules if name.startswith("xfuser.")]:
            del sys.modules[name]
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _FINDER)
    logger.warning(
        "no accelerator found: xfuser %s runs on the CPU over gloo. This is for tests and for "
        "trying things out, not for speed.",
        version,
    )
    return True


def prepare_engine_config(engine_config: Any, pipeline: Any) -> Any:
    """Set in xfuser's engine config what its command line cannot say; call it before wrapping.

    The dtype is set everywhere: PipeFusion allocates its receive buffers with it, and xfuser
    leaves it at float16. The attention backend is chosen only without an accelerator: SDPA, or
    SDPA_FLASH under ring attention, which needs the log-sum-exp that SDPA does not return.

    Args:
        engine_config: what ``xFuserArgs(...).create_config()`` returned first.
        pipeline: the diffusers pipeline that is to be wrapped.

    Returns:
        The same ``engine_config``, changed in place.

    Raises:
        ValueError: the chosen attention backend cannot run on the CPU in this layout.
    """
    runtime = engine_config.runtime_config
    backbone = getattr(pipeline, "transformer", None)
    runtime.dtype = pipeline.dtype if backbone is None else backbone.dtype
    if not has_accelerator():
        _choose_attention(engine_config)
    return engine_config


def _choose_attention(engine_config: Any) -> None:
    runtime, parallel = engine_config.runtime_config, engine_config.parallel_config
    ring = parallel.ring_degree > 1
    allowed = ("SDPA_FLASH",) if ring else _CPU_ATTENTION
    if runtime.attention_backend is None:
        runtime.attention_backend = "SDPA_FLASH" if ring else "SDPA"
    elif runtime.attention_backend.upper() not in allowed:
        raise ValueError(
            f"attention_backend={runtime.attention_backend!r} cannot run on the CPU with "
            f"ring_degree={parallel.ring_degree}; allowed: {', '.join(allowed)}. Leave "
            "--attention_backend out to have it chosen."
        )


def finish(timeout_s: float = 60.0) -> None:
    """Complete the pending sends and meet the other ranks, so that all may leave.

    A rank that exits while a peer still talks to it breaks that peer's sockets. Every rank of the
    job calls this as its last use of `torch.distributed`. Where there is an accelerator no sends
    are kept here, so only the barrier is left; it runs on the host.

    Args:
        timeout_s: how long to wait for the sends, and again for the other ranks, in seconds.

    Raises:
        TimeoutError: a peer did not take what was sent, or ranks did not arrive; they are named.
    """
    pending_sends.drain(timeout_s)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        dist.monitored_barrier(
            host_world_group(), timeout=timedelta(seconds=timeout_s), wait_all_ranks=True
        )
    except RuntimeError as error:
        raise TimeoutError(
            f"not every rank reached finish() within {timeout_s} s; call it on every rank, also "
            f"after an error, or allow more time. Reported: {error}"
        ) from error


def host_world_group() -> Any:
    """A gloo group of all ranks: xfuser's own, where there is one, else a new one."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    state = sys.modules.get("xfuser.core.distributed.parallel_state")
    world = getattr(state, "_WORLD", None)
    return dist.new_group(backend="gloo") if world is None else world.cpu_group


def _constant(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


def _patch_envs(envs: ModuleType) -> None:
    # A CUDA build of torch on a machine without a GPU says "cuda" by its build alone.
    constants = {
        "_is_cuda": False,
        "_is_hip": False,
        "get_device_version": None,
        "get_torch_distributed_backend": "gloo",
        "PACKAGES_CHECKER._on_rdna4": False,
    }
    packages = require(envs, "PACKAGES_CHECKER.packages_info")
    if "has_long_ctx_attn" not in packages:
        require(envs, "PACKAGES_CHECKER.packages_info.has_long_ctx_attn")
    packages["has_long_ctx_attn"] = True
    loaded = [m for n, m in list(sys.modules.items()) if n.startswith("xfuser.") and m is not None]
    for name, value in constants.items():
        constant = functools.partial(_constant, value)
        previous = replace(envs, name, constant)
        for module in loaded:  # copies that `from xfuser.envs import ...` has made
            if vars(module).get(name) is previous:
                setattr(module, name, constant)
    for module in loaded:
        if "HAS_LONG_CTX_ATTN" in vars(module):
            vars(module).update(HAS_LONG_CTX_ATTN=True)


def _patch_process_group(module: ModuleType) -> None:
    from yunchang.globals import PROCESS_GROUP

    replace(module, "PROCESS_GROUP", PROCESS_GROUP)


def _patch_group_coordinator(module: ModuleType) -> None:
    replace(module, "synchronize", functools.partial(_constant, None))
    replace(module, "PipelineGroupCoordinator._communicate_shapes", _communicate_shapes)
    for name, function in PIPELINE.items():
        replace(module, f"PipelineGroupCoordinator.{name}", function)


def _communicate_shapes(
    self: Any, tensor_send_to_next: torch.Tensor | None = None, recv_prev: bool = False
) -> torch.Size:
    # A gloo send completes when the peer posts its receive, and a peer may itself stand here:
    # waiting for both, as xfuser does, deadlocks asynchronous PipeFusion.
    if tensor_send_to_next is not None:
        shape = list(tensor_send_to_next.shape)
        for numbers in ([len(shape)], shape):
            message = torch.tensor(numbers, dtype=torch.int64)
            send(message, self.next_rank, self.device_group)
    if not recv_prev:
        return torch.Size([0, 0, 0])
    dims = torch.empty(1, dtype=torch.int64)
    receive(dims, self.prev_rank, self.device_group).wait()
    received = torch.empty(int(dims), dtype=torch.int64)
    receive(received, self.prev_rank, self.device_group).wait()
    return torch.Size(received.tolist())


def _patch_attention_backend(module: ModuleType) -> None:
    backend = require(module, "AttentionBackendType.SDPA_FLASH")
    registry = require(module, "ATTENTION_FUNCTION_REGISTRY")
    if backend not in registry:
        raise IncompatibleXfuserError(
            f"{module.__name__}.ATTENTION_FUNCTION_REGISTRY has no entry {backend} to replace"
        )
    registry[backend] = _flash_attention_for_cpu


def _flash_attention_for_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (attention_kwargs or {}).get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:  # this kernel only adds
        mask = query.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=mask
    )
    return output, log_sum_exp


def _patch_runtime_state(module: ModuleType) -> None:
    path = "RuntimeState._select_attention_backend"
    select = require(module, path)

    @functools.wraps(select)
    def select_for_cpu(self: Any, engine_config: Any = None) -> Any:
        if engine_config is not None:
            _choose_attention(engine_config)
        return select(self, engine_config)

    replace(module, path, select_for_cpu)


class _HostEvent:
    """Stands in for `torch.cuda.Event`: what it marks is over when the call returns."""

    def __init__(self, enable_timing: bool = False):
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: _HostEvent) -> float:
        """Return the time from this event to `end`, in milliseconds."""
        return (end._seconds - self._seconds) * 1e3


class _HostTorch(ModuleType):
    """torch as xDiT's runner sees it: `torch.cuda` and its generators are the host's."""

    def __init__(self) -> None:
        super().__init__("torch", "torch, with torch.cuda for a host without an accelerator")
        self.cuda = ModuleType("torch.cuda")
        vars(self.cuda).update(
            Event=_HostEvent,
            synchronize=functools.partial(_constant, None),
            empty_cache=functools.partial(_constant, None),
        )

    def Generator(self, device: str = "cpu") -> torch.Generator:
        """Return one of the host's, whatever device is named."""
        return torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _patch_torch(module: ModuleType) -> None:
    replace(module, "torch", _HostTorch())


def _patch_placement(module: ModuleType) -> None:
    path = "place_pipeline_components"
    place = require(module, path)

    @functools.wraps(place)
    def place_on_host(loader: Any) -> None:
        # It ends with pipe.to("cuda:RANK"); the pipeline is on the host already.
        pipe = loader.model.pipe
        vars(pipe)["to"] = functools.partial(_constant, pipe)
        try:
            place(loader)
        finally:
            del vars(pipe)["to"]

    replace(module, path, place_on_host)


def _patch_flux_prepare_run(module: ModuleType) -> None:
    replace(module, "xFuserFluxPipeline.prepare_run", _prepare_run_on_cpu(module, True))


def _patch_flux2_prepare_run(module: ModuleType) -> None:
    replace(module, "xFuserFlux2PipelineBase.prepare_run", _prepare_run_on_cpu(module, True))


def _patch_sd3_prepare_run(module: ModuleType) -> None:
    path = "xFuserStableDiffusion3Pipeline.prepare_run"
    replace(module, path, _prepare_run_on_cpu(module, False))


def _prepare_run_on_cpu(module: ModuleType, pass_sequence_length: bool) -> Callable[..., None]:
    """The warm-up run of FLUX, FLUX.2 and SD3, whose own hard-codes a CUDA generator."""
    get_runtime_state = require(module, "get_runtime_state")

    def prepare_run(self: Any, input_config: Any, steps: int = 3, sync_steps: int = 1) -> None:
        batch = input_config.batch_size
        arguments = {"prompt": [""] * batch if batch > 1 else ""}
        for name in ("height", "width", "output_type"):
            arguments[name] = getattr(input_config, name)
        if pass_sequence_length:
            arguments["max_sequence_length"] = input_config.max_sequence_length
        runtime = get_runtime_state().runtime_config
        before, runtime.warmup_steps = runtime.warmup_steps, sync_steps
        try:
            generator = torch.Generator("cpu").manual_seed(42)
            self(num_inference_steps=steps, generator=generator, **arguments)
        finally:
            runtime.warmup_steps = before

    return prepare_run


class _StaysOnHost:
    """A pipeline class whose pipelines do not go to the CUDA device that Ray's worker names."""

    def __init__(self, pipeline_class: Any):
        self._pipeline_class = pipeline_class

    def from_pretrained(self, **arguments: Any) -> _StaysOnHost:
        self._pipe = self._pipeline_class.from_pretrained(**arguments)
        return self

    def to(self, device: str) -> Any:
        return self._pipe


def _patch_ray_worker(module: ModuleType) -> None:
    path = "DiTWorker.from_pretrained"
    load = require(module, path)

    @functools.wraps(load)
    def from_pretrained(self: Any, PipelineClass: Any, *arguments: Any, **options: Any) -> None:
        load(self, _StaysOnHost(PipelineClass), *arguments, **options)

    replace(module, path, from_pretrained)


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "xfuser.envs": _patch_envs,
    "xfuser.core.distributed.attention_backend": _patch_attention_backend,
    "xfuser.core.distributed.fp8_comms": _patch_process_group,
    "xfuser.core.distributed.group_coordinator": _patch_group_coordinator,
    "xfuser.core.distributed.runtime_state": _patch_runtime_state,
    "xfuser.core.sparge_attention.head_balance": _patch_process_group,
    "xfuser.model_executor.layers.usp": _patch_process_group,
    "xfuser.model_executor.layers.usp_legacy": _patch_process_group,
    **{
        f"xfuser.model_executor.models.runner_models.{name}": _patch_torch
        for name in ("base_model", "ideogram4", "krea2", "ltx")
    },
    "xfuser.model_executor.models.runner_models.loading.placement": _patch_placement,
    "xfuser.model_executor.pipelines.pipeline_flux": _patch_flux_prepare_run,
    "xfuser.model_executor.pipelines.pipeline_flux2": _patch_flux2_prepare_run,
    "xfuser.model_executor.pipelines.pipeline_stable_diffusion_3": _patch_sd3_prepare_run,
    "xfuser.ray.worker.worker": _patch_ray_worker,
    "xfuser.runner": _patch_torch,
}
_FINDER = PatchingFinder(PATCHES)
