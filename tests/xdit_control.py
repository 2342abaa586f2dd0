"""Runs tiny pipelines through real xfuser on the CPU, uncached: one JSON line a rank and run.

Started by torchrun, for example::

    torchrun --standalone --nproc_per_node 2 tests/xdit_control.py --model flux --ulysses_degree 2

Several models and several ``--warmup_steps`` run one after another in the same layout, since
importing costs most of the time. The degrees of parallelism are fixed once per process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from xfuser_fastcache.xdit import cpu_platform  # noqa: E402

_PER_SAMPLE = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "negative_prompt_attention_mask",
    "image",
    "mask_image",
)


def wrap(pipeline: Any, call: dict[str, Any], **xfuser_args: Any) -> tuple[Any, Any]:
    """Build the configs from ``xFuserArgs`` fields and put xfuser's class around the pipeline.

    A pipeline that xfuser has no class for is run as its runner would; see `as_the_runner_does`.

    Returns:
        The wrapped pipeline and xfuser's ``InputConfig``.
    """
    from xfuser import xFuserArgs
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    engine_config, input_config = xFuserArgs(
        height=call["height"],
        width=call["width"],
        num_inference_steps=call["num_inference_steps"],
        max_sequence_length=call.get("max_sequence_length", 256),
        output_type="latent",
        **xfuser_args,
    ).create_config()
    cpu_platform.prepare_engine_config(engine_config, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    try:
        wrapper_class = xFuserPipelineWrapperRegister.get_class(pipeline)
    except ValueError:
        if engine_config.parallel_config.pp_config.pp_degree > 1:
            raise
        return as_the_runner_does(pipeline, engine_config, call), input_config
    return wrapper_class(pipeline, engine_config), input_config


def as_the_runner_does(pipeline: Any, engine_config: Any, call: dict[str, Any]) -> Any:
    """Give a FLUX pipeline the transformer of xfuser's runner, which cuts latents by itself.

    The pipeline stays diffusers' own, and every rank is given all latents.
    """
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    transformer = xFuserFlux1Transformer2DWrapper(
        **{k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    ).eval()
    transformer.load_state_dict(pipeline.transformer.state_dict())
    pipeline.transformer = transformer
    initialize_runtime_state(pipeline, engine_config)
    get_runtime_state().set_input_parameters(
        batch_size=call["prompt_embeds"].shape[0],
        num_inference_steps=call["num_inference_steps"],
        max_condition_sequence_length=call["max_sequence_length"],
        split_text_embed_in_sp=True,
    )
    return pipeline


def own_share(call: dict[str, Any], batch: int) -> dict[str, Any]:
    """This data-parallel replica's samples, with generators that start anew.

    xfuser splits a list of prompts itself, but leaves embeddings alone.
    """
    import torch
    from xfuser.core.distributed import get_data_parallel_rank, get_data_parallel_world_size

    size = batch // get_data_parallel_world_size()
    share = slice(get_data_parallel_rank() * size, (get_data_parallel_rank() + 1) * size)
    own = {name: value[share] if name in _PER_SAMPLE else value for name, value in call.items()}
    own["generator"] = [torch.Generator("cpu").manual_seed(1000 + i) for i in range(batch)][share]
    return own


def cut_text(call: dict[str, Any], tokens: int) -> None:
    """Leave only the first `tokens` of the text."""
    for name in ("prompt_embeds", "negative_prompt_embeds"):
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


def describe(latents: Any) -> dict[str, Any]:
    """Norm, norm of each sample, eight values and a digest; None on a rank that has no latents."""
    if latents is None:
        return {"norm": None}
    values = latents.double()
    return {
        "norm": values.norm().item(),
        "sample_norms": [sample.norm().item() for sample in values],
        "values": values.flatten()[:: max(1, values.numel() // 8)][:8].tolist(),
        "sha256": hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest(),
    }


def run(model: str, options: argparse.Namespace, warmup_steps: int) -> list[dict[str, Any]]:
    """Build one pipeline and generate ``--repeat`` times; one description a generation."""
    from support.tiny_models import TINY_PIPELINES

    pipeline, call = TINY_PIPELINES[model](batch=options.batch)
    call["num_inference_steps"] = options.num_inference_steps
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
        output = wrapped(**own_share(call, options.batch))
        described.append(describe(None if output is None else output.images))
    return described


def main() -> None:
    """Run every model and number of warm-up steps in the layout of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["flux"], help="names in TINY_PIPELINES")
    parser.add_argument("--warmup_steps", nargs="+", type=int, default=[1], help="PipeFusion's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="generations of each pipeline")
    parser.add_argument("--num_inference_steps", type=int, default=3)
    parser.add_argument("--text_tokens", type=int, help="FLUX and SD3: fewer than 8")
    parser.add_argument("--text_before", type=int, help="as many in a generation before")
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
