"""What the engine must know of ComfyUI's own transformers; they are not diffusers' classes.

ComfyUI calls every one with `(x, timestep, context, ...)`. Its blocks write into what they are
given, and ControlNets into what blocks put out, so that a copy of that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from diffusers_adapters.flux import FluxAdapter as FluxInDiffusers
from diffusers_adapters.wan import WanAdapter as WanInDiffusers
from xfuser_fastcache.artifacts.calibration import fingerprint
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract
from xfuser_fastcache.models.forward_layout import ForwardLayout
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN, Streams
from xfuser_fastcache.models.token_layout import TokenLayout


class WritingBlock(BlockContract):
    """The contract of a block that writes into its arguments: what is read of them is a copy."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Return the streams among a block's arguments, copied."""
        return super().read(args, kwargs).map(torch.clone)


class ComfyAdapter(ModelAdapter):
    """What ComfyUI's transformers have in common.

    Attributes:
        folder: package of ComfyUI that holds the class; diffusers has classes of the same names.
    """

    folder = "comfy.ldm."
    forward = ForwardLayout(latents="x", parameters=("x", "timestep", "context"))

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether `model` is of this class of ComfyUI; those made of it do other things."""
        kind = type(model)
        return kind.__name__ == cls.model_class and kind.__module__.startswith(cls.folder)

    @classmethod
    def fingerprint(cls, model: Any, blocks: int) -> dict[str, str]:
        """Return that of the same checkpoint in diffusers, where calibrations are made.

        Raises:
            ValueError: what a calibration is bound to is not to be found in this class.
        """
        raise ValueError(
            f"ComfyUI's {cls.model_class} does not say all that a calibration is bound to, so no "
            "file can be told to be for it; leave calibration empty"
        )


class _AsInDiffusers(nn.Module):
    """What a calibration is bound to in diffusers' FLUX: its configuration, and an embedder.

    Args:
        model: ComfyUI's, whose weights it holds.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        of = model.params
        given, made = (
            channels * of.patch_size**2 for channels in (of.in_channels, of.out_channels)
        )
        self.config = {
            **{
                name: parameter.default
                for name, parameter in signature(FluxTransformer2DModel.__init__).parameters.items()
                if name != "self"
            },
            "in_channels": given,
            "out_channels": None if given == made else made,
            "num_layers": of.depth,
            "num_single_layers": of.depth_single_blocks,
            "attention_head_dim": of.hidden_size // of.num_heads,
            "num_attention_heads": of.num_heads,
            "joint_attention_dim": of.context_in_dim,
            "pooled_projection_dim": of.vec_in_dim,
            "guidance_embeds": of.guidance_embed,
            "axes_dims_rope": of.axes_dim,
        }
        parts = {"timestep_embedder": model.time_in, "text_embedder": model.vector_in}
        if of.guidance_embed:
            parts["guidance_embedder"] = model.guidance_in
        self.embedder = nn.ModuleDict(
            {
                name: nn.ModuleDict({"linear_1": part.in_layer, "linear_2": part.out_layer})
                for name, part in parts.items()
            }
        )


class FluxAdapter(ComfyAdapter):
    """FLUX.1 dev, schnell, Fill and Kontext as `comfy.ldm.flux.model.Flux`.

    Source: ComfyUI 0.3.64, `comfy/ldm/flux/model.py` and `layers.py`.
    """

    model_class = "Flux"
    folder = "comfy.ldm.flux."
    embedder = "time_in"
    block_lists = {
        "double_blocks": WritingBlock(returns=(HIDDEN, ENCODER), hidden="img", encoder="txt"),
        "single_blocks": WritingBlock(
            returns=(HIDDEN,), hidden="x", layout=TokenLayout(joined="text")
        ),
    }
    noise = FlowSigma(given="sigma")
    tea_polynomial = FluxInDiffusers.tea_polynomial

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token inside the blocks."""
        return model.hidden_size

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        """Return how many channels of the latents are noise; Fill has a picture's behind them."""
        return model.params.out_channels

    @classmethod
    def fingerprint(cls, model: Any, blocks: int) -> dict[str, str]:
        """Return that of diffusers' class with these weights."""
        return fingerprint(_AsInDiffusers(model), "FluxTransformer2DModel", "embedder", blocks)

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        """Those before the pictures that Kontext is given."""
        if kwargs.get("ref_latents") is None:
            return None
        latents = cls.forward_layout().argument("x", args, kwargs)
        rows, columns = (-(-size // model.patch_size) for size in latents.shape[-2:])
        return range(rows * columns)

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return what the first block's attention is given."""
        contract = cls.first_contract(block)
        modulation, _ = block.img_mod(contract.argument("vec", args, kwargs))
        normed = block.img_norm1(contract.argument(HIDDEN, args, kwargs))
        return normed * (1 + modulation.scale) + modulation.shift


class SD3Adapter(ComfyAdapter):
    """SD3 and SD3.5 as `comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper`.

    Source: ComfyUI 0.3.64, `comfy/ldm/modules/diffusionmodules/mmdit.py`.
    """

    model_class = "OpenAISignatureMMDITWrapper"
    folder = "comfy.ldm.modules.diffusionmodules."
    embedder = "t_embedder"
    block_lists = {
        "joint_blocks": WritingBlock(
            parameters=("context", "x"), returns=(ENCODER, HIDDEN), hidden="x", encoder="context"
        )
    }
    forward = ForwardLayout(latents="x", timestep="timesteps", parameters=("x", "timesteps"))
    noise = FlowSigma(given="timestep")

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token inside the blocks."""
        return model.hidden_size

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        """Return how many channels of the latents are noise."""
        return model.out_channels

    @classmethod
    def modulated_input(
        cls, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return what the first block's attention is given."""
        x, own = cls.first_contract(block).argument(HIDDEN, args, kwargs), block.x_block
        shift, scale = own.adaLN_modulation(kwargs["c"])[:, None, : 2 * x.shape[-1]].chunk(2, dim=2)
        return own.norm1(x) * (1 + scale) + shift


class WanAdapter(ComfyAdapter):
    """Wan 2.1 and 2.2, text and image to video, as `comfy.ldm.wan.model.WanModel`.

    A picture to begin with stands in more channels behind the noise, or in the first frame (2.2
    TI2V), whose timestep is 0 then. Of 2.2 A14B, each sampler has a model of its own.

    Source: ComfyUI 0.3.64, `comfy/ldm/wan/model.py`.
    """

    model_class = "WanModel"
    folder = "comfy.ldm.wan."
    embedder = "time_embedding"
    block_lists = {"blocks": WritingBlock(returns=(HIDDEN,), hidden="x")}
    noise = FlowSigma(given="timestep")
    forecaster = "output"  # As of diffusers' class: tokens of a video take much memory.

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Say whether it is this class, and takes no reference ahead of the video."""
        return super().supports(model) and getattr(model, "ref_conv", None) is None

    @classmethod
    def dim(cls, model: Any) -> int:
        """Return the width of a token inside the blocks."""
        return model.dim

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        """Return how many channels of the latents are noise."""
        return model.out_dim

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Those from the first of the noisiest frames on; none of what is joined behind them."""
        layout = cls.forward_layout()
        sizes = layout.given(args, kwargs).sizes[1:]
        frame, *others = (-(-n // of) for n, of in zip(sizes, model.patch_size, strict=True))
        timestep = layout.argument(layout.timestep, args, kwargs)
        first = 0 if timestep.dim() < 2 else int(timestep[0].argmax())
        return range(first * prod(others), frame * prod(others))

    @classmethod
    def tea_input(
        cls, contract: BlockContract, block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the timestep's projection of the last frame, `(batch, 1, 6 dim)`."""
        return contract.argument("e", args, kwargs)[:, -1:].flatten(2)

    @classmethod
    def tea_polynomial_of(cls, model: Any) -> tuple[float, ...] | None:
        """That of diffusers' class with these sizes."""
        config = SimpleNamespace(
            num_attention_heads=1,
            attention_head_dim=model.dim,
            in_channels=model.in_dim,
            out_channels=model.out_dim,
        )
        return WanInDiffusers.tea_polynomial_of(SimpleNamespace(config=config))


FAMILIES = {
    "comfyui_flux": FluxAdapter,
    "comfyui_sd3": SD3Adapter,
    "comfyui_wan": WanAdapter,
}
