"""What else diffusers and xDiT can do: each function switches a feature on, or tries it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from scripts.dev._beside import Change, Subject, beside, require
from xfuser_fastcache.hooks import hook_on

# ---- pipelines, schedulers, callbacks --------------------------------------------------------


def calling(**arguments: Any) -> Change:
    """Return a change of the pipeline's call."""
    return lambda subject: subject.call.update(arguments)


def picture(pixels: int) -> Image.Image:
    """Return a smooth picture."""
    row = np.linspace(0, 255, pixels)
    grid = np.stack(np.broadcast_arrays(row[:, None], row[None], 255 - row[:, None]), axis=-1)
    return Image.fromarray(grid.astype(np.uint8))


def becomes(pipeline: str, strength: float | None = None, mask: bool = False) -> Change:
    """Return a change into another of diffusers' pipelines, with a picture to begin from.

    Args:
        pipeline: name of its class; a ControlNet with random weights is made where it has one.
        strength: of image-to-image: the share of the plan's steps that is taken; None for none.
        mask: whether to paint the middle only.
    """

    def change(subject: Subject) -> None:
        import diffusers

        pixels = subject.scale.pixels
        extra: dict[str, Any] = {}
        if "ControlNet" in pipeline:
            extra["controlnet"] = controlnet(subject)
            subject.call["control_image"] = picture(pixels)
        subject.pipe = getattr(diffusers, pipeline).from_pipe(subject.pipe, **extra)
        if strength is not None:
            subject.call.update(image=picture(pixels), strength=strength)
        if mask:
            middle = np.pad(np.full((pixels // 2,) * 2, 255, np.uint8), pixels // 4)
            subject.call["mask_image"] = Image.fromarray(middle)

    return change


def controlnet(subject: Subject) -> torch.nn.Module:
    """Return a ControlNet for the toy's transformer, whose residuals are not zero."""
    from diffusers import FluxControlNetModel, SD3ControlNetModel

    torch.manual_seed(0)
    transformer = subject.pipe.transformer
    if subject.model == "flux":
        config = transformer.config
        made = FluxControlNetModel.from_transformer(
            transformer,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
        )
        outputs = (*made.controlnet_blocks, *made.controlnet_single_blocks)
    else:
        made = SD3ControlNetModel.from_transformer(
            transformer, num_layers=3, num_extra_conditioning_channels=0
        )
        outputs = made.controlnet_blocks
    for layer in outputs:
        torch.nn.init.normal_(layer.weight, std=0.02)
    return made.eval()


def sixteen_channels(subject: Subject) -> None:
    """Give SD3 random weights with 16 latent channels, which its inpainting asks for."""
    torch.manual_seed(0)
    pipe = subject.pipe
    of_transformer = {**pipe.transformer.config, "in_channels": 16, "out_channels": 16}
    pipe.transformer = type(pipe.transformer).from_config(of_transformer).eval()
    pipe.vae = type(pipe.vae).from_config({**pipe.vae.config, "latent_channels": 16}).eval()


def scheduled(name: str, **config: Any) -> Change:
    """Return a change of the scheduler, by the name of its class."""

    def change(subject: Subject) -> None:
        import diffusers

        old = subject.pipe.scheduler.config
        subject.pipe.scheduler = getattr(diffusers, name).from_config(old, **config)

    return change


def nudge(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the latents at two steps."""
    return {"latents": given["latents"] * 1.01} if step in (1, 3) else {}


class Unwell(Exception):
    """What a test raises in the middle of a generation."""


def stops_at(step: int, error: bool) -> Callable[..., dict[str, Any]]:
    """Return a callback that interrupts a generation, or raises in it."""

    def callback(pipe: Any, index: int, timestep: Any, given: Any) -> dict[str, Any]:
        if index == step and error:
            raise Unwell
        pipe._interrupt = index == step
        return {}

    return callback


def stopped(error: bool) -> Callable[[Subject], str]:
    """Return a run of which the generation after a stopped one is a fresh one."""

    def run(subject: Subject) -> str:
        subject.cache()
        fresh = subject()
        for step in (0, subject.scale.steps // 2):
            try:
                subject(callback_on_step_end=stops_at(step, error))
            except Unwell:
                require(error, "an exception that nobody raised")
            require(torch.equal(subject(), fresh), f"stopped at step {step}, the next one differs")
        return "the next generation is a fresh one to the bit"

    return run


# ---- compiling -------------------------------------------------------------------------------


def blocks_of(subject: Subject) -> list[torch.nn.Module]:
    """Return the transformer's blocks."""
    transformer = subject.pipe.transformer
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


def compile_blocks(subject: Subject, backend: Any) -> None:
    """Compile each block: by diffusers' call where it knows the model's blocks."""
    if subject.pipe.transformer._repeated_blocks:
        subject.pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        for block in blocks_of(subject):
            block.compile(backend=backend, fullgraph=True)


def replace_blocks(subject: Subject, backend: Any) -> None:
    """Put torch.compile's wrapper in each block's place, as xDiT's runner does beside a cache."""
    transformer = subject.pipe.transformer
    for name in ("transformer_blocks", "single_transformer_blocks"):
        listed = getattr(transformer, name, [])
        for i, block in enumerate(listed):
            listed[i] = torch.compile(block, backend=backend)


def compile_whole(subject: Subject, backend: Any = "eager") -> None:
    """Compile the transformer in place."""
    subject.pipe.transformer.compile(backend=backend)


def compile_forward(subject: Subject, backend: Any = "eager") -> None:
    """Compile the transformer's forward, as xDiT's --use_torch_compile does."""
    transformer = subject.pipe.transformer
    transformer.forward = torch.compile(transformer.forward, backend=backend)


def wrap_compiled(subject: Subject) -> None:
    """Put torch.compile's wrapper in the transformer's place."""
    subject.pipe.transformer = torch.compile(subject.pipe.transformer, backend="eager")


def compiles(
    how: Callable[[Subject, Any], None], when: str, times: int = 1, **options: Any
) -> Callable[[Subject], str]:
    """Return a run that compiles as many graphs with the cache as without it.

    Args:
        how: compiles with a backend, which counts.
        when: "before" or "after" the cache is applied.
        times: how often: whatever holds the cache is compiled anew as that comes or goes, which
            it does three times here.
        **options: of the cache that skips.
    """

    def run(subject: Subject) -> str:
        torch._dynamo.reset()
        uncached, cached = CompileCounter(), CompileCounter()
        twin = Subject.load(subject.model, subject.scale)
        how(twin, uncached)
        wanted = twin()
        twin()
        torch._dynamo.reset()
        change = {when: lambda subject: how(subject, cached)}
        found = beside(subject, wanted=wanted, **change, **options)
        require(
            0 < cached.frame_count <= times * uncached.frame_count,
            f"{cached.frame_count} graphs with the cache, {uncached.frame_count} without",
        )
        return f"{cached.frame_count} graphs (uncached {uncached.frame_count}); {found}"

    return run


# ---- LoRA and offloading ---------------------------------------------------------------------


def load_lora(subject: Subject) -> None:
    """Inject a LoRA of rank 4 with random weights into every attention."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    transformer = subject.pipe.transformer
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(lora)
    else:
        inject_adapter_in_model(lora, transformer)


def lora_unloaded(subject: Subject) -> str:
    """With the cache on: load, run, unload, and find what was before."""
    subject.cache()
    plain = subject()
    load_lora(subject)
    require(not torch.equal(subject(), plain), "the LoRA changes nothing")
    subject.pipe.transformer.delete_adapters("default")
    require(torch.equal(subject(), plain), "after unloading the latents are not those of before")
    return "after unloading the latents are those of before to the bit"


def offload_model(subject: Subject) -> None:
    """Switch on diffusers' model offload, with the host as device where nothing else is there."""
    device = None if torch.accelerator.is_available() else "cpu"
    subject.pipe.enable_model_cpu_offload(device=device)


def offload_layers(subject: Subject) -> None:
    """Offload each layer by accelerate, as sequential offload does."""
    from accelerate import cpu_offload

    cpu_offload(subject.pipe.transformer, execution_device=torch.device("cpu"))


def offload_groups(level: str) -> Change:
    """Return diffusers' group offload at this level."""

    def change(subject: Subject) -> None:
        host = torch.device("cpu")
        subject.pipe.transformer.enable_group_offload(
            onload_device=host,
            offload_device=host,
            offload_type=level,
            num_blocks_per_group=2 if level == "block_level" else None,
        )

    return change


def lets_go(subject: Subject) -> str:
    """Offloading is taken off while the cache is on, which goes on."""
    offload_model(subject)
    subject.cache()
    first, hits = subject(), subject.hits
    subject.pipe.remove_all_hooks()
    require(torch.equal(subject(), first), "without offloading the latents differ")
    require(subject.hits == hits and hook_on(subject.pipe.transformer) is not None, "lost")
    return "the cache goes on"


# ---- number formats --------------------------------------------------------------------------


def cast(dtype: torch.dtype) -> Change:
    """Return a change of all weights into a format."""
    return lambda subject: subject.pipe.to(dtype)


def stored_in_bfloat16(subject: Subject) -> None:
    """Keep the weights in bfloat16 and compute in float32."""
    subject.pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )
