"""Loads pipelines: diffusers' own in one process, or in xfuser's class on the ranks of a layout."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xfuser_fastcache.xdit import cpu_platform, weights
from xfuser_fastcache.xdit.mends import mend_xfuser
from xfuser_fastcache.xdit.runner_classes import as_the_runner_has_it, is_of_runner, refuse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A file of arguments of the pipeline's call that the folder of a model may hold.
CALL = "call.json"
# Without OpenCV, xfuser registers its class for a stand-in of the pipeline that is named here.
_UNREGISTERED = {"ConsisIDPipeline": "xFuserConsisIDPipeline"}


def dtype_of(name: str | None, on_gpu: bool) -> torch.dtype:
    """Return a dtype by its name in `DTYPES`; None for bfloat16, float32 without a GPU."""
    return DTYPES[name or ("bfloat16" if on_gpu else "float32")]


def call_arguments(model: str) -> dict[str, Any]:
    """Return the arguments of a call that a model's folder brings along; empty for other models.

    Raises:
        ValueError: the file does not hold an object of JSON.
    """
    path = Path(model) / CALL
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r}; give an object: argument -> value")
    return found


def known_arguments(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return `call`, if the pipeline takes all of it.

    Raises:
        ValueError: an argument that its call does not know.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(call) - set(known))
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(name for name in known if name != 'self')}"
        )
    return dict(call)


def load_pipeline(model: str, dtype: str | None = None) -> Any:
    """Return diffusers' own pipeline, on the GPU where there is one, without its progress bar.

    Args:
        model: a diffusers folder or hub name.
        dtype: see `dtype_of`.
    """
    from diffusers import DiffusionPipeline

    on_gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype_of(dtype, on_gpu))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if on_gpu else pipe


# ---- in xfuser's class --------------------------------------------------------------------------


def start() -> None:
    """Make the process a rank, also where torchrun did not start it, and let xfuser run on it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    cpu_platform.enable_cpu_platform()


def finish(limit_s: float = 60.0) -> None:
    """Leave together with the other ranks; `limit_s` and errors as of `cpu_platform.finish`."""
    cpu_platform.finish(limit_s)
    dist.destroy_process_group()


def xdit_parser(**options: Any) -> argparse.ArgumentParser:
    """Return a parser of xDiT's flags, none of them required; `options` are argparse's."""
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    flags = FlexibleArgumentParser(conflict_handler="resolve", allow_abbrev=False, **options)
    xFuserArgs.add_cli_args(flags)
    for action in flags._actions:
        action.required = False  # a config file may give it
    flags.set_defaults(model="")  # xDiT's default would be loaded where none is given
    weights.add_flags(flags)
    return flags


def load_in_layout(options: argparse.Namespace, dtype: str | None = None) -> Any:
    """Load a model in xfuser's class, in the layout that xDiT's flags ask for.

    Args:
        options: of `xdit_parser`.
        dtype: see `dtype_of`.

    Raises:
        ValueError: flags that do nothing here or contradict each other; see `weights.check`.
    """
    from diffusers import DiffusionPipeline
    from xfuser import xFuserArgs

    mend_xfuser()
    # As a flag, `use_cache` is DiTFastAttn's; a name is one of our backends.
    xdits = {"use_cache": options.use_cache is True, "cache_method": None, "cache_config": None}
    arguments = xFuserArgs.from_cli_args(argparse.Namespace(**{**vars(options), **xdits}))
    on_gpu = cpu_platform.has_accelerator()
    weights.check(options, arguments, on_gpu)
    engine_config, _ = arguments.create_config()
    chosen = dtype_of(dtype, on_gpu)
    pipeline = DiffusionPipeline.from_pretrained(
        options.model, torch_dtype=chosen, **weights.loading(options, chosen)
    )
    if getattr(options, "image", None):
        pipeline = _beginning_with_a_picture(pipeline, chosen)
    device = torch.device("cpu")
    if on_gpu:
        from xfuser.core.distributed import get_world_group

        device = torch.device(f"cuda:{get_world_group().local_rank}")
    weights.quantise(pipeline, options, arguments, device)
    pipe = _in_xfusers_class(pipeline, engine_config)
    weights.place(pipe, options, device)
    return pipe


def _beginning_with_a_picture(pipeline: Any, dtype: torch.dtype) -> Any:
    """Return a pipeline that takes a picture: of Wan 2.2 TI2V the other one of its two.

    Its folder names the pipeline for text alone.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    if "image" in known or not getattr(pipeline.config, "expand_timesteps", False):
        return pipeline
    import diffusers

    return diffusers.WanImageToVideoPipeline.from_pipe(pipeline, torch_dtype=dtype)


def put_in_layout(pipeline: Any, **arguments: Any) -> Any:
    """Put a pipeline that is there in xfuser's class, in a layout; on the host.

    Args:
        pipeline: diffusers' own.
        **arguments: fields of `xFuserArgs`.
    """
    from xfuser import xFuserArgs

    mend_xfuser()
    engine_config, _ = xFuserArgs(**arguments).create_config()
    return _in_xfusers_class(pipeline, engine_config)


def class_in_xfuser(pipeline: Any) -> Any:
    """Return xfuser's class around a pipeline.

    Args:
        pipeline: diffusers' own.

    Raises:
        ValueError: there is none.
    """
    import xfuser
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    name = _UNREGISTERED.get(type(pipeline).__name__)
    return getattr(xfuser, name) if name else xFuserPipelineWrapperRegister.get_class(pipeline)


def _in_xfusers_class(pipeline: Any, engine_config: Any) -> Any:
    cpu_platform.prepare_engine_config(engine_config, pipeline)
    if is_of_runner(pipeline, engine_config.parallel_config):
        refuse(pipeline, engine_config.parallel_config)
        return as_the_runner_has_it(pipeline, engine_config)
    return class_in_xfuser(pipeline)(pipeline, engine_config)
