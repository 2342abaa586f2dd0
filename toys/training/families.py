"""What differs between the toy models."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextModelWithProjection

from toys.clips import FRAMES
from toys.training.subjects import CLIPS, PICTURES, Subject
from toys.training.text import TEXT_TOKENS, masked_states, tokens_of
from toys.training.vae import LATENT_CHANNELS, VAE_FACTOR
from toys.training.video import CLIP_CHANNELS, CLIP_PX
from toys.training.wan import CountedPadding, Locator, emphasis, set_in_time


@dataclass(frozen=True)
class Batch:
    """What a family is asked to learn from.

    Attributes:
        latents: (batch, channels, [frames,] height, width), mean 0 and deviation 1.
        noise: of the same shape.
        sigma: (batch,) share of the noise, 0..1.
        prompts: one text an item; "" where the caption is dropped.
        text_tokens: length to which T5 pads.
        size_px: side of the pictures.
        moments: of clips, where in time each latent frame lies; None for all frames in order.
        weights: of the loss, (batch, 1, frames, height, width); None for all alike.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    prompts: list[str]
    text_tokens: int
    size_px: int
    moments: tuple | None = None
    weights: torch.Tensor | None = None

    def noisy(self):
        """Latents and noise mixed by sigma, as flow matching has them."""
        mix = self.sigma.view(-1, *(1,) * (self.latents.ndim - 1))
        return (1 - mix) * self.latents + mix * self.noise


@dataclass(frozen=True)
class Family:
    """What differs between the toy models; a new one is one function that returns this.

    Args:
        build: makes the untrained transformer.
        loss: (transformer, text, vae, batch) -> mean squared error of its prediction.
        pipeline: (transformer, text, vae) -> the diffusers pipeline.
        pipeline_class: what loads it again.
        call_kwargs: arguments of a pipeline call at full size besides prompt and steps.
        small_iterations: of pictures at 64 px, or of glimpses.
        large_iterations: at full size, one number a cycle of the learning rate.
        subject: what is drawn.
        large_batch: items of an iteration at full size.
        glimpses: moments of clips that are learned before whole clips, one of them an iteration.
        emphasis: (caption, moments) -> weights of the loss, (frames, height, width).
        locator: transformer -> a module whose ``loss(batch)`` is added in the training.
        text_lengths: {tokens to which texts are padded: share of the iterations}.
    """

    build: Callable
    loss: Callable
    pipeline: Callable
    pipeline_class: type
    call_kwargs: dict
    small_iterations: int
    large_iterations: list[int]
    subject: Subject = PICTURES
    large_batch: int = 16
    glimpses: tuple = ()
    emphasis: Callable | None = None
    locator: Callable | None = None
    text_lengths: dict = field(default_factory=lambda: {16: 0.6, 24: 0.1, 32: 0.3})


def flux_family():
    """FLUX: 4 double and 8 single blocks, 4 heads x 24, latents packed 2 x 2.

    Fused attention kernels on GPUs want a head size that 8 divides.
    """

    def build():
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=False,
            axes_dims_rope=(4, 10, 10),
        )

    def loss(transformer, text, vae, batch):
        count, channels, height, width = batch.latents.shape
        with torch.no_grad():
            ids = tokens_of(text["tokenizer"], batch.prompts, TEXT_TOKENS)
            pooled = text["clip"](ids).pooler_output
            ids = tokens_of(text["tokenizer"], batch.prompts, batch.text_tokens)
            states = text["t5"](ids).last_hidden_state
        rows, columns = height // 2, width // 2
        ids = FluxPipeline._prepare_latent_image_ids(count, rows, columns, "cpu", torch.float32)
        # A 64-px picture spans the positions of a 128-px one: token i sits between 2i and 2i + 1.
        stride = 128 / batch.size_px
        ids = ids * stride + (stride - 1) / 2 * torch.tensor([0.0, 1.0, 1.0])
        packed = FluxPipeline._pack_latents(batch.noisy(), count, channels, height, width)
        out = transformer(
            hidden_states=packed,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=batch.sigma,
            img_ids=ids,
            txt_ids=torch.zeros(batch.text_tokens, 3),
            return_dict=False,
        )[0]
        velocity = FluxPipeline._unpack_latents(
            out, height * VAE_FACTOR, width * VAE_FACTOR, VAE_FACTOR
        )
        return F.mse_loss(velocity, batch.noise - batch.latents)

    def pipeline(transformer, text, vae):
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=vae,
            text_encoder=text["clip"],
            tokenizer=text["tokenizer"],
            text_encoder_2=text["t5"],
            tokenizer_2=text["tokenizer"],
            transformer=transformer,
        )

    call = {"height": 128, "width": 128, "max_sequence_length": TEXT_TOKENS}
    return Family(build, loss, pipeline, FluxPipeline, call, 2200, [900, 800])


@contextmanager
def spread_positions(embed, stride):
    """Let SD3's patch embedding give `stride` times the positions' range to as many tokens.

    It crops the middle of its table; a 64-px picture is to span what a 128-px one does, each token
    at the mean of the positions that it lies between.
    """
    cropped = embed.cropped_pos_embed

    def spread(height, width):
        rows, columns = height // embed.patch_size, width // embed.patch_size
        table = cropped(stride * height, stride * width)
        table = table.unflatten(1, (rows, stride, columns, stride))
        return table.mean(dim=(2, 4)).flatten(1, 2)

    embed.cropped_pos_embed = spread
    try:
        yield
    finally:
        del embed.cropped_pos_embed


def sd3_family():
    """SD3 in small: 8 joint blocks, 4 heads x 24.

    The toy's one CLIP stands for both of SD3's.
    """

    def build():
        return SD3Transformer2DModel(
            sample_size=128 // VAE_FACTOR,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=8,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=96,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )

    def loss(transformer, text, vae, batch):
        with torch.no_grad():
            ids = tokens_of(text["tokenizer"], batch.prompts, TEXT_TOKENS)
            clip = text["clip"](ids, output_hidden_states=True)
            ids = tokens_of(text["tokenizer"], batch.prompts, batch.text_tokens)
            t5 = text["t5"](ids).last_hidden_state
        states = torch.cat([clip.hidden_states[-2]] * 2, dim=-1)
        with spread_positions(transformer.pos_embed, 128 // batch.size_px):
            velocity = transformer(
                hidden_states=batch.noisy(),
                encoder_hidden_states=torch.cat([states, t5], dim=1),
                pooled_projections=torch.cat([clip.pooler_output] * 2, dim=-1),
                timestep=1000 * batch.sigma,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity, batch.noise - batch.latents)

    def pipeline(transformer, text, vae):
        clip = CLIPTextModelWithProjection(text["clip"].config)
        clip.text_model.load_state_dict(text["clip"].state_dict())
        torch.nn.init.eye_(clip.text_projection.weight)
        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=vae,
            text_encoder=clip.eval(),
            tokenizer=text["tokenizer"],
            text_encoder_2=clip,
            tokenizer_2=text["tokenizer"],
            text_encoder_3=text["t5"],
            tokenizer_3=text["tokenizer"],
            transformer=transformer,
        )

    call = {"height": 128, "width": 128, "max_sequence_length": TEXT_TOKENS, "guidance_scale": 2.5}
    return Family(build, loss, pipeline, StableDiffusion3Pipeline, call, 2200, [900, 800, 900])


def pixart_family():
    """PixArt-alpha in small: 10 blocks, 4 heads x 24, linear betas.

    It predicts v, not the noise: where a latent is almost all noise, the noise says nothing of it.
    """
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
    )
    # sigma of flow matching at each timestep: noise / (noise + data).
    alpha = scheduler.alphas_cumprod.sqrt()
    levels = (1 - scheduler.alphas_cumprod).sqrt()
    sigmas = levels / (levels + alpha)

    def build():
        return PixArtTransformer2DModel(
            sample_size=128 // VAE_FACTOR,
            num_layers=10,
            patch_size=2,
            attention_head_dim=24,
            num_attention_heads=4,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            cross_attention_dim=96,
            caption_channels=64,
        )

    def loss(transformer, text, vae, batch):
        timesteps = torch.searchsorted(sigmas, batch.sigma).clamp(max=len(sigmas) - 1)
        # PixArt's pipelines know the VAE's scale alone, not its shift.
        latents = batch.latents + vae.config.shift_factor * vae.config.scaling_factor
        tokens = text["tokenizer"](
            batch.prompts,
            padding="max_length",
            max_length=batch.text_tokens,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = text["t5"](tokens.input_ids, tokens.attention_mask).last_hidden_state
        a, s = (table[timesteps][:, None, None, None] for table in (alpha, levels))
        out = transformer(
            # Not the scheduler's add_noise: before set_timesteps it looks levels up in reverse.
            hidden_states=a * latents + s * batch.noise,
            encoder_hidden_states=states,
            encoder_attention_mask=tokens.attention_mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The other half of the channels is PixArt's variance, which its pipelines throw away.
        return F.mse_loss(out.chunk(2, dim=1)[0], a * batch.noise - s * latents)

    def pipeline(transformer, text, vae):
        return PixArtAlphaPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text["t5"],
            tokenizer=text["tokenizer"],
            transformer=transformer,
        )

    call = {"height": 128, "width": 128, "guidance_scale": 2.5}
    call |= {"use_resolution_binning": False, "clean_caption": False}  # bins begin at 256 px
    return Family(build, loss, pipeline, PixArtAlphaPipeline, call, 1100, [500, 700, 1900, 2200])


def wan_family():
    """Wan 2.1 in small: 8 blocks, 4 heads x 24, 320 tokens a clip of 9 frames at 64 px.

    Shapes and colours are learned at the price of 64 tokens from the first frame alone, and where
    things move from the first frame with one other: positions turn attention by differences, so a
    frame alone has no time.
    """
    shown = 24  # tokens of text that are computed, whatever they are padded to

    def build():
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=CLIP_CHANNELS,
            out_channels=CLIP_CHANNELS,
            text_dim=64,
            freq_dim=128,
            ffn_dim=384,
            num_layers=8,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        )

    def loss(transformer, text, vae, batch):
        with torch.no_grad():
            states, said = masked_states(text, batch.prompts, shown)
            words = said.sum(dim=1, keepdim=True)
            padding = (batch.text_tokens - words) / (shown - words).clamp(min=1)
            weight = torch.where(said, 0.0, padding.log())[:, None, None]
        counted = CountedPadding()
        counted.weight = weight.to(batch.latents.device)
        for block in transformer.blocks:
            block.attn2.set_processor(counted)
        moments = batch.moments or range(batch.latents.shape[2])
        with set_in_time(transformer.rope, moments):
            velocity = transformer(
                hidden_states=batch.noisy(),
                timestep=1000 * batch.sigma,
                encoder_hidden_states=states.to(batch.latents.device),
                return_dict=False,
            )[0]
        wrong = (velocity - (batch.noise - batch.latents)).square()
        return (wrong if batch.weights is None else batch.weights * wrong).mean()

    def pipeline(transformer, text, vae):
        return WanPipeline(
            scheduler=UniPCMultistepScheduler(
                num_train_timesteps=1000,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=3.0,
            ),
            vae=vae,
            text_encoder=text["t5"],
            tokenizer=text["tokenizer"],
            transformer=transformer,
        )

    call = {"height": CLIP_PX, "width": CLIP_PX, "num_frames": FRAMES}
    call |= {"max_sequence_length": TEXT_TOKENS, "guidance_scale": 2.5}
    return Family(
        build,
        loss,
        pipeline,
        WanPipeline,
        call,
        2800,
        [1600, 600, 3000],
        subject=CLIPS,
        large_batch=8,
        glimpses=((0,),) * 4 + ((0, 1), (0, 2), (0, 3), (0, 4)),
        emphasis=lambda caption, moments: emphasis(caption, moments, (5, 16, 16)),
        locator=lambda transformer: Locator(transformer, (5, 8, 8)),
        text_lengths={32: 0.7, 512: 0.3},
    )


FAMILIES = {"flux": flux_family, "sd3": sd3_family, "pixart": pixart_family, "wan": wan_family}
