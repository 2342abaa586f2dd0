"""TeaCache's polynomial: what is recorded, how it is fitted, and the files beside the toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.worlds import python

from diffusers_adapters.tiny import TINY_PIPELINES
from xfuser_fastcache import CacheConfig, apply_cache_on_transformer, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.calibration.polynomial import ChangeRecorder, fit_polynomial
from xfuser_fastcache.hooks import hook_on

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(**{**call, "num_inference_steps": STEPS, **changes, "generator": generator}).images


@pytest.mark.parametrize("model", ["flux", "sd3", "sd3.5", "pixart"])
def test_what_is_recorded_is_what_the_gate_weighs(model: str) -> None:
    """The gate's statistic at a step that is computed is the change of the step's input."""
    pipe, call = TINY_PIPELINES[model]()
    pipe.set_progress_bar_config(disable=True)
    plain = generate(pipe, call)
    with ChangeRecorder(pipe.transformer, adapter_of(pipe.transformer)) as recorder:
        assert torch.equal(generate(pipe, call), plain)
        first = recorder.take()
        generate(pipe, call)
        assert recorder.take() == first
    # Neither the first step, which has nothing before it, nor the last.
    assert len(first) == STEPS - 2
    apply_cache_on_transformer(
        pipe.transformer, use_cache="Tea", coefficients=[1.0, 0.0], cache_ratio_threshold=1e-9
    )
    generate(pipe, call)
    decisions = hook_on(pipe.transformer).engine.decisions.decisions
    weighed = [decision.judgements[0].statistic for decision in decisions]
    remove_cache(pipe.transformer)
    assert weighed[1:-1] == pytest.approx([change for change, _ in first], rel=1e-4)


def test_branches_are_compared_with_their_own_step_before() -> None:
    pipe, call = TINY_PIPELINES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    call |= {
        "true_cfg_scale": 1.0001,
        "negative_prompt_embeds": call["prompt_embeds"] * 3,
        "negative_pooled_prompt_embeds": call["pooled_prompt_embeds"] * 3,
    }
    with ChangeRecorder(pipe.transformer, adapter_of(pipe.transformer)) as recorder:
        generate(pipe, call)
        both = recorder.take()
    assert len(both) == 2 * (STEPS - 2)
    # Both branches are given the same latents; a change between branches would be far larger.
    changes = np.array(both).reshape(-1, 2, 2)[:, :, 1]
    assert (changes[:, 0] != changes[:, 1]).all()
    assert changes.max() < 3 * changes.min(axis=1).max()


def test_the_fit_finds_a_polynomial_that_is_there() -> None:
    wanted = [500.0, -280.0, 56.0, -3.8, 0.26]
    x = np.linspace(0.02, 0.12, 40)
    found = fit_polynomial(list(zip(x, np.polyval(wanted, x), strict=True)))
    assert found.coefficients == pytest.approx(wanted, rel=1e-6)
    assert found.correlation == pytest.approx(1.0)
    assert found.domain == (0.02, 0.12)


@pytest.mark.parametrize("pairs", [[], [(0.1, 0.2)] * 3, [(0.1, float("nan"))] * 9])
def test_too_few_or_broken_pairs_are_an_error(pairs: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=f"degree 4 needs more than 4 .* there are {len(pairs)}"):
        fit_polynomial(pairs)


@pytest.mark.parametrize("model", ["sd3", "pixart"])
def test_the_toys_have_a_polynomial_that_stays_positive(model: str) -> None:
    """A sum that falls where much changes would never reach the threshold."""
    config = CacheConfig.from_file(ROOT / "toys" / model / "teacache.yaml")
    assert config.use_cache == "Tea"
    assert min(np.polyval(config.coefficients, np.linspace(0, 1, 200))) > 0


def test_the_script_writes_a_config_that_names_its_command(tmp_path: Path) -> None:
    output = tmp_path / "tea.yaml"
    arguments = ["--num_prompts", "1", "--num_inference_steps", "6", "--degree", "1"]
    script = ROOT / "scripts" / "fit_polynomial.py"
    python(
        script, "--model", ROOT / "toys" / "sd3", *arguments, "--output", output
    ).check_returncode()
    assert len(CacheConfig.from_file(output).coefficients) == 2
    text = output.read_text()
    assert " ".join(arguments[2:4]) in text and "4 steps" in text
