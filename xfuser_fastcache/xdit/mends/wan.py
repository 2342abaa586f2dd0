"""A bug of xfuser's runner with Wan; see `mends`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from xfuser_fastcache.xdit.compat import replace, require

RUNNER = "xfuser.model_executor.models.runner_models.wan"
RUN = "xFuserWan21VACEModel._run_pipe"


def hands_on_a_list(source: str) -> bool:
    """The command line makes a list of prompts, which diffusers' pipeline refuses."""
    return 'prompt=input_args["prompt"]' in source


def hand_on_one_prompt(module: ModuleType) -> None:
    """Hand on the one prompt of a list of one; of more, diffusers says that it takes one."""
    run = require(module, RUN)

    @functools.wraps(run)
    def run_with_one_prompt(self: Any, input_args: dict[str, Any]) -> Any:
        prompt = input_args["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            input_args = {**input_args, "prompt": prompt[0]}
        return run(self, input_args)

    replace(module, RUN, run_with_one_prompt)
