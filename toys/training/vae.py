"""The VAE that all toys share: both halves are trained, then the decoder alone."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tqdm import tqdm

from toys.captions import all_captions, draw, sample_captions
from toys.checker import check_caption
from toys.training.stages import Stage, cosine, set_rate

LATENT_CHANNELS = 4
VAE_FACTOR = 4


def build_vae():
    """A 3-level AutoencoderKL: side / 4, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        # More groups would leave 2 channels each at full size and wash the colours out.
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


@torch.no_grad()
def start_linear(vae, level=6.0):
    """Set an untrained VAE so that it averages 4 x 4 pixels and repeats them; training adds edges.

    From random weights most of the training goes into finding the colours, because group norm
    divides by what a picture consists of. Here channels 0-2 carry the colour and 5-7 its negative,
    since silu(x) - silu(-x) = x; channels 3 and 4 are +-level, constants large enough to make group
    norm nearly linear. Residual branches start at zero; the other channels stay random.
    """
    colour, negative, constant = torch.arange(3), torch.arange(5, 8), torch.tensor([3, 4])
    carried = torch.arange(8)

    def enter(conv):
        conv.weight[carried], conv.bias[carried] = 0.0, 0.0
        middle = conv.kernel_size[0] // 2
        conv.weight[colour, colour, middle, middle] = 1.0
        conv.weight[negative, colour, middle, middle] = -1.0
        conv.bias[constant] = torch.tensor([level, -level])

    def carry(conv, channels, taps):
        conv.weight[channels], conv.bias[channels] = 0.0, 0.0
        conv.weight[:, constant] = 0.0
        for row, column in taps:
            conv.weight[channels, channels, row, column] = 1.0 / len(taps)

    def leave(conv):
        conv.weight[colour], conv.bias[colour] = 0.0, 0.0
        # What group norm divided by.
        scale = math.sqrt((2 * level**2 + 2.0) / conv.in_channels)
        conv.weight[colour, colour, 1, 1] = scale
        conv.weight[colour, negative, 1, 1] = -scale

    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                kept = min(module.conv_shortcut.in_channels, module.conv_shortcut.out_channels)
                carry(module.conv_shortcut, torch.arange(kept), [(0, 0)])
        elif isinstance(module, Downsample2D):
            carry(module.conv, carried, [(0, 0), (0, 1), (1, 0), (1, 1)])
        elif isinstance(module, Upsample2D):
            carry(module.conv, carried, [(1, 1)])
    enter(vae.encoder.conv_in)
    enter(vae.decoder.conv_in)
    leave(vae.encoder.conv_out)
    leave(vae.decoder.conv_out)
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0.0
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0
    return vae


def to_tensor(pictures):
    """uint8 (batch, height, width, 3) to float (batch, 3, height, width) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(batch):
    """float (batch, 3, height, width) in -1..1 to uint8 (batch, height, width, 3)."""
    return (batch * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def vae_batch(captions, rng, batch):
    """Half whole 64-px pictures, half 64-px crops of 128-px pictures."""
    pictures = []
    for index in rng.integers(len(captions), size=batch):
        if rng.random() < 0.5:
            pictures.append(draw(captions[index], 64, rng))
        else:
            top, left = rng.integers(0, 65, size=2)
            pictures.append(draw(captions[index], 128, rng)[top : top + 64, left : left + 64])
    return to_tensor(pictures)


def picture_loss(decoded, pictures, margin=0):
    """Absolute plus squared error, fourfold up to `margin` px around the shape, which is small."""
    ground = pictures.flatten(2).median(dim=-1).values[..., None, None]
    shape = ((pictures - ground).abs().amax(1, keepdim=True) > 0.15).float()
    weight = 1.0 + 3.0 * F.max_pool2d(shape, 2 * margin + 1, stride=1, padding=margin)
    error = (decoded - pictures).abs()
    return (weight * (error + error.square())).mean()


def train_vae(args):
    """Reconstruction with a light KL term; then the latents' mean and scale are measured."""
    torch.manual_seed(args.seed)
    vae = start_linear(build_vae()).train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    stage = Stage(args.runs / "vae.pt")
    stage.load(vae=vae, optimiser=optimiser)
    captions = all_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 2, iteration])
        pictures = vae_batch(captions, rng, args.vae_batch)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))
        )
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1.0 - posterior.logvar).mean()
        loss = picture_loss(decoded, pictures) + 1e-4 * kl
        set_rate(optimiser, cosine(iteration, args.vae_iterations, 1e-3, 1e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(args.vae_iterations, step, "vae", vae=vae, optimiser=optimiser)
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng([args.seed, 3])
    picked = [captions[i] for i in rng.integers(len(captions), size=256)]
    sample = torch.cat(
        [encode_raw(vae, [draw(c, 128, rng) for c in picked[i::8]]) for i in range(8)]
    )
    vae.register_to_config(
        shift_factor=round(float(sample.mean()), 5),
        scaling_factor=round(1.0 / float(sample.std()), 5),
    )
    return vae, stage


def train_decoder(args, vae):
    """The decoder alone goes on with a frozen encoder, on slightly noisy latents: sharper edges."""
    torch.manual_seed(args.seed)
    decoder = vae.decoder.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.0)
    stage = Stage(args.runs / "decoder.pt")
    stage.load(decoder=decoder, optimiser=optimiser)
    captions = all_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 6, iteration])
        pictures = vae_batch(captions, rng, args.vae_batch)
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean
            latents = latents + 0.03 * torch.randn(latents.shape, generator=noise_rng)
        loss = picture_loss(decoder(latents), pictures, margin=2)
        set_rate(optimiser, cosine(iteration, args.decoder_iterations, 2e-3, 2e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(args.decoder_iterations, step, "decoder", decoder=decoder, optimiser=optimiser)
    decoder.eval().requires_grad_(False)
    return stage


@torch.no_grad()
def encode_raw(vae, pictures):
    """Latent means of uint8 pictures, (batch, channels, side / 4, side / 4)."""
    return vae.encode(to_tensor(pictures)).latent_dist.mean


@torch.no_grad()
def encode(vae, pictures):
    """Latents as the transformer sees them: shifted and scaled to mean 0 and deviation 1."""
    return (encode_raw(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def measure_vae(vae, seed, count=128):
    """PSNR in dB and checker pass rate of reconstructions of unseen captions at 128 px."""
    captions = sample_captions(count, seed=seed, split="unseen")
    squared, passed = [], []
    for start in range(0, count, 16):
        rng = np.random.default_rng([seed, 4, start])
        chosen = captions[start : start + 16]
        pictures = np.stack([draw(c, 128, rng) for c in chosen])
        decoded = to_pictures(vae.decode(encode_raw(vae, pictures)).sample)
        squared += list(((decoded / 255.0 - pictures / 255.0) ** 2).mean(axis=(1, 2, 3)))
        passed += [check_caption(p, c).passed for p, c in zip(decoded, chosen, strict=True)]
    return {
        "psnr_db": round(float(-10 * np.log10(np.mean(squared))), 2),
        "checker_pass_ratio": round(float(np.mean(passed)), 4),
        "captions": count,
    }


class LatentPool:
    """Encoded pictures or clips of training captions, a few replaced at each draw.

    Args:
        captions: all captions of the training.
        encoded: (captions, rng) -> latents of what they say, the batch first.
        count: how many latents are kept.
        seed: any sequence of ints.
        refresh: how many are drawn anew per batch.
    """

    def __init__(self, captions, encoded, count, seed, refresh=4):
        self.train, self.encoded, self.refresh = captions, encoded, refresh
        rng = np.random.default_rng(seed)
        self.captions, latents = [], []
        for _ in tqdm(range(count // 32), desc="pool"):
            chosen, fresh = self._fresh(rng, 32)
            self.captions += chosen
            latents.append(fresh)
        self.latents = torch.cat(latents)

    def _fresh(self, rng, count):
        chosen = [self.train[i] for i in rng.integers(len(self.train), size=count)]
        return chosen, self.encoded(chosen, rng)

    def batch(self, rng, count):
        """`count` captions and their latents, (count, channels, ...)."""
        where = rng.integers(len(self.captions), size=self.refresh)
        chosen, fresh = self._fresh(rng, self.refresh)
        for index, caption, latent in zip(where, chosen, fresh, strict=True):
            self.captions[index], self.latents[index] = caption, latent
        picked = rng.integers(len(self.captions), size=count)
        return [self.captions[i] for i in picked], self.latents[picked]


def picture_pool(args, vae, size_px, iteration):
    """A pool of pictures; as many pixels whatever their size."""

    def encoded(captions, rng):
        return encode(vae, [draw(c, size_px, rng) for c in captions])

    seed = [args.seed, size_px, iteration]
    return LatentPool(all_captions("train"), encoded, args.pool * 64 // size_px, seed)
