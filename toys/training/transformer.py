"""The transformer: flow matching, first at 64 px, then at 128 px."""

import numpy as np
import torch

from toys.training.families import Batch
from toys.training.record import export
from toys.training.stages import RUNS, Stage, cosine, cosine_cycles, set_rate
from toys.training.text import reword
from toys.training.vae import LatentPool

CAPTION_DROPOUT = 0.1
CAPTION_PARTIAL = 0.1


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
