"""Mends of FLUX.1 by xDiT's runner, and of FLUX.2."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require

_MODELS = "xfuser.model_executor.models.transformers"
FLUX, FLUX2 = f"{_MODELS}.transformer_flux", f"{_MODELS}.transformer_flux2"
# Given a rank's share by a pipeline class, and given all by diffusers' pipeline.
PIPELINED, WHOLE = "xFuserFluxTransformer2DWrapper", "xFuserFlux1Transformer2DWrapper"
PIPELINED2, WHOLE2 = "xFuserFlux2Transformer2DModelWrapper", "xFuserFlux2Transformer2DWrapper"
FLUX2_PIPELINE = "xfuser.model_executor.pipelines.pipeline_flux2"
CALL2 = "xFuserFlux2PipelineBase.__call__"
STEPS2 = "xFuserFlux2PipelineBase._sync_pipeline"


def pads_by_another_name(source: str) -> bool:
    """The method that pads is called by a name that the class does not have."""
    return "self._pad_to_sp_divisible(" in source and "def _pad_to_sp_divisible(" not in source


def pad_by_that_name(module: ModuleType) -> None:
    """Let the method be found by both names."""
    transformer = require(module, WHOLE)
    transformer._pad_to_sp_divisible = require(module, f"{WHOLE}.pad_to_sp_divisible")


def tokens(
    self: Any, hidden_states: Any, encoder_hidden_states: Any, *_args: Any, **_kwargs: Any
) -> tuple[int, int]:
    """Return the tokens of the latents, and the text's where ranks share them.

    FLUX.1 gives each rank all of a text that does not divide, which then is no part of the keys
    that are cut.
    """
    ranks = importlib.import_module("xfuser.core.distributed").get_sequence_parallel_world_size()
    text = encoder_hidden_states.shape[1]
    return hidden_states.shape[1], 0 if text % ranks else text


def reads_layers_of_dev(source: str) -> bool:
    """Dev and klein have one default for the layers of the text encoder, and it is dev's."""
    return "text_encoder_out_layers: tuple = (10, 20, 30)" in source


def read_own_layers(module: ModuleType) -> None:
    """Let the default be that of the diffusers pipeline inside."""
    call = require(module, CALL2)

    @functools.wraps(call)
    def call_with_own_layers(
        self: Any, *args: Any, text_encoder_out_layers: Any = None, **kwargs: Any
    ) -> Any:
        if text_encoder_out_layers is None:
            known = inspect.signature(type(self.module).__call__).parameters
            text_encoder_out_layers = known["text_encoder_out_layers"].default
        return call(self, *args, text_encoder_out_layers=text_encoder_out_layers, **kwargs)

    replace(module, CALL2, call_with_own_layers)


def drops_pictures(source: str) -> bool:
    """The call takes `image`, and never encodes it; nor does it call for a second branch."""
    return "image=None" in source and "prepare_image_latents" not in source


def refuse_what_it_drops(module: ModuleType) -> None:
    """Refuse pictures to edit and klein's guidance in the layouts where they would be dropped.

    Those are all in which the pipeline does not hand its call on to diffusers' own.
    """
    call = require(module, CALL2)

    @functools.wraps(call)
    def call_or_refuse(
        self: Any, image: Any = None, *args: Any, guidance_scale: float = 4.0, **kwargs: Any
    ) -> Any:
        guided = not getattr(self.module.config, "is_distilled", True) and guidance_scale > 1
        dropped = {"image": image is not None, "guidance_scale": guided}
        if any(dropped.values()) and not self.use_naive_forward():
            names = " and ".join(name for name, given in dropped.items() if given)
            raise ValueError(
                f"{type(self).__name__} of xDiT drops {names} in this layout without a word, and "
                "draws another picture; give ulysses_degree or ring_degree without "
                "pipefusion_parallel_degree, in which the pipeline is diffusers' own"
            )
        return call(self, image, *args, guidance_scale=guidance_scale, **kwargs)

    replace(module, CALL2, call_or_refuse)


def looks_for_tensors_in_a_comprehension(source: str) -> bool:
    """What callbacks are given is read from `locals()` inside a comprehension.

    Before Python 3.12 that has locals of its own.
    """
    return "{ k: locals()[k] for k in callback_on" in " ".join(source.split())


def give_callbacks_their_tensors(module: ModuleType) -> None:
    """Take them from the frame of the loop, which is the one that calls back."""
    run = require(module, STEPS2)

    @functools.wraps(run)
    def run_with_tensors(
        self: Any,
        *args: Any,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        **kwargs: Any,
    ) -> Any:
        def call_back(pipeline: Any, step: int, timestep: Any, _: Any) -> Any:
            held = sys._getframe(1).f_locals
            given = {name: held[name] for name in callback_on_step_end_tensor_inputs}
            return callback_on_step_end(pipeline, step, timestep, given)

        return run(
            self,
            *args,
            callback_on_step_end=callback_on_step_end and call_back,
            callback_on_step_end_tensor_inputs=(),
            **kwargs,
        )

    replace(module, STEPS2, run_with_tensors)
