"""Bugs of xfuser 0.7.0 that stand between a model and a layout, mended where they are found."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit import qwen_mends, z_image_mends
from xfuser_fastcache.xdit.compat import check_xfuser_version, replace, require

logger = logging.getLogger("xfuser_fastcache")

_JOINT = "xFuserJointAttnProcessor2_0.__call__"
_FLUX = "xFuserFluxAttnProcessor.__call__"
_SD3_CALL = "xFuserStableDiffusion3Pipeline.__call__"
_FLUX_FORWARD = "xFuserFluxTransformer2DWrapper.forward"


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
        IncompatibleXfuserError: an xfuser that is not known.
    """
    check_xfuser_version()
    lines = []
    for mend in MENDS:
        module = importlib.import_module(mend.module)
        if mend.is_needed(module):
            mend.apply(module)
            mended(module).append(mend.line)
            lines.append(mend.line)
            logger.info("mended in xfuser: %s", mend.line)
    return lines


def mended(module: ModuleType) -> list[str]:
    """The lines of the mends that were applied to a module of xfuser; kept in the module itself."""
    lines: list[str] = vars(module).setdefault("__mended__", [])
    return lines


def _updates_kv_cache_twice(source: str) -> bool:
    """The processor fills the KV cache itself, then lets `USP` do it again.

    `USP` updates the cache of any layer it is handed that has one. The processor hands its layer on
    also where it has updated the cache just before, and the second update has another shape.
    """
    return "update_and_get_kv_cache" in source and "attn_layer=attn," in source


def _update_kv_cache_once(module: ModuleType) -> None:
    """Hide the layer from `USP` while the processor runs that has updated its cache itself."""
    updated = threading.local()
    call, usp = require(module, _JOINT), require(module, "USP")

    @functools.wraps(call)
    def call_and_say_so(self: Any, *args: Any, **kwargs: Any) -> Any:
        updated.here = not self.use_long_ctx_attn_kvcache
        try:
            return call(self, *args, **kwargs)
        finally:
            updated.here = False

    @functools.wraps(usp)
    def usp_with_one_update(*args: Any, attn_layer: Any = None, **kwargs: Any) -> Any:
        layer = None if getattr(updated, "here", False) else attn_layer
        return usp(*args, attn_layer=layer, **kwargs)

    replace(module, _JOINT, call_and_say_so)
    replace(module, "USP", usp_with_one_update)


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


def _counts_text_on_every_rank(source: str) -> bool:
    """Text that is not split over the ranks is set apart for `USP` only where there are patches."""
    return "uses_pipeline_parallelism = get_runtime_state().num_pipeline_patch > 1\n" in source


def _count_text_once(module: ModuleType) -> None:
    """Set the text apart before `USP` where every rank holds all of it.

    Otherwise `USP` takes the copies of all ranks for different tokens, and each is attended to as
    often as there are ranks.
    """
    text = threading.local()
    forward, usp = require(module, _FLUX_FORWARD), require(module, "USP")
    get_runtime_state = require(module, "get_runtime_state")
    sequence_parallel_ranks = require(module, "get_sequence_parallel_world_size")

    @functools.wraps(forward)
    def forward_and_count_text(
        self: Any, hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any
    ) -> Any:
        text.tokens = encoder_hidden_states.shape[1]
        try:
            return forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            text.tokens = 0

    @functools.wraps(usp)
    def usp_with_text_apart(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = getattr(text, "tokens", 0)
        if (
            tokens
            and "joint_strategy" not in kwargs
            and not get_runtime_state().split_text_embed_in_sp
            and sequence_parallel_ranks() > 1
        ):
            kwargs["joint_strategy"] = "front"
            for name, heads in (("query", query), ("key", key), ("value", value)):
                kwargs[f"joint_{name}"] = heads[:, :, :tokens]
            query, key, value = (heads[:, :, tokens:] for heads in (query, key, value))
        return usp(query, key, value, *args, **kwargs)

    replace(module, _FLUX_FORWARD, forward_and_count_text)
    replace(module, "USP", usp_with_text_apart)


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


def _attends_to_padding(source: str) -> bool:
    """Tokens are padded to a multiple of the ranks, and nobody tells `USP` which ones are real."""
    return "pad_amount" in source and "valid_kv_len" not in source


def _attend_to_real_tokens(transformer: str) -> Callable[[ModuleType], None]:
    """Return what tells `USP` how many keys are real while a transformer's forward runs.

    Otherwise all tokens attend to zeros, and the video is another one. Under ring attention each
    rank has keys of its own, of which `USP` would cut as many: there it stays as it is.
    """
    path = f"{transformer}.forward"

    def apply(module: ModuleType) -> None:
        processor = importlib.import_module(_WAN)
        forward, usp = require(module, path), require(processor, "USP")
        parallel = importlib.import_module("xfuser.core.distributed")
        real = threading.local()

        @functools.wraps(forward)
        def forward_and_count(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            sizes = zip(hidden_states.shape[2:], self.config.patch_size, strict=True)
            tokens = math.prod(size // patch for size, patch in sizes)
            padded = tokens % parallel.get_sequence_parallel_world_size() > 0
            in_rings = parallel.get_ring_parallel_world_size() > 1
            real.tokens = tokens if padded and not in_rings else None
            try:
                return forward(self, hidden_states, *args, **kwargs)
            finally:
                real.tokens = None

        @functools.wraps(usp)
        def usp_of_real_tokens(*args: Any, attention_kwargs: Any = None, **kwargs: Any) -> Any:
            tokens = getattr(real, "tokens", None)
            if tokens is not None:
                attention_kwargs = {**(attention_kwargs or {}), "valid_kv_len": tokens}
            return usp(*args, attention_kwargs=attention_kwargs, **kwargs)

        replace(module, path, forward_and_count)
        replace(processor, "USP", usp_of_real_tokens)

    return apply


_ATTENTION = "xfuser.model_executor.layers.attention_processor"
_WAN = "xfuser.model_executor.models.transformers.transformer_wan"

MENDS = (
    Mend(
        "SD3 under PipeFusion without sequence parallelism: KV cache updated twice",
        _ATTENTION,
        _JOINT,
        _updates_kv_cache_twice,
        _update_kv_cache_once,
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
        "xfuser.model_executor.models.transformers.transformer_flux",
        _FLUX,
        _counts_text_on_every_rank,
        _count_text_once,
    ),
    Mend(
        "SD3 on several ranks: max_sequence_length is dropped, T5 pads to 256 tokens",
        "xfuser.model_executor.pipelines.pipeline_stable_diffusion_3",
        _SD3_CALL,
        _drops_max_sequence_length,
        _keep_max_sequence_length,
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
        )
    ),
    *(
        Mend(
            f"{name} under Ulysses: the padding of tokens that do not divide by the ranks is seen",
            module,
            f"{transformer}.forward",
            _attends_to_padding,
            _attend_to_real_tokens(transformer),
        )
        for name, module, transformer in (
            ("Wan", _WAN, "xFuserWanTransformer3DWrapper"),
            ("Wan VACE", f"{_WAN}_vace", "xFuserWanVACETransformer3DWrapper"),
        )
    ),
    Mend(
        "Qwen-Image under Ulysses: the padding of text and tokens that do not divide is seen",
        qwen_mends.MODULE,
        f"{qwen_mends.TRANSFORMER}.forward",
        _attends_to_padding,
        qwen_mends.attend_to_real_tokens,
    ),
    Mend(
        "Qwen-Image-Edit-2511 under sequence parallelism: the index of conditions is not cut",
        qwen_mends.MODULE,
        f"{qwen_mends.TRANSFORMER}.forward",
        qwen_mends.leaves_index_whole,
        qwen_mends.cut_index,
    ),
    Mend(
        "Z-Image: diffusers' pipeline gives an argument that xDiT's transformer does not take",
        z_image_mends.MODULE,
        z_image_mends.FORWARD,
        lambda source: "joint_attention_kwargs" not in source,
        z_image_mends.take_attention_kwargs,
    ),
    Mend(
        "Z-Image: sizes in a checkpoint's config are dropped, the default ones are taken",
        z_image_mends.MODULE,
        z_image_mends.INIT,
        lambda source: "**kwargs" in source,
        z_image_mends.name_sizes,
    ),
)
