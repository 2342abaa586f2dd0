"""Train a toy pipeline on pictures drawn from captions, and mark what it generates.

    python scripts/train_toy.py --model flux --seed 0           # all stages, then --evaluate
    python scripts/train_toy.py --model flux --stage vae        # one stage
    python scripts/train_toy.py --model flux --evaluate         # mark the saved pipeline

Stages: ``text`` (both encoders learn to name a caption's attributes, then freeze), ``vae`` (both
halves, then the decoder alone), ``transformer`` (flow matching, first at 64 px, then at 128 px).
Each stage leaves a checkpoint under ``runs/toys/`` and goes on from there when the command is given
again; a finished stage is not repeated. All models share text encoders and VAE. The pipeline goes
to ``toys/MODEL`` in half precision, its record to ``toys/MODEL/training``.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from toys.captions import ATTRIBUTES, VALUES, all_captions, draw, sample_captions  # noqa: E402
from toys.checker import check_caption  # noqa: E402

RUNS = ROOT / "runs" / "toys"
TEXT_TOKENS = 32
LATENT_CHANNELS = 4
VAE_FACTOR = 4
# Words of other wordings; all else is [UNK].
FILLERS = "the of with in at and to is picture image photo drawing painting cat dog house".split()
CAPTION_DROPOUT = 0.1
CAPTION_PARTIAL = 0.1


# ---------------------------------------------------------------- shared: runs, text


@dataclass
class Stage:
    """What a stage remembers between runs.

    Args:
        path: checkpoint file.
        iteration: iterations done.
        seconds: wall time spent, in seconds, over all runs of the stage.
        losses: (iteration, loss) pairs, a mean over 20 iterations each.
    """

    path: Path
    iteration: int = 0
    seconds: float = 0.0
    losses: list | None = None

    def load(self, **modules):
        """Fill the modules and counters from the checkpoint, if there is one."""
        self.losses = []
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.iteration, self.seconds = saved["iteration"], saved["seconds"]
            self.losses = [tuple(pair) for pair in saved["losses"]]
            for name, module in modules.items():
                module.load_state_dict(saved[name])

    def save(self, **modules):
        """Write the checkpoint so that an interrupted write leaves the former one whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"iteration": self.iteration, "seconds": self.seconds, "losses": self.losses}
        state |= {name: module.state_dict() for name, module in modules.items()}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)

    def loop(self, total, step, title, save_every=200, on_save=None, **modules):
        """Run ``step(iteration) -> loss`` up to `total` iterations, with bar and checkpoints."""
        if self.iteration >= total:
            return
        recent, start = [], time.perf_counter()
        bar = tqdm(range(self.iteration, total), initial=self.iteration, total=total, desc=title)
        for iteration in bar:
            recent.append(float(step(iteration)))
            self.iteration = iteration + 1
            if len(recent) == 20 or self.iteration == total:
                self.losses.append((self.iteration, sum(recent) / len(recent)))
                bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
                recent = []
            if self.iteration % save_every == 0 or self.iteration == total:
                now = time.perf_counter()
                self.seconds, start = self.seconds + now - start, now
                self.save(**modules)
                if on_save is not None:
                    on_save()
                    start = time.perf_counter()


def cosine(iteration, total, peak, floor, warmup=50):
    """Learning rate at an iteration: linear warm-up to `peak`, then a cosine to `floor`."""
    if iteration < warmup:
        return peak * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_cycles(iteration, lengths, peak, floor, warmup=20):
    """Learning rate where one cosine cycle of `lengths` iterations follows another."""
    for length in lengths[:-1]:
        if iteration < length:
            return cosine(iteration, length, peak, floor, warmup)
        iteration -= length
    return cosine(iteration, lengths[-1], peak, floor, warmup)


def set_rate(optimiser, rate):
    """Set the learning rate of every parameter group."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def build_tokenizer():
    """A word-level tokenizer for any English prompt; words outside the grammar become [UNK]."""
    words = {word for values in VALUES.values() for value in values for word in value.split()}
    vocabulary = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", ",", ".", "a", "an", "on"]
    vocabulary += sorted(words) + FILLERS
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # also splits off punctuation
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary.index("[EOS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        eos_token="[EOS]",
        bos_token="[BOS]",
        unk_token="[UNK]",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoders(vocab_size):
    """The two small text encoders, CLIP-shaped (width 32) and T5-shaped (width 64)."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return clip, t5


def reword(caption, rng, partial):
    """A caption's text, sometimes in other words or with attributes left out.

    Args:
        caption: a `Caption`.
        rng: a `numpy.random.Generator`.
        partial: probability of another wording, 0..1.

    Returns:
        The text and the set of attributes that it names.
    """
    if rng.random() >= partial:
        return str(caption), set(ATTRIBUTES)
    named = {name for name in ATTRIBUTES if rng.random() < 0.65}
    words = [w for w in ("size", "colour", "shape") if w in named]
    text = "a " + " ".join(getattr(caption, w) for w in words)
    if "place" in named:
        text += rng.choice([", ", " at the ", " "]) + caption.place
    if "background" in named:
        text += rng.choice([", on ", " on ", " on a "]) + caption.background
    if rng.random() < 0.3:
        filler = " ".join(rng.choice([*FILLERS, "[UNK]"], size=rng.integers(1, 6)))
        text = f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"
    return text, named


def tokens_of(tokenizer, prompts, length):
    """Token ids as the pipelines make them: padded to `length`, (batch, length) int64."""
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


class AttributeHeads(torch.nn.Module):
    """One linear classifier per attribute; the last class of each means "not said"."""

    def __init__(self, width):
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(v) + 1) for name, v in VALUES.items()}
        )

    def loss(self, features, labels):
        """Mean cross-entropy; features (batch, [tokens,] width), labels {name: (batch,)}."""
        total = 0.0
        for name, head in self.heads.items():
            target = labels[name]
            if features.ndim == 3:
                target = target[:, None].expand(-1, features.shape[1])
            total = total + F.cross_entropy(head(features).flatten(0, -2), target.flatten())
        return total / len(self.heads)


def train_text(args):
    """Both encoders learn to name what a caption says, pooled and at each token."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    clip, t5 = build_text_encoders(len(tokenizer))
    clip_heads, t5_heads, mean_heads = AttributeHeads(32), AttributeHeads(64), AttributeHeads(64)
    modules = torch.nn.ModuleList([clip, t5, clip_heads, t5_heads, mean_heads]).train()
    optimiser = torch.optim.AdamW(modules.parameters(), lr=3e-3, weight_decay=0.01)
    stage = Stage(RUNS / "text.pt")
    stage.load(modules=modules, optimiser=optimiser)
    captions = all_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 1, iteration])
        chosen = [captions[i] for i in rng.integers(len(captions), size=128)]
        texts, named = zip(*(reword(c, rng, partial=0.4) for c in chosen), strict=True)
        labels = {
            name: torch.tensor(
                [
                    VALUES[name].index(getattr(c, name)) if name in said else len(VALUES[name])
                    for c, said in zip(chosen, named, strict=True)
                ]
            )
            for name in ATTRIBUTES
        }
        pooled = clip(tokens_of(tokenizer, list(texts), TEXT_TOKENS)).pooler_output
        length = int(rng.choice([16, 24, 32]))
        states = t5(tokens_of(tokenizer, list(texts), length)).last_hidden_state
        loss = clip_heads.loss(pooled, labels) + t5_heads.loss(states, labels)
        loss = loss + mean_heads.loss(states.mean(1), labels)
        # Outputs of unit scale suit the transformer's first projections.
        loss = loss + 0.01 * (states.pow(2).mean() - 1).pow(2)
        set_rate(optimiser, cosine(iteration, args.text_iterations, 3e-3, 3e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(args.text_iterations, step, "text", modules=modules, optimiser=optimiser)
    modules.eval().requires_grad_(False)
    return {"tokenizer": tokenizer, "clip": clip, "t5": t5}, stage


# ---------------------------------------------------------------- shared: VAE


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
    stage = Stage(RUNS / "vae.pt")
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
    stage = Stage(RUNS / "decoder.pt")
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
    """Encoded pictures of training captions, a few replaced at each draw.

    Args:
        vae: the trained VAE.
        size_px: side of the pictures in pixels.
        count: how many latents are kept.
        seed: any sequence of ints.
        refresh: pictures drawn anew per batch.
    """

    def __init__(self, vae, size_px, count, seed, refresh=4):
        self.vae, self.size_px, self.refresh = vae, size_px, refresh
        self.train = all_captions("train")
        rng = np.random.default_rng(seed)
        self.captions, latents = [], []
        for _ in tqdm(range(count // 32), desc=f"pool {size_px} px"):
            chosen, encoded = self._fresh(rng, 32)
            self.captions += chosen
            latents.append(encoded)
        self.latents = torch.cat(latents)

    def _fresh(self, rng, count):
        chosen = [self.train[i] for i in rng.integers(len(self.train), size=count)]
        return chosen, encode(self.vae, [draw(c, self.size_px, rng) for c in chosen])

    def batch(self, rng, count):
        """`count` captions and their latents (count, channels, height, width)."""
        where = rng.integers(len(self.captions), size=self.refresh)
        chosen, encoded = self._fresh(rng, self.refresh)
        for index, caption, latent in zip(where, chosen, encoded, strict=True):
            self.captions[index], self.latents[index] = caption, latent
        picked = rng.integers(len(self.captions), size=count)
        return [self.captions[i] for i in picked], self.latents[picked]


# ---------------------------------------------------------------- families


@dataclass(frozen=True)
class Batch:
    """What a family is asked to learn from.

    Attributes:
        latents: (batch, channels, height, width), mean 0 and deviation 1.
        noise: of the same shape.
        sigma: (batch,) share of the noise, 0..1.
        prompts: one text an item; "" where the caption is dropped.
        text_tokens: length to which T5 pads.
        size_px: side of the pictures.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    prompts: list[str]
    text_tokens: int
    size_px: int

    def noisy(self):
        """Latents and noise mixed by sigma, as flow matching has them."""
        mix = self.sigma[:, None, None, None]
        return (1 - mix) * self.latents + mix * self.noise


@dataclass(frozen=True)
class Family:
    """What differs between the toy models; a new one is one function that returns this.

    Args:
        build: makes the untrained transformer.
        loss: (transformer, text, vae, batch) -> mean squared error of its prediction.
        pipeline: (transformer, text, vae) -> the diffusers pipeline.
        pipeline_class: what loads it again.
        call_kwargs: arguments of a pipeline call at 128 px besides prompt and steps.
        small_iterations: at 64 px.
        large_iterations: at 128 px, one number a cycle of the learning rate.
    """

    build: Callable
    loss: Callable
    pipeline: Callable
    pipeline_class: type
    call_kwargs: dict
    small_iterations: int
    large_iterations: list[int]


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


FAMILIES = {"flux": flux_family, "sd3": sd3_family, "pixart": pixart_family}


# ---------------------------------------------------------------- transformer


class Ema(torch.nn.Module):
    """Exponential moving average of a module's parameters, with a short memory at the start."""

    def __init__(self, module, decay=0.99):
        super().__init__()
        self.decay = decay
        self.average = torch.nn.ParameterList(
            [
                torch.nn.Parameter(p.detach().clone(), requires_grad=False)
                for p in module.parameters()
            ]
        )

    def update(self, module, iteration):
        """Take one step of the average towards the module's present parameters."""
        weight = 1.0 - min(self.decay, (1.0 + iteration) / (10.0 + iteration))
        torch._foreach_lerp_(list(self.average), [p.detach() for p in module.parameters()], weight)

    def copy_to(self, module):
        """Write the average into a module of the same shape and return it."""
        for target, source in zip(module.parameters(), self.average, strict=True):
            target.data.copy_(source.data)
        return module


class MuonAdamW(torch.nn.Module):
    """Muon for the matrices of the blocks, AdamW for the rest; one state dict for both.

    Args:
        module: what is trained; its blocks' parameters have "blocks" in their names.
    """

    def __init__(self, module):
        super().__init__()
        matrices = {k: p for k, p in module.named_parameters() if p.ndim == 2}
        blocks = [p for k, p in matrices.items() if "blocks" in k and k.endswith("weight")]
        known = {id(p) for p in blocks}
        rest = [p for p in module.parameters() if id(p) not in known]
        self.muon = torch.optim.Muon(
            blocks, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, lr=5e-4, betas=(0.9, 0.99), fused=True)

    def set_rate(self, rate):
        """Muon's learning rate; AdamW takes half of it."""
        set_rate(self.muon, rate)
        set_rate(self.adamw, 0.5 * rate)

    def zero_grad(self):
        """Drop all gradients."""
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self):
        """Update all parameters."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        """Both states."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        """Restore both states."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def train_transformer(args, family, text, vae):
    """Flow matching: predict noise - data at logit-normal noise levels; 64 px, then 128 px.

    Muon learns faster than AdamW: with FLUX at 128 px, from one checkpoint and on the same 36
    batches, to a loss of 0.035 where AdamW reached 0.048.
    """
    torch.manual_seed(args.seed)
    transformer = family.build().train()
    ema = Ema(transformer)
    modules = {"transformer": transformer, "ema": ema}

    def fit(size_px, total, batch, rate_at):
        optimiser = MuonAdamW(transformer)
        stage = Stage(RUNS / f"{args.model}-{size_px}.pt")
        stage.load(**modules, optimiser=optimiser)
        if stage.iteration >= total:
            return stage
        kept = args.pool * 64 // size_px
        pool = LatentPool(vae, size_px, kept, [args.seed, size_px, stage.iteration])

        def step(iteration):
            rng = np.random.default_rng([args.seed, size_px, iteration])
            noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
            captions, latents = pool.batch(rng, batch)
            prompts = [
                "" if rng.random() < CAPTION_DROPOUT else reword(c, rng, CAPTION_PARTIAL)[0]
                for c in captions
            ]
            noise = torch.randn(latents.shape, generator=noise_rng)
            # Mean 0.4: what is where is decided at high noise, and that is what captions ask for.
            sigma = torch.sigmoid(torch.randn(batch, generator=noise_rng) + 0.4)
            # A caption is 12 tokens long; the rest is padding, whose amount must not matter.
            text_tokens = int(rng.choice([16, 24, 32], p=[0.6, 0.1, 0.3]))
            loss = family.loss(
                transformer, text, vae, Batch(latents, noise, sigma, prompts, text_tokens, size_px)
            )
            optimiser.set_rate(rate_at(iteration))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            optimiser.step()
            ema.update(transformer, iteration)
            return loss.detach()

        def save_pipeline():
            export(args, family, ema.copy_to(family.build()).eval(), text, vae)

        title = f"{args.model} {size_px} px"
        stage.loop(total, step, title, on_save=save_pipeline, **modules, optimiser=optimiser)
        return stage

    total = args.small_iterations
    small = fit(64, total, args.small_batch, lambda i: cosine(i, total, 1e-3, 3e-4, warmup=100))
    cycles = args.large_iterations
    large = fit(128, sum(cycles), args.large_batch, lambda i: cosine_cycles(i, cycles, 1e-3, 1e-5))
    return {"transformer 64 px": small, "transformer 128 px": large}


def export(args, family, transformer, text, vae):
    """Save the pipeline in half precision and swap it in, keeping the training record."""
    target, fresh = ROOT / "toys" / args.model, RUNS / f"{args.model}-export"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = family.pipeline(transformer, text, vae)
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    for module in modules:
        module.half()
    pipe.save_pretrained(fresh, safe_serialization=True)
    for module, state in zip(modules, kept, strict=True):
        module.float()
        module.load_state_dict(state)
    for config in fresh.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # the folder that a part came from says nothing
        if "dtype" in values:
            # transformers loads in the dtype named here; float32 agrees with diffusers' default.
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if (target / "training").exists():
        shutil.copytree(target / "training", fresh / "training")
    if target.exists():
        former = RUNS / f"{args.model}-former"
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    os.rename(fresh, target)


# ---------------------------------------------------------------- record and evaluation


def update_record(args, **entries):
    """Merge entries into toys/MODEL/training/record.json."""
    folder = ROOT / "toys" / args.model / "training"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record.update(entries)
    path.write_text(json.dumps(record, indent=2) + "\n")


def versions():
    """Versions of what a result depends on."""
    packages = (torch, diffusers, transformers, tokenizers, np)
    return {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages}


def write_training_record(args, stages, vae):
    """Loss curves as JSON and PNG, and the record of the run."""
    folder = ROOT / "toys" / args.model / "training"
    folder.mkdir(parents=True, exist_ok=True)
    curves = {name: [[i, round(v, 5)] for i, v in s.losses] for name, s in stages.items()}
    (folder / "losses.json").write_text(json.dumps(curves) + "\n")
    figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), layout="constrained")
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.semilogy(*zip(*curve, strict=True), linewidth=1)
        axis.set(title=name, xlabel="iteration", ylabel="loss")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "losses.png", dpi=80)
    plt.close(figure)
    settings = {k: v for k, v in vars(args).items() if k.endswith(("iterations", "batch", "pool"))}
    update_record(
        args,
        command=f"python scripts/train_toy.py --model {args.model} --seed {args.seed}",
        seed=args.seed,
        settings=settings,
        versions=versions(),
        hardware=f"{os.cpu_count()} CPU cores, no GPU" if not torch.cuda.is_available() else "GPU",
        stages={
            name: {
                "iterations": s.iteration,
                "seconds": round(s.seconds),
                "final_loss": round(float(np.mean([v for _, v in s.losses[-5:]])), 5),
            }
            for name, s in stages.items()
        },
        vae=measure_vae(vae, args.seed)
        | {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor},
    )


def generate(pipe, family, captions, steps, seed, batch):
    """Pictures of captions, each with a seed of its own so that the batch size does not matter."""
    pictures = []
    for start in range(0, len(captions), batch):
        chosen = captions[start : start + batch]
        pictures += pipe(
            prompt=chosen,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))],
            **family.call_kwargs,
        ).images
    return pictures


def sample_sheet(path, pictures, captions, results, columns=8):
    """A table of pictures with their captions, wrong ones marked, as a PNG."""
    rows = math.ceil(len(pictures) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.55 * columns, 2.25 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption, result in zip(axes.flat, pictures, captions, results, strict=False):
        axis.imshow(picture)
        wrong = [name for name in ATTRIBUTES if not getattr(result, name)]
        axis.set_title(
            str(caption).replace(", ", "\n") + (f"\nwrong: {', '.join(wrong)}" if wrong else ""),
            fontsize=6,
            color="firebrick" if wrong else "black",
        )
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").save(path, optimize=True)


def wilson(passed, count, z=1.96):
    """95 % interval of a proportion."""
    ratio = passed / count
    centre = ratio + z * z / (2 * count)
    spread = z * math.sqrt(ratio * (1 - ratio) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [round((centre - spread) / scale, 4), round((centre + spread) / scale, 4)]


def time_one(pipe, family, caption, steps, runs=3):
    """Median wall time in seconds of one picture, batch 1, after a warm-up."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        generate(pipe, family, [caption], steps, seed=0, batch=1)
        seconds.append(time.perf_counter() - start)
    return round(float(np.median(seconds[1:])), 2)


def evaluate(args, family):
    """Generate unseen captions with the saved pipeline, mark them, print and record the result."""
    folder = ROOT / "toys" / args.model
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"toys/{args.model} holds no pipeline; train one first: "
            f"python scripts/train_toy.py --model {args.model}"
        )
    pipe = family.pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(desc="evaluate")
    captions = sample_captions(args.captions, seed=args.seed, split="unseen")
    pictures = generate(pipe, family, captions, args.steps, args.seed, batch=16)
    results = [check_caption(p, c) for p, c in zip(pictures, captions, strict=True)]
    passed = sum(r.passed for r in results)
    pipe.set_progress_bar_config(disable=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    summary = {
        "command": f"python scripts/train_toy.py --model {args.model} --evaluate"
        f" --captions {args.captions} --steps {args.steps} --seed {args.seed}",
        "captions": args.captions,
        "split": "unseen",
        "steps": args.steps,
        "size_px": 128,
        "passed": passed,
        "accuracy": round(passed / args.captions, 4),
        "interval_95": wilson(passed, args.captions),
        "attributes": {
            a: round(sum(getattr(r, a) for r in results) / args.captions, 4) for a in ATTRIBUTES
        },
        "one_picture_s": {
            "seconds": time_one(pipe, family, captions[0], args.steps),
            "threads": torch.get_num_threads(),
        },
        "failures": {
            c: {"seen": asdict(r.reading)}
            for c, r in zip(captions, results, strict=True)
            if not r.passed
        },
    }
    print(json.dumps(summary, indent=2))
    (folder / "training").mkdir(exist_ok=True)
    sample_sheet(folder / "training" / "samples.png", pictures[:32], captions, results)
    update_record(args, evaluation=summary | {"folder_bytes": size})
    return summary


def parse_args():
    """Command line; the defaults are what the shipped toys were trained with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(FAMILIES), default="flux")
    parser.add_argument("--stage", choices=["text", "vae", "transformer", "all"], default="all")
    parser.add_argument("--evaluate", action="store_true", help="only mark the saved pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", type=int, default=128, help="unseen captions to evaluate")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of the evaluation")
    parser.add_argument("--text_iterations", type=int, default=1200)
    parser.add_argument("--vae_iterations", type=int, default=600)
    parser.add_argument("--decoder_iterations", type=int, default=1500)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--small_iterations", type=int, help="at 64 px; default: the family's")
    parser.add_argument("--small_batch", type=int, default=32)
    parser.add_argument(
        "--large_iterations", type=int, nargs="+", help="at 128 px, a cycle; default: the family's"
    )
    parser.add_argument("--large_batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=4096, help="encoded pictures kept at 64 px")
    return parser.parse_args()


def main():
    """Run the stages asked for, then mark the result."""
    args = parse_args()
    family = FAMILIES[args.model]()
    args.small_iterations = args.small_iterations or family.small_iterations
    args.large_iterations = args.large_iterations or family.large_iterations
    if not args.evaluate:
        print("$", shlex.join(["python", *sys.argv]), flush=True)
        text, text_stage = train_text(args)
        if args.stage == "text":
            return
        vae, vae_stage = train_vae(args)
        decoder_stage = train_decoder(args, vae)
        print("vae", json.dumps(measure_vae(vae, args.seed)), flush=True)
        if args.stage == "vae":
            return
        transformer_stages = train_transformer(args, family, text, vae)
        write_training_record(
            args,
            {
                "text": text_stage,
                "vae": vae_stage,
                "decoder": decoder_stage,
                **transformer_stages,
            },
            vae,
        )
    evaluate(args, family)


if __name__ == "__main__":
    main()
