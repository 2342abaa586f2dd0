"""Bugs of xfuser 0.7.0 that stand between a model and a layout, mended where they are found."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import (
    IncompatibleXfuserError,
    check_xfuser_version,
    replace,
    require,
)
from xfuser_fastcache.xdit.mends import (
    attention,
    flux,
    hunyuan_video,
    krea2,
    ltx2,
    pixart,
    qwen,
    sizes,
    video,
    wan,
    z_image,
)

logger = logging.getLogger("xfuser_fastcache")

_JOINT = "xFuserJointAttnProcessor2_0.__call__"
_SD3_CALL = "xFuserStableDiffusion3Pipeline.__call__"


@dataclass(frozen=True)
class Mend:
    """One bug of xfuser.

    Attributes:
        line: the models and layouts that it breaks, and what goes wrong.
        module: name of xfuser's module that has it.
        function: path in that module of the function that has it.
        recognises: whether that function's source has the bug.
        apply: mends the module in place.
    """

    line: str
    module: str
    function: str
    recognises: Callable[[str], bool]
    apply: Callable[[ModuleType], None]

    def is_needed(self, module: ModuleType) -> bool:
        """Whether `module` has the bug and no earlier call has mended it.

        Raises:
            IncompatibleXfuserError: the function does not exist.
        """
        # The source of the original, however often it is wrapped.
        source = inspect.getsource(require(module, self.function))
        return self.line not in mended(module) and self.recognises(source)


def mend_xfuser() -> list[str]:
    """Mend what is known to be broken in the installed xfuser; call it before building a pipeline.

    Imports xfuser. A mended xfuser is recognised and left alone; calling again changes nothing.

    Returns:
        What was mended by this call, one line each.

    Raises:
        IncompatibleXfuserError: an xfuser that is not tried.
    """
    check_xfuser_version()
    lines = []
    for mend in MENDS:
        try:
            module = importlib.import_module(mend.module)
            needed = mend.is_needed(module)
        except (ModuleNotFoundError, IncompatibleXfuserError) as error:
            logger.warning("not looked for in this xfuser, %s: %s", mend.line, error)
            continue
        if needed:
            mend.apply(module)
            mended(module).append(mend.line)
            lines.append(mend.line)
            logger.info("mended in xfuser: %s", mend.line)
    return lines


def mended(module: ModuleType) -> list[str]:
    """The lines of the mends that were applied to a module of xfuser; kept in the module itself."""
    lines: list[str] = vars(module).setdefault("__mended__", [])
    return lines


def _needs_text_under_sequence_parallelism(source: str) -> bool:
    """`USP` is always handed `joint_strategy`, which is only set where there is text.

    There are two assignments, for text that is split over the ranks and for text that is not; any
    mend of it has to add a third.
    """
    return "joint_strategy=joint_strategy" in source and source.count("joint_strategy = ") == 2


def _attend_without_text(module: ModuleType) -> None:
    """Hand a layer without text on to xfuser's own self-attention, which norms and caches alike."""
    call = require(module, _JOINT)
    self_attention = require(module, "xFuserAttnProcessor2_0")

    @functools.wraps(call)
    def call_with_text(
        self: Any,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is None and self.use_long_ctx_attn_kvcache:
            return self_attention()(attn, hidden_states)
        return call(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
        )

    replace(module, _JOINT, call_with_text)


def _drops_max_sequence_length(source: str) -> bool:
    """The call takes any keyword, and never looks at this one."""
    return "**kwargs" in source and "max_sequence_length" not in source


def _keep_max_sequence_length(module: ModuleType) -> None:
    """Hand the length to the pipeline's own `encode_prompt` while the call runs.

    Without it, T5 pads to 256 tokens on several ranks, whatever was asked for: other pictures than
    on one rank, and more text to compute.
    """
    call = require(module, _SD3_CALL)

    @functools.wraps(call)
    def call_with_length(
        self: Any, *args: Any, max_sequence_length: int | None = None, **kwargs: Any
    ) -> Any:
        if max_sequence_length is None:
            return call(self, *args, **kwargs)
        pipeline = self.module
        encode = pipeline.encode_prompt
        pipeline.encode_prompt = functools.partial(encode, max_sequence_length=max_sequence_length)
        try:
            # On one rank this goes on to diffusers' own call, which takes the length itself.
            return call(self, *args, max_sequence_length=max_sequence_length, **kwargs)
        finally:
            del pipeline.encode_prompt

    replace(module, _SD3_CALL, call_with_length)


def _keeps_receive_buffers(source: str) -> bool:
    """Stages receive into buffers that are renewed only where the size or the batch changes."""
    return "pipeline_recv(" in source and "_reset_recv_buffer" not in source


def _renew_receive_buffers(pipeline: str) -> Callable[[ModuleType], None]:
    """Return what lets stages tell each other their shapes again where the text's has changed.

    Otherwise text is received into a buffer as long as the first generation's: shorter text keeps
    an end of other text, and longer text does not fit. Every stage knows the text itself.
    """
    path = f"{pipeline}._sync_pipeline"

    def apply(module: ModuleType) -> None:
        run = require(module, path)
        get_runtime_state = require(module, "get_runtime_state")
        get_pp_group = require(module, "get_pp_group")

        @functools.wraps(run)
        def run_with_own_shapes(self: Any, *args: Any, **kwargs: Any) -> Any:
            told = vars(get_pp_group())
            text = (pipeline, kwargs["prompt_embeds"].shape)
            if told.get("__text__") != text:
                told["__text__"] = text
                get_runtime_state()._reset_recv_buffer()
            return run(self, *args, **kwargs)

        replace(module, path, run_with_own_shapes)

    return apply


_ATTENTION = "xfuser.model_executor.layers.attention_processor"
_WAN = "xfuser.model_executor.models.transformers.transformer_wan"

MENDS = (
    Mend(
        "SD3 under PipeFusion without sequence parallelism: KV cache updated twice",
        _ATTENTION,
        _JOINT,
        attention.updates_kv_cache_twice,
        attention.update_kv_cache_once(_JOINT),
    ),
    Mend(
        "SD3.5 under sequence parallelism: attention without text crashes",
        _ATTENTION,
        _JOINT,
        _needs_text_under_sequence_parallelism,
        _attend_without_text,
    ),
    Mend(
        "FLUX under sequence parallelism with text that is not split: text counted on every rank",
        flux.FLUX,
        "xFuserFluxAttnProcessor.__call__",
        attention.counts_text_on_every_rank,
        attention.count_text_once(flux.PIPELINED, flux.WHOLE),
    ),
    Mend(
        "PipeFusion with Ulysses: behind synchronous steps a patch's keys replace another one's",
        "xfuser.core.cache_manager.cache_manager",
        "CacheManager._sequence_parallel_cache_update",
        attention.remembers_by_rank,
        attention.remember_by_patch,
    ),
    Mend(
        "FLUX.1 by the runner: tokens that do not divide by the ranks crash",
        flux.FLUX,
        flux.WHOLE,
        flux.pads_by_another_name,
        flux.pad_by_that_name,
    ),
    *(
        Mend(
            f"FLUX.2 under PipeFusion, {blocks}-stream blocks: KV cache updated twice",
            flux.FLUX2,
            f"{processor}.__call__",
            attention.updates_kv_cache_twice,
            attention.update_kv_cache_once(f"{processor}.__call__"),
        )
        for blocks, processor in (
            ("double", "xFuserFlux2AttnProcessor"),
            ("single", "xFuserFlux2ParallelSelfAttnProcessor"),
        )
    ),
    Mend(
        "FLUX.2 under PipeFusion and sequence parallelism: text counted on every rank",
        flux.FLUX2,
        "xFuserFlux2AttnProcessor.__call__",
        attention.counts_text_on_every_rank,
        attention.count_text_once(flux.PIPELINED2),
    ),
    Mend(
        "FLUX.2 klein under PipeFusion: its prompt is read from the layers that dev reads",
        flux.FLUX2_PIPELINE,
        flux.CALL2,
        flux.reads_layers_of_dev,
        flux.read_own_layers,
    ),
    Mend(
        "FLUX.2 under PipeFusion: pictures to edit and klein's guidance are dropped in silence",
        flux.FLUX2_PIPELINE,
        flux.CALL2,
        flux.drops_pictures,
        flux.refuse_what_it_drops,
    ),
    Mend(
        "FLUX.2 under PipeFusion: a callback at a step's end crashes before Python 3.12",
        flux.FLUX2_PIPELINE,
        flux.STEPS2,
        flux.looks_for_tensors_in_a_comprehension,
        flux.give_callbacks_their_tensors,
    ),
    Mend(
        "SD3 on several ranks: max_sequence_length is dropped, T5 pads to 256 tokens",
        "xfuser.model_executor.pipelines.pipeline_stable_diffusion_3",
        _SD3_CALL,
        _drops_max_sequence_length,
        _keep_max_sequence_length,
    ),
    Mend(
        "PixArt: the table of positions of another size stays, and the next pictures differ",
        pixart.MODULE,
        pixart.FORWARD,
        pixart.keeps_another_table,
        pixart.keep_own_table,
    ),
    *(
        Mend(
            f"{name} under PipeFusion: text of another length than before is received wrong",
            f"xfuser.model_executor.pipelines.{module}",
            f"{pipeline}._sync_pipeline",
            _keeps_receive_buffers,
            _renew_receive_buffers(pipeline),
        )
        for name, module, pipeline in (
            ("FLUX", "pipeline_flux", "xFuserFluxPipeline"),
            ("SD3", "pipeline_stable_diffusion_3", "xFuserStableDiffusion3Pipeline"),
            ("FLUX.2", "pipeline_flux2", "xFuserFlux2PipelineBase"),
        )
    ),
    *(
        Mend(
            f"{name} under Ulysses: the padding of tokens that do not divide by the ranks is seen",
            module,
            f"{transformer}.forward",
            attention.attends_to_padding,
            attention.attend_to_real_tokens(transformer, processors, tokens),
        )
        for name, module, transformer, processors, tokens in (
            ("Wan", _WAN, "xFuserWanTransformer3DWrapper", _WAN, attention.patches),
            (
                "Wan VACE",
                f"{_WAN}_vace",
                "xFuserWanVACETransformer3DWrapper",
                _WAN,
                attention.patches,
            ),
            ("FLUX.1", flux.FLUX, flux.WHOLE, flux.FLUX, flux.tokens),
            ("FLUX.2", flux.FLUX2, flux.WHOLE2, flux.FLUX2, flux.tokens),
        )
    ),
    Mend(
        "Wan VACE by the runner: its prompt is handed on as a list, which diffusers refuses",
        wan.RUNNER,
        wan.RUN,
        wan.hands_on_a_list,
        wan.hand_on_one_prompt,
    ),
    Mend(
        "Qwen-Image under Ulysses: the padding of text and tokens that do not divide is seen",
        qwen.MODULE,
        f"{qwen.TRANSFORMER}.forward",
        attention.attends_to_padding,
        qwen.attend_to_real_tokens,
    ),
    Mend(
        "Qwen-Image-Edit-2511 under sequence parallelism: the index of conditions is not cut",
        qwen.MODULE,
        f"{qwen.TRANSFORMER}.forward",
        qwen.leaves_index_whole,
        qwen.cut_index,
    ),
    Mend(
        "Z-Image: diffusers' pipeline gives an argument that xDiT's transformer does not take",
        z_image.MODULE,
        z_image.FORWARD,
        lambda source: "joint_attention_kwargs" not in source,
        z_image.take_attention_kwargs,
    ),
    *(
        Mend(
            f"{name}: sizes in a checkpoint's config are dropped, the default ones are taken",
            module,
            f"xFuser{made}Wrapper.__init__",
            sizes.drops_sizes,
            sizes.name_sizes(f"xFuser{made}Wrapper.__init__", f"{made}Model"),
        )
        for name, module, made in (
            ("Z-Image", z_image.MODULE, "ZImageTransformer2D"),
            ("Krea-2", krea2.MODULE, "Krea2Transformer2D"),
        )
    ),
    Mend(
        "Krea-2: the mask of a text is taken for that of a later one at the same address",
        krea2.MODULE,
        krea2.FORWARD,
        lambda source: "data_ptr" in source,
        krea2.keep_masks_by_tensor,
    ),
    Mend(
        "LTX-2 under Ulysses: the padding of tokens that do not divide by the ranks is seen",
        ltx2.MODULE,
        f"{ltx2.TRANSFORMER}.forward",
        attention.attends_to_padding,
        ltx2.attend_to_real_tokens,
    ),
    Mend(
        "HunyuanVideo: tokens that do not divide by the ranks end in an error of gloo or NCCL",
        hunyuan_video.MODULE,
        hunyuan_video.FORWARD,
        hunyuan_video.shares_unevenly,
        hunyuan_video.refuse_uneven_shares,
    ),
    *(Mend(*found) for found in video.FOUND),
)
