"""xDiT's runner with the caches of this package: the console command `xdit-fastcache`.

It takes every flag of xDiT's `xdit`, and `--cache_method` also takes our methods:

    xdit-fastcache --model FLUX.1-dev --prompt "a red ring" --ulysses_degree 2 \\
        --cache_method fastcache --cache_config '{"cache_ratio_threshold": 0.05}'

Under torchrun, each rank runs this module: `torchrun --nproc_per_node 2 -m
xfuser_fastcache.xdit.runner --model FLUX.1-dev ...`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from xfuser_fastcache.apply import denoisers_of, get_cache_statistics
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.xdit import cpu_platform
from xfuser_fastcache.xdit.mends import mend_xfuser

STATISTICS_FILE = "cache_statistics.json"


def launch(arguments: list[str] | None = None) -> None:
    """Start as many ranks as the flags ask for, as `xdit` does, each with this runner."""
    cpu_platform.enable_cpu_platform()
    from torch.distributed.run import main as torchrun
    from xfuser.cli import extract_torchrun_args, get_nproc_from_args

    given = sys.argv[1:] if arguments is None else arguments
    of_torchrun, of_runner = extract_torchrun_args(given)
    if of_torchrun["--nproc_per_node"] is None:
        of_torchrun["--nproc_per_node"] = str(get_nproc_from_args(of_runner))
    torchrun(
        [*(f"{name}={value}" for name, value in of_torchrun.items()), "-m", __name__] + of_runner
    )


def run(arguments: list[str] | None = None) -> None:
    """Be one rank: load the model, generate, save pictures, timings and the cache's statistics."""
    logging.basicConfig(level=logging.INFO)
    cpu_platform.enable_cpu_platform()
    mend_xfuser()
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser
    from xfuser.runner import xFuserModelRunner

    flags = xFuserArgs.add_runner_args(FlexibleArgumentParser(description=__doc__.splitlines()[0]))
    options = vars(flags.parse_args(arguments))
    Path(options["output_directory"]).mkdir(parents=True, exist_ok=True)
    runner = xFuserModelRunner(options)
    runner.print_args(options)
    inputs = runner.preprocess_args(options)
    runner.initialize(inputs)
    if options["profile"]:
        _, _, profile = runner.profile(inputs)
        runner.save(profile=profile)
    else:
        output, timings = runner.run(inputs)
        runner.save(output=output, timings=timings)
    save_statistics(runner.model.pipe, Path(options["output_directory"]))
    cpu_platform.finish()
    runner.cleanup()


def save_statistics(pipe: Any, directory: Path) -> None:
    """Write the cache's statistics beside xDiT's timings, where there is a cache."""
    from xfuser.core.utils.runner_utils import is_last_process, log

    if not is_last_process() or hook_on(pipe.transformer) is None:
        return
    for name, denoiser in denoisers_of(pipe).items():
        statistics = get_cache_statistics(denoiser)
        suffix = "" if name == "transformer" else f"_{name}"
        path = (directory / STATISTICS_FILE).with_stem(Path(STATISTICS_FILE).stem + suffix)
        path.write_text(json.dumps(statistics, indent=2) + "\n")
        log(
            f"{statistics['use_cache']}: {statistics['block_approx_ratio']:.1%} of the blocks "
            f"skipped, {statistics['collectives_per_step']:g} collectives a step; statistics in "
            f"{path}"
        )


if __name__ == "__main__":
    run()
