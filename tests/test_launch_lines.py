"""xDiT's documented launch lines with a flag more, and a script of xDiT's form with a line more.

The lines are those of xDiT's README and `examples/run.sh`, for two devices and the toys' size;
`scripts/generate.py` stands for each model's example.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

import pytest
from support.worlds import ROOT, launch

LINES = {
    "flux": "--ulysses_degree 2 --ring_degree 1",
    "sd3": "--pipefusion_parallel_degree 2 --ulysses_degree 1 --ring_degree 1",
    "pixart": "--pipefusion_parallel_degree 1 --ulysses_degree 1 --use_cfg_parallel",
}
OURS = ("--cache_method", "fastcache", "--cache_config", '{"cache_ratio_threshold": 1.0}')


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("model", LINES)
def test_a_documented_line_takes_our_flag(model: str, tmp_path: Path) -> None:
    launch(
        "../scripts/generate.py", 2, "--model", str(ROOT / "toys" / model),
        *shlex.split(LINES[model]), "--height", "128", "--width", "128",
        "--no_use_resolution_binning", "--num_inference_steps", "20", "--warmup_steps", "1",
        "--prompt", "A small dog", *OURS, "--output_dir", str(tmp_path), timeout_s=600,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["use_cache"] == "Fast"
    assert 0 < report["statistics"]["block_approx_ratio"] < 1
    assert len(set(report["decisions_digest"].values())) == 1
    assert (tmp_path / "cached.png").exists()


# The calls of xDiT's example scripts, in their order, of any pipeline; theirs say "cuda" for a
# device. The import at the top is needed on a machine without a GPU, the last one is the line more.
EXAMPLE = """
    import sys
    sys.path.insert(0, {root!r})
    from xfuser_fastcache.xdit import cpu_platform
    cpu_platform.enable_cpu_platform()

    import torch
    from xfuser import {pipeline}, xFuserArgs
    from xfuser.config import FlexibleArgumentParser
    import xfuser_fastcache

    parser = FlexibleArgumentParser(description="xFuser Arguments")
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    engine_config.runtime_config.dtype = torch.float32
    pipe = {pipeline}.from_pretrained(
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        torch_dtype=torch.float32,
    )
    pipe.prepare_run(input_config)
    output = pipe(
        height=input_config.height,
        width=input_config.width,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        guidance_scale=input_config.guidance_scale,
        use_resolution_binning=input_config.use_resolution_binning,
        generator=torch.Generator().manual_seed(input_config.seed),
    )
    if pipe.is_dp_last_group():
        assert output.images[0].size == (128, 128)
    statistics = xfuser_fastcache.get_cache_statistics(pipe.transformer)
    print("SKIPPED", statistics["steps"], statistics["block_approx_ratio"], flush=True)
    cpu_platform.finish()
"""


@pytest.mark.gloo
def test_a_script_of_xdits_form_needs_one_line_and_one_flag(tmp_path: Path) -> None:
    path = tmp_path / "pixartalpha_example.py"
    path.write_text(
        textwrap.dedent(EXAMPLE).format(root=str(ROOT), pipeline="xFuserPixArtAlphaPipeline")
    )
    output = launch(
        path, 2, "--model", str(ROOT / "toys" / "pixart"), *shlex.split(LINES["pixart"]),
        "--height", "128", "--width", "128", "--no_use_resolution_binning",
        "--num_inference_steps", "10", "--warmup_steps", "0", "--prompt", "A cute dog", *OURS,
    )  # fmt: skip
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("SKIPPED")]
    assert len(rows) == 2 and rows[0] == rows[1]
    steps, skipped = rows[0]
    assert steps == "10" and 0 < float(skipped) < 1
