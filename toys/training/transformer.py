"""The transformer: flow matching, pictures first at 64 px, then at 128 px; clips by glimpses."""

import math

import numpy as np
import torch

from toys.training.families import Batch
from toys.training.record import export
from toys.training.stages import Stage, cosine, cosine_cycles, set_rate
from toys.training.text import reword

CAPTION_DROPOUT = 0.1
CAPTION_PARTIAL = 0.1
LOCATED = 0.3  # weight of what a locator asks


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


def orthogonal(matrices, steps=5):
    """The nearest orthogonal matrices, roughly, by Newton-Schulz; (count, rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if turned else x


class Muon(torch.optim.Optimizer):
    """Muon in float32, all matrices of a shape at once.

    torch's own works in bfloat16 and one by one: a CPU without such units took 1.08 s for a step of
    1.3 million parameters.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate, matched to AdamW's by the size of its updates.
        momentum: share of the past, 0..1.
        weight_decay: as AdamW has it.
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            shapes = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                    average = self.state[matrix]["momentum_buffer"]
                    average.lerp_(matrix.grad, 1 - momentum)
                    updates.append(matrix.grad.lerp(average, momentum))
                rate = 0.2 * math.sqrt(max(shape)) * lr
                for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=rate)


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
        self.muon = Muon(blocks, lr=1e-3)
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
    """Flow matching: predict noise - data at logit-normal noise levels; the cheap part first.

    That is pictures at 64 px before those at 128 px, and glimpses of clips before whole clips.

    Muon learns faster than AdamW: with FLUX at 128 px, from one checkpoint and on the same 36
    batches, to a loss of 0.035 where AdamW reached 0.048.
    """
    torch.manual_seed(args.seed)
    subject = family.subject
    transformer = family.build().train().to(args.device)
    ema = Ema(transformer)
    modules = {"transformer": transformer, "ema": ema}
    if family.locator is not None:
        modules["locator"] = family.locator(transformer)
    learning = torch.nn.ModuleList([m for name, m in modules.items() if name != "ema"])

    def fit(part, size_px, total, batch, rate_at, glimpses=()):
        optimiser = MuonAdamW(learning)
        stage = Stage(args.runs / f"{args.model}-{part.split()[0]}.pt")
        stage.load(**modules, optimiser=optimiser)
        if stage.iteration >= total:
            return stage
        pool = subject.pool(args, vae, size_px, stage.iteration)

        def step(iteration):
            rng = np.random.default_rng([args.seed, size_px, iteration])
            noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
            moments = glimpses[iteration % len(glimpses)] if glimpses else None
            count = batch // len(moments) if moments else batch
            captions, latents = pool.batch(rng, count)
            latents = latents[:, :, list(moments)] if moments else latents
            latents = latents.to(args.device)
            prompts = [
                ""
                if rng.random() < CAPTION_DROPOUT
                else reword(subject.language, c, rng, CAPTION_PARTIAL)[0]
                for c in captions
            ]
            noise = torch.randn(latents.shape, generator=noise_rng).to(args.device)
            # Mean 0.4: what is where is decided at high noise, and that is what captions ask for.
            sigma = torch.sigmoid(torch.randn(count, generator=noise_rng) + 0.4).to(args.device)
            # A caption is 12 to 17 tokens long; the rest is padding, whose amount must not matter.
            lengths, shares = zip(*family.text_lengths.items(), strict=True)
            text_tokens = int(rng.choice(lengths, p=shares))
            weights = None
            if family.emphasis is not None:
                # A text that leaves something out does not say where the shape is.
                weights = torch.ones(count, 1, *latents.shape[2:])
                for weight, caption, prompt in zip(weights, captions, prompts, strict=True):
                    if prompt == str(caption):
                        weight[0] = family.emphasis(caption, moments)
                weights = weights.to(args.device)
            asked = Batch(latents, noise, sigma, prompts, text_tokens, size_px, moments, weights)
            loss = family.loss(transformer, text, vae, asked)
            located = LOCATED * modules["locator"].loss(asked) if "locator" in modules else 0.0
            optimiser.set_rate(rate_at(iteration))
            optimiser.zero_grad()
            (loss + located).backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            optimiser.step()
            ema.update(transformer, iteration)
            return loss.detach()

        def save_pipeline():
            export(args, family, ema.copy_to(family.build()).eval(), text, vae)

        title = f"{args.model} {part}"
        stage.loop(total, step, title, on_save=save_pipeline, **modules, optimiser=optimiser)
        return stage

    small_part = "glimpses" if family.glimpses else "64 px"
    total, cycles = args.small_iterations, args.large_iterations
    small = fit(
        small_part,
        64,
        total,
        args.small_batch,
        lambda i: cosine(i, total, 1e-3, 3e-4, warmup=100),
        family.glimpses,
    )
    large_part = "clips" if family.glimpses else f"{subject.size_px} px"
    large = fit(
        large_part,
        subject.size_px,
        sum(cycles),
        args.large_batch,
        lambda i: cosine_cycles(i, cycles, 1e-3, 1e-5),
    )
    return {f"transformer {small_part}": small, f"transformer {large_part}": large}
