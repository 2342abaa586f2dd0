"""The clip's way into latents and back: a small AutoencoderKLWan, laid out as that of Wan 2.1."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)

from toys.captions import PLACES
from toys.clip_checker import check_clip
from toys.clips import FRAMES, all_clip_captions, draw_clip, sample_clip_captions
from toys.training.stages import Stage, cosine_cycles, set_rate
from toys.training.vae import LatentPool, picture_loss

CLIP_PX = 64
PATCH = 2
# What the encoder says of each cell of 4 x 4 pixels: cosines across and down, and of which colour.
# By the two colours every shape differs from every ground by 0.4 or more, by the third by 0.23.
TWO = ((0.7, 0.7, 0.0), (0.0, 0.0, 1.0))
MEASURED = (
    *(((0, 0), colour) for colour in torch.eye(3).tolist()),
    *((waves, colour) for waves in ((1, 0), (0, 1)) for colour in TWO),
    *((waves, (0.35, 0.5, 0.8)) for waves in ((1, 1), (2, 0), (0, 2))),
)
# And how the mean differs between the two frames of a latent, of which colours.
CLIP_CHANNELS = len(MEASURED) + len(TWO)


def build_clip_vae():
    """Side / 4 and (frames + 1) / 2, 12 latent channels; pixels enter in patches of 2 x 2.

    The tokens of a shape decide how well a transformer draws it: with side / 8 a shape is one or
    two of them, and 10 % of unseen captions passed.
    """
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=32,
        z_dim=CLIP_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.0] * CLIP_CHANNELS,
        latents_std=[1.0] * CLIP_CHANNELS,
        is_residual=False,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=2,
        scale_factor_spatial=2 * PATCH,
    )


@torch.no_grad()
def set_encoder(encoder, level=20.0):
    """Set an encoder so that it measures cells; it is not trained, so latents are known at once.

    Wan's blocks pass on what enters as long as their residual branches are zero. What is left of
    its nonlinearities is the last norm and silu: constants of +-level keep the norm from dividing
    by what it measures, and silu(x) - silu(-x) = x.
    """
    channels = torch.arange(len(MEASURED))
    pixels = 3 * PATCH**2
    constant = torch.tensor([pixels, pixels + 1])
    for module in encoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            _zero(module)
    encoder.conv_in.weight[range(pixels), range(pixels), -1, 1, 1] = 1.0
    encoder.conv_in.bias[constant] = torch.tensor([level, -level])
    _, down, second = encoder.down_blocks
    wave = [
        torch.cos(torch.pi * n * (2 * torch.arange(4) + 1) / 8) * 2 ** (n > 0) for n in range(3)
    ]
    for channel, ((across, down_), colour) in enumerate(MEASURED):
        cell = torch.outer(wave[down_], wave[across]) / 16
        # (rows of patches, in a patch, columns of patches, in a patch), as `patchify` sorts them
        cell = cell.view(2, PATCH, 2, PATCH).permute(3, 1, 0, 2).reshape(PATCH**2, 2, 2)
        taps = torch.tensor(colour)[:, None, None, None] * cell
        down.resample[1].weight[channel, :pixels, :2, :2] = taps.flatten(0, 1)
    down.resample[1].weight[constant, constant, 0, 0] = 1.0
    down.time_conv.weight[channels, channels, 1:] = 0.5
    down.time_conv.weight[constant, constant, 1] = 1.0
    for channel, colour in enumerate(TWO, start=len(MEASURED)):
        for source, share in enumerate(colour):
            down.time_conv.weight[channel, source, :, 0, 0] = share * torch.tensor([0, -0.5, 0.5])
    latents = torch.arange(CLIP_CHANNELS)
    last = 2 * CLIP_CHANNELS + torch.arange(2)
    second.conv_shortcut.weight[latents, latents] = 1.0
    second.conv_shortcut.weight[CLIP_CHANNELS + latents, latents] = -1.0
    second.conv_shortcut.weight[last, constant] = 1.0
    divided = level * math.sqrt(2.0 / encoder.norm_out.gamma.numel())
    encoder.conv_out.weight[latents, latents, -1, 1, 1] = divided
    encoder.conv_out.weight[latents, CLIP_CHANNELS + latents, -1, 1, 1] = -divided
    encoder.conv_out.bias[CLIP_CHANNELS:] = -6.0


@torch.no_grad()
def start_decoder(decoder, level=6.0):
    """Set an untrained decoder so that it repeats the mean of each cell.

    As `vae.start_linear` does for pictures: channels 0-2 carry the colour and 5-7 its negative, 3
    and 4 are +-level. Residual branches start at zero, and so does attention, which stays off:
    training sees windows, and whole frames have more positions.
    """
    constant, carried = torch.tensor([3, 4]), torch.arange(8)
    for module in decoder.modules():
        if isinstance(module, WanResidualBlock):
            _zero(module.conv2)
            if not isinstance(module.conv_shortcut, torch.nn.Identity):
                _carry(module.conv_shortcut, carried)
        elif isinstance(module, WanAttentionBlock):
            _zero(module.proj)
        elif isinstance(module, WanResample):
            _carry(module.resample[1], carried)
            for frame in range(2):
                _carry(module.time_conv, carried, frame * module.dim)
    _zero(decoder.conv_in, carried)
    decoder.conv_in.bias[constant] = torch.tensor([level, -level])
    _zero(decoder.conv_out)
    divided = math.sqrt((2 * level**2 + 2.0) / decoder.norm_out.gamma.numel())
    for channel in range(3):
        patch = slice(PATCH**2 * channel, PATCH**2 * (channel + 1))
        for sign, source in ((1.0, channel), (-1.0, channel + 5)):
            decoder.conv_in.weight[source, channel, -1, 1, 1] = sign
            decoder.conv_out.weight[patch, source, -1, 1, 1] = sign * divided


def _zero(conv, rows=slice(None)):
    conv.weight[rows] = 0.0
    conv.bias[rows] = 0.0


def _carry(conv, channels, first=0):
    """Pass channels on as they are, to outputs from `first` on."""
    _zero(conv, first + channels)
    middle = [size // 2 for size in conv.kernel_size]
    if conv.weight.ndim == 5:
        middle[0] = -1  # the present frame is the last that a causal convolution sees
    conv.weight[(first + channels, channels, *middle)] = 1.0


def encode_whole(vae, clips):
    """Means as `vae.encode` has them, (batch, channels, latent frames, side / 4, side / 4).

    diffusers goes by chunks of 4 frames, and the decoder frame by frame, to save memory; all frames
    at once took 0.5 s for 8 windows, forwards and back, on one CPU core, where the chunks of a VAE
    with patches of 4 took 2.5 s.
    """
    encoder = vae.encoder
    x = encoder.conv_in(patchify(clips, PATCH))
    for layer in encoder.down_blocks:
        x = layer(x)
        if isinstance(layer, WanResample):
            x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    x = encoder.norm_out(encoder.mid_block(x))
    return vae.quant_conv(encoder.conv_out(F.silu(x)))[:, :CLIP_CHANNELS]


def decode_whole(vae, latents):
    """Clips as `vae.decode` has them, not clamped; all frames at once."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            (upsampler,) = block.upsamplers
            # The first frame stays one; of each other the halves of the channels make two.
            pairs = upsampler.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            later = pairs.transpose(1, 2).transpose(2, 3).flatten(2, 3)
            x = upsampler(torch.cat([x[:, :, :1], later], dim=2))
    return unpatchify(decoder.conv_out(F.silu(decoder.norm_out(x))), PATCH)


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


def clip_crop(caption, rng, frames, side):
    """A window about the shape, over `frames` frames: ground alone is simple."""
    first = rng.integers(FRAMES - frames + 1)
    moment = (first + rng.random() * (frames - 1)) / (FRAMES - 1)
    centre = (1 - moment) * np.array(PLACES[caption.start]) + moment * np.array(PLACES[caption.end])
    corner = CLIP_PX * centre - side / 2 + rng.uniform(-8, 8, size=2)
    # On the cells of whole frames, where a shape lies to them in the same ways.
    left, top = 4 * np.clip(np.rint(corner / 4), 0, (CLIP_PX - side) // 4).astype(int)
    clip = draw_clip(caption, CLIP_PX, rng)[first : first + frames]
    return clip[:, top : top + side, left : left + side]


def clip_crops(captions, rng, count):
    """Windows of clips of `count` captions, small shapes twice as often as others.

    They show a part of the time or all of it.
    """
    frames = int(rng.choice([5, FRAMES], p=[0.75, 0.25]))
    side = int(rng.choice([24, 32], p=[0.7, 0.3]))
    chosen = [captions[i] for i in rng.integers(len(captions), size=2 * count)]
    small = [c for c in chosen if c.size == "small"][: count // 2]
    others = [c for c in chosen if c.size != "small"][: count - len(small)]
    return to_clips([clip_crop(c, rng, frames, side) for c in small + others])


def start_clip_vae(args):
    """A VAE whose encoder is as it will be, with the latents' mean and deviation measured."""
    torch.manual_seed(args.seed)
    vae = build_clip_vae().requires_grad_(False)
    set_encoder(vae.encoder)
    start_decoder(vae.decoder)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _zero(conv)
        torch.nn.init.dirac_(conv.weight)
    captions = all_clip_captions("train")
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
    return vae.to(args.device)


def train_clip_vae(args):
    """The decoder learns to draw what slightly noisy latents say."""
    vae = start_clip_vae(args)
    decoder = vae.decoder.train().requires_grad_(True)
    decoder.mid_block.attentions.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0
    )
    stage = Stage(args.runs / "clip_decoder.pt")
    stage.load(decoder=decoder, optimiser=optimiser)
    captions = all_clip_captions("train")
    cycles = args.clip_vae_iterations
    total = sum(cycles)

    def step(iteration):
        rng = np.random.default_rng([args.seed, 16, iteration])
        clips = clip_crops(captions, rng, args.clip_batch).to(args.device)
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            latents = encode_whole(vae, clips)
            noise = torch.randn(latents.shape, generator=noise_rng).to(args.device)
            latents = latents + 0.02 * _scale(vae)[1] * noise
        # Half precision halves the time; the last iterations are for what it costs in exactness.
        early = 10 * iteration < 9 * total
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=early):
            decoded = decode_whole(vae, latents)
        loss = clip_loss(decoded.float(), clips, margin=2)
        set_rate(optimiser, cosine_cycles(iteration, cycles, 7e-4, 1e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(total, step, "clip decoder", save_every=50, decoder=decoder, optimiser=optimiser)
    decoder.eval().requires_grad_(False)
    return vae, stage


@torch.no_grad()
def encode_clips_raw(vae, frames):
    """Latent means of uint8 clips, (batch, channels, (frames + 1) / 2, side / 4, side / 4)."""
    return encode_whole(vae, to_clips(frames).to(vae.device))


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
    return LatentPool(all_clip_captions("train"), encoded, args.pool // 2, seed, refresh=2)
