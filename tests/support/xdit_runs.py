"""Pipelines in xfuser's class, a replica's share of a batch, and latents told in a few numbers."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from xfuser_fastcache.xdit import cpu_platform
from xfuser_fastcache.xdit.loaded import class_in_xfuser
from xfuser_fastcache.xdit.runner_classes import as_the_runner_has_it, is_of_runner

_MODELS = "xfuser.model_executor.models"
# What its runner calls pipelines that it says itself what they cannot do.
_RUNNER_MODELS = {
    "WanPipeline": ("wan", "xFuserWan21T2VModel"),
    "WanImageToVideoPipeline": ("wan", "xFuserWan21I2VModel"),
    "WanVACEPipeline": ("wan", "xFuserWan21VACEModel"),
    "FluxKontextPipeline": ("flux", "xFuserFluxKontextModel"),
    "Flux2Pipeline": ("flux", "xFuserFlux2Model"),
    "Flux2KleinPipeline": ("flux", "xFuserFlux2Klein4BModel"),
    "QwenImagePipeline": ("qwen", "xFuserQwenImageModel"),
    "QwenImageEditPipeline": ("qwen", "xFuserQwenImageEditModel"),
    "ZImagePipeline": ("z_image", "xFuserZImageModel"),
    "ZImageTurboPipeline": ("z_image", "xFuserZImageTurboModel"),
    "Krea2Pipeline": ("krea2", "xFuserKrea2RawModel"),
    "HunyuanVideoPipeline": ("hunyuan", "xFuserHunyuanvideoModel"),
    "HunyuanVideo15Pipeline": ("hunyuan", "xFuserHunyuanvideo15Model"),
    "LTX2Pipeline": ("ltx", "xFuserLTX2VideoModel"),
    "Ideogram4Pipeline": ("ideogram4", "xFuserIdeogram4Model"),
}
_TASKS = {"HunyuanVideo15Pipeline": "t2v"}  # where one has to be named


def wrap(pipeline: Any, call: dict[str, Any], **xfuser_args: Any) -> tuple[Any, Any]:
    """Build the configs from ``xFuserArgs`` fields and put xfuser's class around the pipeline.

    A pipeline that xfuser has no class for there is run as its runner would.

    Returns:
        The wrapped pipeline and xfuser's ``InputConfig``.
    """
    import xfuser

    arguments = xfuser.xFuserArgs(
        height=call["height"],
        width=call["width"],
        num_inference_steps=call["num_inference_steps"],
        max_sequence_length=call.get("max_sequence_length", 256),
        output_type="latent",
        task=_TASKS.get(type(pipeline).__name__),
        model="Wan2.1-VACE-1.3B",  # only the runner's VACE asks which one it is
        **xfuser_args,
    )
    engine_config, input_config = arguments.create_config()
    cpu_platform.prepare_engine_config(engine_config, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__ in _RUNNER_MODELS:
        module, runner_model = _RUNNER_MODELS[type(pipeline).__name__]
        runner_models = importlib.import_module(f"{_MODELS}.runner_models.{module}")
        getattr(runner_models, runner_model)(arguments)
    parallel = engine_config.parallel_config
    of_runner = is_of_runner(pipeline, parallel)
    if parallel.pp_degree == 1 and of_runner:
        return as_the_runner_has_it(pipeline, engine_config), input_config
    return class_in_xfuser(pipeline)(pipeline, engine_config), input_config


def latents_of(output: Any) -> Any:
    """Return what a pipeline has put out, pictures or videos; None on a rank without."""
    if output is None:
        return None
    found = output.frames if hasattr(output, "frames") else output.images
    # CogVideoX has a list of nothing there.
    return found if hasattr(found, "shape") else None


def own_share(call: dict[str, Any], batch: int) -> dict[str, Any]:
    """This data-parallel replica's samples, with generators that start anew.

    xfuser splits a list of prompts itself, but leaves embeddings alone. What is one for all, in a
    tuple or a tensor of one row, each replica has.
    """
    import torch
    from xfuser.core.distributed import get_data_parallel_rank, get_data_parallel_world_size

    size = batch // get_data_parallel_world_size()
    share = slice(get_data_parallel_rank() * size, (get_data_parallel_rank() + 1) * size)
    own = {
        name: value[share]
        if isinstance(value, torch.Tensor | list) and len(value) == batch
        else value
        for name, value in call.items()
    }
    generators = [torch.Generator("cpu").manual_seed(1000 + i) for i in range(batch)][share]
    own["generator"] = generators if isinstance(call["generator"], list) else generators[0]
    return own


def describe(latents: Any) -> dict[str, Any]:
    """Norm, norm of each sample, eight values and a digest; None on a rank that has no latents."""
    if latents is None:
        return {"norm": None}
    values = latents.double()
    return {
        "norm": values.norm().item(),
        "sample_norms": [sample.norm().item() for sample in values],
        "values": values.flatten()[:: max(1, values.numel() // 8)][:8].tolist(),
        "sha256": hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest(),
    }
