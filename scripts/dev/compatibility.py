"""Run every feature of diffusers and xDiT beside the cache, and write down what came out.

    python scripts/compatibility.py                        # all: docs/compatibility.md
    python scripts/compatibility.py --only LoRA ControlNet --output runs/lora.md

A row is one check on an embedded toy; tests/test_compatibility.py runs the
same ones. Exits with status 1 where one does not come out as written, after all have run.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console

from scripts.dev._beside import (
    ELSEWHERE,
    REFUSED,
    ROOT,
    Broken,
    Check,
    Scale,
    Subject,
    beside,
    generating,
    in_turn,
    meets,
    with_cache,
    works,
)
from scripts.dev._features import (
    becomes,
    calling,
    cast,
    compile_blocks,
    compile_forward,
    compile_whole,
    compiles,
    lets_go,
    load_lora,
    lora_unloaded,
    nudge,
    offload_groups,
    offload_layers,
    offload_model,
    replace_blocks,
    scheduled,
    sixteen_channels,
    stopped,
    stored_in_bfloat16,
    wrap_compiled,
)
from xfuser_fastcache.cli.flags import flags_of

PAGE = Scale(pixels=64, steps=14, threshold=0.3)
BEFORE, AFTER = "before", "after"
STRENGTH = 0.6


def _compiling() -> list[Check]:
    """Compiled blocks, and transformers compiled as a whole."""
    row = partial(Check, "torch.compile")
    by_hand = "every `block.compile(fullgraph=True)`"
    regional = "`compile_repeated_blocks(fullgraph=True)`"
    replaced = "`torch.compile(block)` in each block's place, xDiT's runner"
    whole, wrapper = "`transformer.compile()`", "`torch.compile(transformer)`"
    forward = "`transformer.forward = torch.compile(...)`, xDiT's `--use_torch_compile`"
    output = {"forecaster": "output"}
    cached, at_once, in_time = with_cache(), "Compile its blocks in place", "reached into the cache"
    return [
        *(
            row(f"{what}, {when} the cache", model, compiles(how, when), slow=slow)
            for what, how, model, when, slow in (
                (regional, compile_blocks, "flux", BEFORE, True),
                (regional, compile_blocks, "flux", AFTER, True),
                (by_hand, compile_blocks, "sd3", BEFORE, True),
                (by_hand, compile_blocks, "sd3", AFTER, True),
                (by_hand, compile_blocks, "pixart", BEFORE, True),
                (by_hand, compile_blocks, "pixart", AFTER, True),
                (replaced, replace_blocks, "flux", BEFORE, False),
                (replaced, replace_blocks, "sd3", BEFORE, True),
                (replaced, replace_blocks, "pixart", BEFORE, True),
            )
        ),
        row(
            f"{whole}, before the cache with `forecaster='output'`",
            "flux",
            compiles(compile_whole, BEFORE, times=3, **output),
            slow=True,
        ),
        row(
            f"{forward}, before the cache with `forecaster='output'`",
            "flux",
            compiles(compile_forward, BEFORE, times=3, **output),
            slow=True,
        ),
        *(
            row(what, "flux", meets(generating(*changes), error, words), REFUSED)
            for what, changes, error, words in (
                (f"{whole}, before the cache", (compile_whole, cached), ValueError, at_once),
                (f"{whole}, after the cache", (cached, compile_whole), RuntimeError, in_time),
                (f"{wrapper}, before the cache", (wrap_compiled, cached), ValueError, at_once),
                (f"{wrapper}, after the cache", (cached, wrap_compiled), RuntimeError, in_time),
                (f"{forward}, before the cache", (compile_forward, cached), RuntimeError, in_time),
            )
        ),
    ]


def _adapting() -> list[Check]:
    """LoRA."""
    row = partial(Check, "LoRA (peft)")
    # diffusers' PixArt has no add_adapter.
    added = "`add_adapter`"
    models = {"flux": added, "sd3": added, "pixart": "`inject_adapter_in_model`"}
    return [
        *(
            row(f"{how}, {when} the cache", model, works(**{when: load_lora}))
            for (model, how), when in itertools.product(models.items(), (BEFORE, AFTER))
        ),
        *(
            row("`delete_adapters` under the cache", model, lora_unloaded)
            for model in ("flux", "sd3")
        ),
    ]


def _offloading() -> list[Check]:
    """Weights that are elsewhere until they are needed."""
    row = partial(Check, "offloading, on the host alone")
    ways = {
        '`enable_model_cpu_offload(device="cpu")`': offload_model,
        "accelerate's `cpu_offload`, a layer at a time": offload_layers,
        "`enable_group_offload`, by layers": offload_groups("leaf_level"),
        "`enable_group_offload`, by blocks": offload_groups("block_level"),
    }
    # Calls that have to be tried where there is an accelerator.
    calls = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
    absent = () if torch.accelerator.is_available() else calls
    return [
        *(
            row(f"{way}, {when} the cache", "flux", works(**{when: change}))
            for (way, change), when in itertools.product(ways.items(), (BEFORE, AFTER))
        ),
        row("`remove_all_hooks` under the cache", "flux", lets_go),
        *(
            row(
                f"`{name}()`, uncached",
                "flux",
                meets(
                    lambda subject, name=name: getattr(subject.pipe, name)(),
                    RuntimeError,
                    "requires accelerator, but not found",
                ),
                ELSEWHERE,
            )
            for name in absent
        ),
    ]


def _decoding() -> list[Check]:
    """The VAE."""
    row = partial(Check, "VAE")
    pixels = {"output_type": "pt"}

    def switched(name: str) -> Callable[[Subject], None]:
        def change(subject: Subject) -> None:
            subject.call.update(pixels, prompt=["a large red ring, center, on black"] * 2)
            getattr(subject.pipe.vae, name)()

        return change

    return [
        *(
            row(f"`vae.{name}()`", "flux", works(before=switched(name)))
            for name in ("enable_tiling", "enable_slicing")
        ),
    ]


def _pipelines() -> list[Check]:
    """Image-to-image, inpainting, ControlNet."""
    row = partial(Check, f"pipelines of diffusers, strength {STRENGTH}")
    from_picture = partial(becomes, strength=STRENGTH)
    painted = partial(from_picture, mask=True)

    def masked(subject: Subject) -> str:
        mask = [int(step % 3 == 0) for step in range(subject.scale.steps)]
        return beside(subject, from_picture("FluxImg2ImgPipeline"), steps_mask=mask)

    return [
        row("`FluxImg2ImgPipeline`", "flux", works(before=from_picture("FluxImg2ImgPipeline"))),
        row("the same with a `steps_mask` for the whole plan", "flux", masked),
        row(
            "the same with a `steps_mask` for the steps that are taken",
            "flux",
            meets(
                generating(from_picture("FluxImg2ImgPipeline"), with_cache(steps_mask=[1, 0])),
                ValueError,
                "one entry a step of the scheduler's plan",
            ),
            REFUSED,
        ),
        row("`FluxInpaintPipeline`", "flux", works(before=painted("FluxInpaintPipeline"))),
        row("`FluxControlNetPipeline`", "flux", works(before=becomes("FluxControlNetPipeline"))),
        row(
            "the same, every block decided by itself, forecast by `linear`",
            "flux",
            works(
                before=becomes("FluxControlNetPipeline"), granularity="block", forecaster="linear"
            ),
        ),
        row(
            "the same with `forecaster='output'`",
            "flux",
            works(before=becomes("FluxControlNetPipeline"), forecaster="output"),
        ),
        row(
            "`FluxControlNetImg2ImgPipeline`",
            "flux",
            works(before=from_picture("FluxControlNetImg2ImgPipeline")),
        ),
        row(
            "`FluxControlNetInpaintPipeline`",
            "flux",
            works(before=painted("FluxControlNetInpaintPipeline")),
        ),
        row(
            "`StableDiffusion3Img2ImgPipeline`",
            "sd3",
            works(before=from_picture("StableDiffusion3Img2ImgPipeline")),
        ),
        row(
            "`StableDiffusion3InpaintPipeline` (random weights, 16 channels)",
            "sd3",
            works(
                before=in_turn(sixteen_channels, painted("StableDiffusion3InpaintPipeline")),
                cache_ratio_threshold=1e6,
            ),
        ),
        row(
            "`StableDiffusion3ControlNetPipeline`",
            "sd3",
            works(before=becomes("StableDiffusion3ControlNetPipeline")),
        ),
    ]


def _schedulers() -> list[Check]:
    """Schedulers: one call a step, two calls a step, fresh noise at each step."""
    row = partial(Check, "schedulers")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
    noisy = {"idle": True, "cache_ratio_threshold": PAGE.threshold}
    chosen: tuple[tuple[str, str, dict[str, Any], str, dict[str, Any]], ...] = (
        ("flux", "FlowMatchEulerDiscreteScheduler", {}, "", {}),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {}, "", {}),
        ("flux", "UniPCMultistepScheduler", flow, " with flow sigmas", {}),
        ("flux", "DPMSolverMultistepScheduler", flow, " with flow sigmas", {}),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}, ", two calls a step", {}),
        ("pixart", "DPMSolverMultistepScheduler", {}, "", {}),
        ("pixart", "DDIMScheduler", {}, "", {}),
        ("pixart", "UniPCMultistepScheduler", {}, "", {}),
        ("pixart", "EulerDiscreteScheduler", {}, "", {}),
        ("pixart", "HeunDiscreteScheduler", {}, ", two calls a step", {}),
        ("pixart", "DDPMScheduler", {}, ", new noise at each step", noisy),
        ("pixart", "EulerAncestralDiscreteScheduler", {}, ", new noise at each step", {}),
    )
    return [
        row(f"`{name}`{note}", model, works(before=scheduled(name, **config), **how))
        for model, name, config, note, how in chosen
    ]


def _steering() -> list[Check]:
    """Callbacks, interruption, exceptions."""
    row = partial(Check, "in the middle of a generation")
    return [
        *(
            row(
                "`callback_on_step_end` that changes the latents",
                model,
                works(before=calling(callback_on_step_end=nudge)),
            )
            for model in ("flux", "sd3")
        ),
        *(row("`pipe._interrupt = True`", model, stopped(False)) for model in ("flux", "sd3")),
        *(row("an exception in a callback", model, stopped(True)) for model in ("flux", "sd3")),
    ]


def _numbers() -> list[Check]:
    """Number formats."""
    row = partial(Check, "number formats")
    formats = (torch.float32, torch.bfloat16, torch.float16)
    models = ("flux", "sd3", "pixart")
    return [
        *(
            row(f"`{dtype}`", model, works(before=cast(dtype)))
            for dtype, model in itertools.product(formats, models)
        ),
        row(
            "`enable_layerwise_casting`, stored in bfloat16",
            "flux",
            works(before=stored_in_bfloat16),
        ),
    ]


CHECKS = (
    *_compiling(),
    *_adapting(),
    *_offloading(),
    *_decoding(),
    *_pipelines(),
    *_schedulers(),
    *_steering(),
    *_numbers(),
)


def document(rows: list[tuple[Check, str]], failures: list[str]) -> str:
    """Return the Markdown page."""
    packages = ("torch", "diffusers", "xfuser", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        "# Beside other features of diffusers and xDiT",
        "",
        f"Written by `{shlex.join(['python', *sys.argv])}` on {platform.machine()}, "
        f"{os.cpu_count()} CPU cores, no GPU; {versions}.",
        "",
        f"Each row is the embedded toy of that model, one picture of {PAGE.pixels} x {PAGE.pixels} "
        f"in {PAGE.steps} steps. *Works* means: with threshold 0 the latents are those of the same "
        "feature uncached, to the bit; after `remove_cache` too; with the threshold at "
        f"{PAGE.threshold} steps are skipped, nothing is infinite or NaN, and a second generation "
        "repeats the first to the bit. PSNR is that of the latents (of the pixels under *VAE*) "
        "against uncached. *Graphs* are what torch.compile hands to its backend, recompilations "
        "counted.",
    ]
    for group, of_group in itertools.groupby(rows, key=lambda row: row[0].group):
        lines += ["", f"## {group}", "", "| feature | model | outcome | measured, or the message |"]
        lines += ["| --- | --- | --- | --- |"]
        for check, measured in of_group:
            cell = measured.replace("|", "\\|")
            lines += [f"| {check.feature} | {check.model} | {check.outcome} | {cell} |"]
    if failures:
        lines += ["", "## What does not hold", "", *(f"- {line}" for line in failures)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Run the checks, write the page, list what does not hold; return the exit status."""
    parser = flags_of("scripts/compatibility.py", __doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name holds a word")
    parser.add_argument("--output", default="docs/compatibility.md", help="the page")
    options = parser.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console()
    words = options.only or [""]
    chosen = [c for c in CHECKS if any(word in f"{c.group}, {c.name}" for word in words)]
    if not chosen:
        parser.error(f"no row holds {' or '.join(map(repr, words))}")
    rows, failures = [], []
    for number, check in enumerate(chosen, start=1):
        start = time.perf_counter()
        try:
            found = check(PAGE)
        except Exception as error:  # one broken feature must not hide the others
            words = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            found = f"**does not hold**: {' '.join(words.split())}"
            failures.append(f"{check.name}: {' '.join(words.split())}")
        rows.append((check, found))
        took = time.perf_counter() - start
        console.print(
            f"{number}/{len(chosen)} {check.name}: {found} ({took:.1f} s)",
            markup=False,
            soft_wrap=True,
        )
    path = ROOT / options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(rows, failures))
    console.print(f"{len(rows) - len(failures)} of {len(rows)} hold; {options.output}")
    return 1 if failures else 0
