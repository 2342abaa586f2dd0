"""Pipelines that xDiT has no class for: diffusers' own, with the transformers of xDiT's runner.

Those are given all latents on every rank, cut them by themselves and gather in the end.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from accelerate import init_empty_weights
from torch import nn

_MODELS = "xfuser.model_executor.models.transformers"
# Class of a diffusers transformer -> the runner's subclass of it, or what makes that when called.
TRANSFORMERS = {
    "FluxTransformer2DModel": (f"{_MODELS}.transformer_flux", "xFuserFlux1Transformer2DWrapper"),
    "Flux2Transformer2DModel": (f"{_MODELS}.transformer_flux2", "xFuserFlux2Transformer2DWrapper"),
    "WanTransformer3DModel": (f"{_MODELS}.transformer_wan", "xFuserWanTransformer3DWrapper"),
    "WanVACETransformer3DModel": (
        f"{_MODELS}.transformer_wan_vace",
        "xFuserWanVACETransformer3DWrapper",
    ),
    "QwenImageTransformer2DModel": (
        f"{_MODELS}.transformer_qwen",
        "xFuserQwenImageTransformerWrapper",
    ),
    "ZImageTransformer2DModel": (
        f"{_MODELS}.transformer_z_image",
        "xFuserZImageTransformer2DWrapper",
    ),
    "Krea2Transformer2DModel": (f"{_MODELS}.transformer_krea2", "xFuserKrea2Transformer2DWrapper"),
    "HunyuanVideoTransformer3DModel": (
        f"{_MODELS}.transformer_hunyuan_video",
        "xFuserHunyuanVideoTransformer3DWrapper",
    ),
    "HunyuanVideo15Transformer3DModel": (
        f"{_MODELS}.transformer_hunyuan_video15",
        "xFuserHunyuanVideo15Transformer3DWrapper",
    ),
    "Ideogram4Transformer2DModel": (
        f"{_MODELS}.transformer_ideogram4",
        "get_ideogram4_transformer_wrapper_class",
    ),
    "LTX2VideoTransformer3DModel": (
        f"{_MODELS}.transformer_ltx2",
        "xFuserLTX2VideoTransformer3DWrapper",
    ),
}
# Class of a diffusers pipeline -> the runner's subclass of it, which shares guidance out.
PIPELINES = {
    "WanImageToVideoPipeline": (
        "xfuser.model_executor.pipelines.pipeline_wan_i2v",
        "xFuserWanImageToVideoPipeline",
    ),
    "QwenImageEditPipeline": (
        "xfuser.model_executor.pipelines.pipeline_qwen_image_edit",
        "xFuserQwenImageEditPipeline",
    ),
    "Ideogram4Pipeline": (
        "xfuser.model_executor.pipelines.pipeline_ideogram4",
        "get_ideogram4_pipeline_class",
    ),
}
# Those whose class xDiT has, and registers only where its module is imported.
UNLISTED = {"FluxControlPipeline": "xfuser.model_executor.pipelines.pipeline_flux_control"}
# Those that xDiT has a pipeline class for, which its runner takes for PipeFusion alone: it knows
# neither pictures to edit nor guidance by a second call.
OF_PIPEFUSION = ("Flux2Pipeline", "Flux2KleinPipeline")

# Those whose transformer shares guidance out by itself: both branches come in one batch.
GUIDED_IN_A_BATCH = ("ZImagePipeline",)
# Those that xDiT's runner refuses ring attention for.
WITHOUT_RING = ("Krea2Pipeline",)


# What loaders of HunyuanVideo and Ideogram-4 call, and not their constructors.
_OF_LOADERS = (
    "install_xdit_attention_processors",
    "_install_xfuser_processors",
    "_init_sp_state",
)


def is_of_runner(pipeline: Any, parallel: Any) -> bool:
    """Say whether a pipeline stays diffusers' own in a layout, with the runner's transformer.

    Args:
        pipeline: diffusers' own.
        parallel: of xfuser's engine config: its degrees.
    """
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    if type(getattr(pipeline, "transformer", None)).__name__ not in TRANSFORMERS:
        return False
    if type(pipeline).__name__ in OF_PIPEFUSION:
        return parallel.pp_degree == 1
    if type(pipeline).__name__ in UNLISTED:
        importlib.import_module(UNLISTED[type(pipeline).__name__])
    try:
        xFuserPipelineWrapperRegister.get_class(pipeline)
    except ValueError:
        return True
    return False


def as_the_runner_has_it(pipeline: Any, engine_config: Any) -> Any:
    """Put the runner's classes in a pipeline, in place; weights are taken over, not copied.

    Args:
        pipeline: diffusers' own, of those that `is_of_runner` knows.
        engine_config: of xfuser.

    Returns:
        The same pipeline.
    """
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state

    for part in ("transformer", "transformer_2", "unconditional_transformer"):
        held = getattr(pipeline, part, None)
        if held is not None:
            made = _class_of(TRANSFORMERS[type(held).__name__])
            setattr(pipeline, part, _converted(held, made))
    own = PIPELINES.get(type(pipeline).__name__)
    if own is not None:
        pipeline.__class__ = _class_of(own)  # its call alone differs
    if type(pipeline).__name__ == "Krea2Pipeline":
        # xDiT's state reads it there, and the runner puts it there.
        pipeline.transformer.config.patch_size = pipeline.patch_size
    initialize_runtime_state(pipeline, engine_config)
    # Attention of FLUX.1 reads how long the text may be, which it needs under PipeFusion alone.
    get_runtime_state().max_condition_sequence_length = 0
    return pipeline


def refuse(pipeline: Any, parallel: Any) -> None:
    """Refuse what xDiT's runner refuses for a pipeline.

    Args:
        pipeline: diffusers' own.
        parallel: of xfuser's engine config: its degrees.

    Raises:
        ValueError: it says which flag.
    """
    name = type(pipeline).__name__
    refused = {
        "pipefusion_parallel_degree": parallel.pp_degree > 1,
        "ring_degree": parallel.ring_degree > 1 and name in WITHOUT_RING,
        "use_cfg_parallel": parallel.cfg_degree > 1
        and name not in (*PIPELINES, *GUIDED_IN_A_BATCH),
    }
    for flag, asked in refused.items():
        if asked:
            raise ValueError(
                f"{name} does not support {flag} in xDiT, which has no pipeline class for it; give "
                + ("ulysses_degree" if name in WITHOUT_RING else "ulysses_degree, ring_degree")
                + " or data_parallel_degree"
            )


def _class_of(place: tuple[str, str]) -> Any:
    module, name = place
    found = getattr(importlib.import_module(module), name)
    return found if inspect.isclass(found) else found()


def _converted(model: Any, kind: Any) -> nn.Module:
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with init_empty_weights(include_buffers=False):
        made = kind(**config)
    for name in _OF_LOADERS:
        if hasattr(made, name):
            getattr(made, name)()
    made.load_state_dict(model.state_dict(), assign=True)
    return made.requires_grad_(False).train(model.training)
