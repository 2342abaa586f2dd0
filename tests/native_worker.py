"""One rank of one xDiT layout: every way in which xDiT's users ask for a cache, on the toys.

Started by `worlds.run_world`. All ways of one model are compared with the plain call of
`apply_cache_on_transformer` in the same layout, to the bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support.worlds import report  # noqa: E402

import xfuser_fastcache  # noqa: E402
from xfuser_fastcache.xdit import cpu_platform  # noqa: E402
from xfuser_fastcache.xdit.mends import mend_xfuser  # noqa: E402

STEPS = 8
OPTIONS = {"cache_ratio_threshold": 1.0, "verify_consensus": True, "sync_timeout_s": 60}
ASKED = {"use_cache": "Fast", **OPTIONS}
PROMPT = "a large red ring, top left, on dark blue"
# Class of xfuser and folder of the toy.
MODELS = {
    "flux": ("xFuserFluxPipeline", "flux"),
    "sd3": ("xFuserStableDiffusion3Pipeline", "sd3"),
    "pixart": ("xFuserPixArtAlphaPipeline", "pixart"),
    "pixart-sigma": ("xFuserPixArtSigmaPipeline", "pixart"),
}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality; two ranks without output agree."""
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


class Ways:
    """The ways to ask for a cache of one model in this world's layout.

    Args:
        model: a name of `MODELS`.
        flags: xDiT's flags for the layout.
    """

    def __init__(self, model: str, flags: list[str]):
        import xfuser

        name, folder = MODELS[model]
        self.wrapped_class = getattr(xfuser, name)
        self.folder = str(ROOT / "toys" / folder)
        self.flags = flags

    def configs(self, *flags: str) -> tuple[Any, Any]:
        """Return what xDiT's scripts make of their command line."""
        from xfuser import xFuserArgs
        from xfuser.config import FlexibleArgumentParser

        parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
        args = parser.parse_args(
            [
                "--model", self.folder, "--prompt", PROMPT, "--height", "128", "--width", "128",
                "--num_inference_steps", str(STEPS), "--max_sequence_length", "32",
                "--no_use_resolution_binning", "--output_type", "latent", *self.flags, *flags,
            ]
        )  # fmt: skip
        engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
        engine_config.runtime_config.dtype = torch.float32
        return engine_config, input_config

    def load(self, *flags: str, **arguments: Any) -> Any:
        """Return the pipeline by xfuser's `from_pretrained`."""
        engine_config, _ = self.configs(*flags)
        pipe = self.wrapped_class.from_pretrained(
            self.folder, engine_config=engine_config, torch_dtype=torch.float32, **arguments
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def original(self) -> Any:
        """Return the diffusers pipeline."""
        engine_config, _ = self.configs()
        return self.wrapped_class.from_pretrained(
            self.folder, engine_config=engine_config, return_org_pipeline=True
        )

    def generate(self, pipe: Any) -> torch.Tensor | None:
        """Return the latents of one generation from the same noise; None on a rank without."""
        of_pixart = "PixArt" in self.wrapped_class.__name__
        output = pipe(
            prompt=PROMPT,
            height=128,
            width=128,
            num_inference_steps=STEPS,
            guidance_scale=2.5,
            max_sequence_length=32,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **({"use_resolution_binning": False} if of_pixart else {}),
        )
        return None if output is None else output.images


def cases(model: str, flags: list[str]) -> dict[str, Any]:
    """Run one model in every way and return what the test asserts on."""
    from xfuser import xDiTParallel
    from xfuser.model_executor.pipelines.fastcache_pipeline import xFuserFastCachePipelineWrapper

    from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache

    ways = Ways(model, flags)
    found: dict[str, Any] = {}

    pipe = ways.load()
    control = ways.generate(pipe)
    apply_cache_on_transformer(pipe.transformer, scheduler=pipe.scheduler, **OPTIONS)
    wanted = ways.generate(pipe)
    statistics = get_cache_statistics(pipe.transformer)
    remove_cache(pipe.transformer)
    found["has_output"] = control is not None
    found["changed"] = control is None or not same(control, wanted)
    found["hits"] = statistics["block_approx_ratio"]
    found["digest"] = statistics["decisions_digest"]

    def check(way: str, pipe: Any, transformer: Any = None) -> None:
        exact = same(ways.generate(pipe), wanted)
        counted = get_cache_statistics(transformer or pipe.transformer)
        found[way] = {
            "exact": exact,
            "steps": counted["steps"],
            "same_decisions": counted["decisions_digest"] == found["digest"],
        }

    pipe = ways.load(cache_args=ASKED)
    _, input_config = ways.configs()
    pipe.prepare_run(input_config)
    check("from_pretrained", pipe)
    remove_cache(pipe.transformer)
    found["removed_exact"] = same(ways.generate(pipe), control)
    check("constructor", ways.wrapped_class(ways.original(), ways.configs()[0], ASKED))
    check(
        "command line",
        ways.load("--cache_method", "fastcache", "--cache_config", json.dumps(OPTIONS)),
    )

    wrapper = xFuserFastCachePipelineWrapper(ways.original())
    wrapper.set_progress_bar_config(disable=True)
    wrapper.enable_fastcache(**OPTIONS)
    paralleler = xDiTParallel(wrapper, *ways.configs())
    check("xDiTParallel", paralleler, wrapper.transformer)
    found["xDiTParallel"]["steps_of_wrapper"] = wrapper.get_cache_statistics()["steps"]
    wrapper.disable_fastcache()
    found["disabled_exact"] = same(ways.generate(paralleler), control)
    KEPT.append(paralleler)

    wrapper = xFuserFastCachePipelineWrapper(ways.load())
    wrapper.enable_fastcache(**OPTIONS)
    check("wrapper of xfuser's pipeline", wrapper)
    return found


# xDiTParallel destroys the process groups when it is deleted, and the others still need them.
KEPT: list[Any] = []


def refusals(flags: list[str]) -> dict[str, str]:
    """What is refused, with its message: alike on every rank, before any rank waits for another."""
    ways, flux = Ways("sd3", flags), Ways("flux", flags)

    def told(call: Callable[[], Any]) -> str:
        try:
            call()
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    return {
        "unknown backend": told(lambda: ways.load(cache_args={"use_cache": "Fst"})),
        "original pipeline": told(
            lambda: ways.load(cache_args={"use_cache": "Fast"}, return_org_pipeline=True)
        ),
        "two caches": told(
            lambda: ways.load("--cache_method", "Fb", cache_args={"use_cache": "Fast"})
        ),
        "xDiT's own beside it": told(
            lambda: flux.load("--cache_method", "Fb", cache_args={"use_teacache": True})
        ),
        "wrong option": told(
            lambda: ways.load("--cache_method", "Fb", "--cache_config", '{"treshold": 1}')
        ),
    }


def backends(flags: list[str]) -> dict[str, float]:
    """Share of steps that every backend computes, by `cache_args` of the constructor."""
    from support.backend_options import OFTEN

    from xfuser_fastcache import get_cache_statistics, remove_cache

    ways = Ways("flux", flags)
    found = {}
    for name, options in OFTEN.items():
        pipe = ways.load(cache_args={"use_cache": name, **options})
        ways.generate(pipe)
        found[name] = get_cache_statistics(pipe.transformer)["block_approx_ratio"]
        remove_cache(pipe.transformer)
    return found


def xdits_own(flags: list[str]) -> dict[str, Any]:
    """`cache_args` of xDiT's own caches and of ours, with and without what our package changes."""
    from xfuser_fastcache.hooks import hook_on
    from xfuser_fastcache.xdit import integration

    ways = Ways("flux", flags)
    found = {}
    for name in ("teacache", "fbcache"):
        args = {f"use_{name}": True, "rel_l1_thresh": 0.6, "num_steps": STEPS}
        pipe = ways.load(cache_args=args)
        with_us = ways.generate(pipe)
        blocks = type(pipe.transformer.transformer_blocks[0]).__name__
        integration.uninstall()
        without_us = ways.generate(ways.load(cache_args=args))
        integration.install()
        found[name] = {"blocks": blocks, "same": same(with_us, without_us)}
    integration.uninstall()
    found["cached without us"] = bool(hook_on(ways.load(cache_args=ASKED).transformer))
    integration.install()
    return found


def main() -> None:
    """Run the cases named on the command line and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--others", action="store_true", help="also refusals and other backends")
    options, flags = parser.parse_known_args()
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    assert xfuser_fastcache.__file__.startswith(str(ROOT))
    found: dict[str, Any] = {"models": {m: cases(m, flags) for m in options.models}}
    if options.others:
        found |= {
            "refusals": refusals(flags),
            "backends": backends(flags),
            "xdits_own": xdits_own(flags),
        }
    report(dist.get_rank(), **found)
    cpu_platform.finish()


if __name__ == "__main__":
    main()
