"""Runs tiny pipelines through real xfuser on the CPU, uncached: one JSON line a rank and run.

Started by torchrun, for example::

    torchrun --standalone --nproc_per_node 2 tests/xdit_control.py --model flux --ulysses_degree 2

Several models and several ``--warmup_steps`` run one after another in the same layout, since
importing costs most of the time. The degrees of parallelism are fixed once per process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from support.xdit_runs import describe, latents_of, own_share, wrap  # noqa: E402

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402


def cut_text(call: dict[str, Any], tokens: int) -> None:
    """Leave only the first `tokens` of the text."""
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        mask = f"{name}_mask"
        if mask in call:
            call[mask] = call[mask][:, :tokens]
        if name in call:
            call[name] = call[name][:, :tokens]
    if "max_sequence_length" in call:
        call["max_sequence_length"] = tokens


def use_embeddings_for_prompts(pipeline: Any, call: dict[str, Any]) -> None:
    """Let ``prompt=""`` stand for the embeddings: xfuser's warm-up run passes no others."""
    import torch

    def encode_prompt(**_arguments: Any) -> Any:
        embeds = call["prompt_embeds"]
        return embeds, call["pooled_prompt_embeds"], torch.zeros(embeds.shape[1], 3)

    pipeline.encode_prompt = encode_prompt


def run(model: str, options: argparse.Namespace, warmup_steps: int) -> list[dict[str, Any]]:
    """Build one pipeline and generate ``--repeat`` times; one description a generation."""
    from diffusers_adapters.tiny import TINY_PIPELINES

    size = {} if options.size is None else {"size": options.size}
    pipeline, call = TINY_PIPELINES[model](batch=options.batch, **size)
    call["num_inference_steps"] = options.num_inference_steps
    if options.guidance_scale is not None:
        call["guidance_scale"] = options.guidance_scale
    before = dict(call)
    if options.text_before is not None:
        cut_text(before, options.text_before)
    if options.text_tokens is not None:
        cut_text(call, options.text_tokens)
    wrapped, input_config = wrap(
        pipeline,
        call,
        warmup_steps=warmup_steps,
        ulysses_degree=options.ulysses_degree,
        ring_degree=options.ring_degree,
        pipefusion_parallel_degree=options.pipefusion_parallel_degree,
        num_pipeline_patch=options.num_pipeline_patch,
        data_parallel_degree=options.data_parallel_degree,
        use_cfg_parallel=options.use_cfg_parallel,
    )
    if options.prepare_run:
        encode_prompt = pipeline.encode_prompt
        use_embeddings_for_prompts(pipeline, call)
        wrapped.prepare_run(input_config)
        pipeline.encode_prompt = encode_prompt
    if options.text_before is not None:
        wrapped(**own_share(before, options.batch))
    described = []
    for _ in range(options.repeat):
        described.append(describe(latents_of(wrapped(**own_share(call, options.batch)))))
    return described


def main() -> None:
    """Run every model and number of warm-up steps in the layout of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["flux"], help="names in TINY_PIPELINES")
    parser.add_argument("--warmup_steps", nargs="+", type=int, default=[1], help="PipeFusion's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="Wan and FLUX: pixels of a side")
    parser.add_argument("--repeat", type=int, default=1, help="generations of each pipeline")
    parser.add_argument("--num_inference_steps", type=int, default=3)
    parser.add_argument("--text_tokens", type=int, help="FLUX and SD3: fewer than 8")
    parser.add_argument("--text_before", type=int, help="as many in a generation before")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--prepare_run", action="store_true", help="xfuser's warm-up run (FLUX)")
    parser.add_argument("--ulysses_degree", type=int, default=1)
    parser.add_argument("--ring_degree", type=int, default=1)
    parser.add_argument("--pipefusion_parallel_degree", type=int, default=1)
    parser.add_argument("--num_pipeline_patch", type=int, default=None)
    parser.add_argument("--data_parallel_degree", type=int, default=1)
    parser.add_argument("--use_cfg_parallel", action="store_true")
    options = parser.parse_args()

    cpu_platform.enable_cpu_platform()
    import torch.distributed as dist

    for model in options.model:
        for warmup_steps in options.warmup_steps:
            generations = run(model, options, warmup_steps)
            line = {
                "rank": dist.get_rank(),
                "model": model,
                "warmup_steps": warmup_steps,
                **generations[0],
                "repeats": all(again == generations[0] for again in generations),
                "backend": dist.get_backend(),
            }
            sys.stdout.write(f"\n{json.dumps(line)}\n")
            sys.stdout.flush()
    cpu_platform.finish()


if __name__ == "__main__":
    main()
