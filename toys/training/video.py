"""The clip's way into latents and back: a small AutoencoderKLWan, as Wan 2.2 has it."""

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
)

from toys.captions import PLACES
from toys.clip_checker import check_clip
from toys.clips import FRAMES, all_clip_captions, draw_clip, sample_clip_captions
from toys.training.stages import Stage, cosine, set_rate
from toys.training.vae import LatentPool, picture_loss

CLIP_PX = 64
CLIP_CHANNELS = 16
PATCH = 4


def build_clip_vae():
    """Side / 8 and (frames + 1) / 2, 16 latent channels; pixels enter in patches of 4 x 4."""
    return AutoencoderKLWan(
        base_dim=24,
        decoder_base_dim=20,
        z_dim=CLIP_CHANNELS,
        dim_mult=[2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.0] * CLIP_CHANNELS,
        latents_std=[1.0] * CLIP_CHANNELS,
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=2,
        scale_factor_spatial=2 * PATCH,
    )


@torch.no_grad()
def start_linear(vae, level=6.0):
    """Set an untrained VAE so that it averages blocks of pixels and repeats them.

    As `vae.start_linear` does for pictures: channels 0-2 carry the colour and 5-7 its negative, 3
    and 4 are +-level. The shortcuts around Wan's blocks average and repeat by themselves, so their
    residual branches start at zero. The encoder's shortcut makes two channels of each, the earlier
    and the later frame; latents 0-2 are their mean, 3-5 their difference, the others chance
    mixtures of all that the encoder sees, for the decoder to make use of.
    """
    constant, carried = torch.tensor([3, 4]), torch.arange(8)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            _zero(module.conv2)
            if not isinstance(module.conv_shortcut, torch.nn.Identity):
                _zero(module.conv_shortcut, carried)
                module.conv_shortcut.weight[carried, carried] = 1.0
        elif isinstance(module, WanAttentionBlock):
            _zero(module.proj)
    for module in vae.decoder.modules():
        if isinstance(module, WanResample):
            _zero(module.resample[1])
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _zero(conv)
        torch.nn.init.dirac_(conv.weight)
    for half in (vae.encoder, vae.decoder):
        _zero(half.conv_in, carried)
        half.conv_in.bias[constant] = torch.tensor([level, -level])
    _zero(vae.decoder.conv_out)
    _zero(vae.encoder.conv_out, slice(0, 6))
    _zero(vae.encoder.conv_out, slice(CLIP_CHANNELS, None))
    vae.encoder.conv_out.weight[6:CLIP_CHANNELS] *= 20.0
    vae.encoder.conv_out.weight[6:CLIP_CHANNELS, 6:10] = 0.0  # the constants
    vae.encoder.conv_out.bias[CLIP_CHANNELS:] = -6.0
    # What the last norms divide by.
    encoded = math.sqrt((4 * level**2 + 4.0) / vae.encoder.norm_out.gamma.numel())
    decoded = math.sqrt((2 * level**2 + 2.0) / vae.decoder.norm_out.gamma.numel())
    pixels = PATCH**2
    for channel in range(3):
        patch = slice(pixels * channel, pixels * (channel + 1))
        for sign, target in ((1.0, channel), (-1.0, channel + 5)):
            vae.encoder.conv_in.weight[target, patch, -1, 1, 1] = sign / pixels
            out = vae.encoder.conv_out.weight[:, 2 * target : 2 * target + 2, -1, 1, 1]
            out[channel] = 0.5 * sign * encoded
            out[3 + channel] = 0.5 * sign * encoded * torch.tensor([-1.0, 1.0])
            vae.decoder.conv_in.weight[target, channel, -1, 1, 1] = sign
            vae.decoder.conv_out.weight[patch, target, -1, 1, 1] = sign * decoded
    return vae


def _zero(conv, rows=slice(None)):
    conv.weight[rows] = 0.0
    conv.bias[rows] = 0.0


def to_clips(frames):
    """uint8 (batch, frames, height, width, 3) to float (batch, 3, frames, height, width), -1..1."""
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_frames(clips):
    """float (batch, 3, frames, height, width) in -1..1 to uint8, the channels last."""
    levels = (clips.cpu() * 127.5 + 127.5).round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 4, 1).numpy()


def clip_loss(decoded, clips, margin):
    """The picture's loss, over all frames."""
    pictures = [x.transpose(1, 2).flatten(0, 1) for x in (decoded, clips)]
    return picture_loss(*pictures, margin=margin)


def clip_crop(caption, rng, frames):
    """A window of half the side about the shape, over `frames` frames: ground alone is simple."""
    side = CLIP_PX // 2
    first = rng.integers(FRAMES - frames + 1)
    moment = (first + rng.random() * (frames - 1)) / (FRAMES - 1)
    centre = (1 - moment) * np.array(PLACES[caption.start]) + moment * np.array(PLACES[caption.end])
    corner = CLIP_PX * centre - side / 2 + rng.uniform(-14, 14, size=2)
    left, top = np.clip(np.rint(corner), 0, CLIP_PX - side).astype(int)
    clip = draw_clip(caption, CLIP_PX, rng)[first : first + frames]
    return clip[:, top : top + side, left : left + side]


def clip_crops(captions, rng, count):
    """Windows of clips of `count` captions drawn at random, a part of the time or all of it."""
    frames = int(rng.choice([5, FRAMES], p=[0.6, 0.4]))
    chosen = rng.integers(len(captions), size=count)
    return to_clips([clip_crop(captions[i], rng, frames) for i in chosen])


def train_clip_vae(args):
    """Reconstruction with a light KL term; then the latents' mean and deviation are measured."""
    torch.manual_seed(args.seed)
    vae = start_linear(build_clip_vae()).train().to(args.device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    stage = Stage(args.runs / "clip_vae.pt")
    stage.load(vae=vae, optimiser=optimiser)
    captions = all_clip_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 12, iteration])
        clips = clip_crops(captions, rng, args.clip_batch).to(args.device)
        posterior = vae.encode(clips).latent_dist
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(posterior.mean.shape, generator=noise_rng)
        decoded = vae.decode(posterior.mean + posterior.std * noise.to(args.device)).sample
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1.0 - posterior.logvar).mean()
        loss = clip_loss(decoded, clips, margin=2) + 3e-4 * kl
        set_rate(optimiser, cosine(iteration, args.clip_vae_iterations, 2e-3, 1e-4))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(
        args.clip_vae_iterations, step, "clip vae", save_every=50, vae=vae, optimiser=optimiser
    )
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng([args.seed, 13])
    sample = torch.cat(
        [
            encode_clips_raw(vae, [draw_clip(captions[i], CLIP_PX, rng) for i in chosen])
            for chosen in rng.integers(len(captions), size=(8, 16))
        ]
    ).transpose(0, 1)
    mean, deviation = sample.flatten(1).mean(dim=1), sample.flatten(1).std(dim=1)
    # A channel that says next to nothing stays small.
    deviation = deviation.clamp(min=0.2 * float(deviation.max()))
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in mean.tolist()],
        latents_std=[round(v, 5) for v in deviation.tolist()],
    )
    return vae, stage


def train_clip_decoder(args, vae):
    """The decoder alone goes on with a frozen encoder, on slightly noisy latents: sharper edges."""
    torch.manual_seed(args.seed)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(
        decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0
    )
    stage = Stage(args.runs / "clip_decoder.pt")
    stage.load(decoder=decoder, optimiser=optimiser)
    captions = all_clip_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 16, iteration])
        clips = clip_crops(captions, rng, args.clip_batch).to(args.device)
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            latents = vae.encode(clips).latent_dist.mean
            noise = torch.randn(latents.shape, generator=noise_rng).to(args.device)
            latents = latents + 0.05 * noise
        loss = clip_loss(vae.decode(latents).sample, clips, margin=2)
        set_rate(optimiser, cosine(iteration, args.clip_decoder_iterations, 1e-3, 1e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    total = args.clip_decoder_iterations
    stage.loop(total, step, "clip decoder", save_every=50, decoder=decoder, optimiser=optimiser)
    decoder.eval().requires_grad_(False)
    return stage


@torch.no_grad()
def encode_clips_raw(vae, frames):
    """Latent means of uint8 clips, (batch, channels, 5, side / 8, side / 8)."""
    return vae.encode(to_clips(frames).to(vae.device)).latent_dist.mean


def _scale(vae):
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    return values.view(2, 1, -1, 1, 1, 1)


def encode_clips(vae, frames):
    """Latents as the transformer sees them: shifted and scaled channel by channel."""
    mean, deviation = _scale(vae)
    return (encode_clips_raw(vae, frames) - mean) / deviation


@torch.no_grad()
def measure_clip_vae(vae, seed, count=64):
    """PSNR in dB and checker pass rate of reconstructions of clips of unseen captions."""
    captions = sample_clip_captions(count, seed=seed, split="unseen")
    squared, passed = [], []
    for start in range(0, count, 16):
        rng = np.random.default_rng([seed, 14, start])
        chosen = captions[start : start + 16]
        clips = np.stack([draw_clip(c, CLIP_PX, rng) for c in chosen])
        decoded = to_frames(vae.decode(encode_clips_raw(vae, clips)).sample)
        squared += list(((decoded / 255.0 - clips / 255.0) ** 2).mean(axis=(1, 2, 3, 4)))
        passed += [check_clip(d, c).passed for d, c in zip(decoded, chosen, strict=True)]
    return {
        "psnr_db": round(float(-10 * np.log10(np.mean(squared))), 2),
        "checker_pass_ratio": round(float(np.mean(passed)), 4),
        "captions": count,
    }


def clip_pool(args, vae, size_px, iteration):
    """A pool of clips."""

    def encoded(captions, rng):
        return encode_clips(vae, [draw_clip(c, size_px, rng) for c in captions])

    seed = [args.seed, size_px, iteration]
    return LatentPool(all_clip_captions("train"), encoded, args.pool // 2, seed, refresh=1)
