"""`fastcache calibrate` as a user runs it, on the toy FLUX with 6 steps: resumed, and audited.

One run is broken off, goes on, and is given further flags, as the fixture tells; the tests look at
what it left behind.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.worlds import ROOT

from xfuser_fastcache import apply_cache_on_transformer, remove_cache
from xfuser_fastcache.artifacts.calibration import Fitted, load_fitted
from xfuser_fastcache.calibration import masks, runs
from xfuser_fastcache.calibration.options import RunOptions
from xfuser_fastcache.calibration.record import Recorder, Trajectory
from xfuser_fastcache.cli import calibrate, main
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.xdit.loaded import call_arguments

MODEL = str(ROOT / "toys" / "flux")
SHIPPED = str(ROOT / "toys" / "flux" / "fastcache.safetensors")
STEPS, GENERATIONS = 6, 5
# Small pictures: a quarter of the tokens tells the same.
SMALL = {"height": 64, "width": 64}
CALL = call_arguments(MODEL) | SMALL
COMMON = [
    "--model", MODEL, "--num_inference_steps", str(STEPS), "--dtype", "float32",
    "--call", json.dumps(CALL),
]  # fmt: skip
FLAGS = {
    "audit": COMMON,
    "calibrate": [
        *COMMON, "--cache_ratio_threshold", "0.3", "--significance_level", "0.5", "--max_lag", "3",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class BrokenOff(Exception):
    """The user has had enough."""


class Run:
    """Runs of one command: what was recorded in each, and what it printed."""

    def __init__(self, folder: Path):
        self.output, self.report = folder / "toy.safetensors", folder / "report.json"
        self.records = folder / "toy.records"

    def __call__(self, *flags: str, most: int | None = None, command: str = "calibrate") -> int:
        """Run the command in this process; break it off where it would record more than `most`."""
        self.recorded = 0

        def recorder(*args: Any) -> Recorder:
            if self.recorded == most:
                raise BrokenOff
            self.recorded += 1
            return Recorder(*args)

        to = ["--output", str(self.output)] if command == "calibrate" else [str(self.output)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "Recorder", recorder)
            return main([command, *to, *FLAGS[command], "--report", str(self.report), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run broken off after two records, gone on with, then given masks to search as well."""
    run = Run(tmp_path_factory.mktemp("calibrate"))
    with torch.no_grad():
        with pytest.raises(BrokenOff):
            run(most=2)
        found: dict[str, Any] = {"broken off": sorted(p.name for p in run.records.iterdir())}
        assert run() == 0
        found |= {"recorded": run.recorded, "first": load_fitted(run.output)}
        # All records are there: nothing may be recorded again.
        assert run("--computed_steps", "3", "5", "--moves", "1", most=0) == 0
        found["masks"] = load_fitted(run.output).masks
        # Without a try of its own, the second search finds nothing better than what it is given.
        better = ("--start_from", str(run.output), "--moves", "0")
        assert run("--computed_steps", "3", "5", *better, most=0) == 0
    files = sorted(p.name for p in run.output.parent.iterdir())
    report = json.loads(run.report.read_text())
    return found | {"run": run, "fitted": load_fitted(run.output), "files": files, "report": report}


def test_a_run_that_was_broken_off_goes_on(finished: dict[str, Any]) -> None:
    names = ["full-00000.npz", "full-00001.npz", "settings.json"]
    assert finished["broken off"] == names
    # Three full records are left, and two with the cache on.
    assert finished["recorded"] == 3 + 2
    assert finished["files"] == ["report.json", "toy.records", "toy.safetensors"]


def test_the_file_says_what_it_was_made_of(finished: dict[str, Any]) -> None:
    fitted: Fitted = finished["fitted"]
    wanted = {
        "model": "FluxTransformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps": STEPS,
        "significance_levels": [0.5],
        "cache_ratio_threshold": 0.3,
        "seed": 0,
        "generations": GENERATIONS,
        "dtype_family": "float32",
    }
    assert {name: fitted.metadata[name] for name in wanted} == wanted
    assert fitted.slopes.shape == (STEPS, 3, 4)
    assert set(fitted.scales) == {0.5} and fitted.scales[0.5] > 0
    assert np.isfinite(fitted.slopes[1:]).any() and (fitted.degrees >= 1).all()
    # A single generation was held out: too few to keep a correction.
    assert not fitted.weights.any()


def test_masks_are_added_and_nothing_else_changes(finished: dict[str, Any]) -> None:
    fitted, first = finished["fitted"], finished["first"]
    assert (first.masks, fitted.scales) == ({}, first.scales)
    np.testing.assert_array_equal(fitted.slopes, first.slopes)
    assert {count: (len(mask), sum(mask), mask[0]) for count, mask in fitted.masks.items()} == {
        3: (STEPS, 3, 1),
        5: (STEPS, 5, 1),
    }
    shown = finished["report"]["masks"]["latent_snr_db"]
    for count in ("3", "5"):
        assert all(math.isfinite(value) for value in shown[count].values())
        assert max(shown[count].values()) == shown[count]["steered, moved"]
        assert max(shown[count].values()) == shown[count]["steered, given"]
    assert fitted.masks == finished["masks"]
    # More steps, fewer errors.
    assert shown["5"]["steered, moved"] > shown["3"]["steered, moved"] + 3
    # The masks bring corrections of their own, from the first skipped step on.
    check_steering(fitted, fitted.steering)
    assert fitted.steering_guided.shape == (0, STEPS, 2, 5)


def check_steering(fitted: Fitted, *tables: np.ndarray) -> None:
    """Check that there are corrections from a mask's first skipped step on."""
    for table in tables:
        for (count, mask), weights in zip(sorted(fitted.masks.items()), table, strict=True):
            first, fitted_at = mask.index(0), weights.reshape(STEPS, -1).any(axis=1)
            assert fitted_at.tolist() == [step >= first for step in range(STEPS)], count


def test_with_guidance_masks_bring_corrections_of_each_branch_as_well(tmp_path: Path) -> None:
    run = Run(tmp_path)
    model = str(ROOT / "toys" / "pixart")
    call = json.dumps(call_arguments(model) | SMALL)
    assert run("--model", model, "--call", call, "--computed_steps", "3", "--moves", "0") == 0
    fitted = load_fitted(run.output)
    check_steering(fitted, fitted.steering, fitted.steering_guided)
    without, with_it = fitted.steering_guided[0, -1]
    assert (without == with_it).tolist() == [False, True, False, True, False]


def test_records_of_another_run_are_refused_by_what_differs(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = finished["run"], finished["run"].output.read_bytes()
    assert run("--seed", "7", most=0) == 2
    printed = capsys.readouterr().err
    assert "holds records of a run with another seed, prompts; give the same flags" in printed
    assert run.output.read_bytes() == before


def test_an_audit_of_fresh_generations_has_finite_figures(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished["run"]
    assert run("--num_prompts", "3", "--seed", "3", command="audit") == 0
    printed = capsys.readouterr().out
    (level,) = json.loads(run.report.read_text())["levels"].items()
    alpha, found = level
    assert (alpha, found["generations"], run.recorded) == ("0.5", 3, 3)
    assert 0 <= found["false_skip_rate"] <= 1
    low, high = found["false_skip_interval"]
    assert 0 <= low <= found["false_skip_rate"] <= high <= 1
    assert found["skips"] > 0 and found["hit_ratio"] == found["skips"] / (3 * STEPS)
    assert all(0 <= error < 10 for error in found["error_quantiles"]["stack"].values())
    assert found["oracle"]["false_skip_rate"] == 0
    assert found["literal_test"]["hit_ratio"] >= found["hit_ratio"]
    assert f"{found['false_skip_rate']:.4f}" in printed and f"{found['hit_ratio']:.1%}" in printed


def test_a_cache_with_the_file_computes_as_many_steps_as_asked(finished: dict[str, Any]) -> None:
    run, fitted = finished["run"], finished["fitted"]
    options = RunOptions(model=MODEL, num_inference_steps=STEPS, dtype="float32", call=CALL)
    plain = runs.Runs(options, ["a ring"])
    uncached = plain.latents(0)
    transformer, scheduler = plain.pipe.transformer, plain.pipe.scheduler
    pictures = {}
    for computed in (3, 5):
        apply_cache_on_transformer(
            transformer, scheduler=scheduler, calibration=str(run.output), computed_steps=computed
        )
        pictures[computed] = plain.latents(0)
        flags = [flags for *_, flags in hook_on(transformer).engine.decisions.entries]
        assert flags == [1 - kept for kept in fitted.masks[computed]]
        remove_cache(transformer)
    snr = {n: masks.ratio_db(found, uncached) for n, found in pictures.items()}
    assert 0 < snr[3] < snr[5] < 80
    assert torch.equal(plain.latents(0), uncached)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "the following arguments are required: --output"),
        (["--output", "a", "--report"], "--report: expected one argument"),
        (["--output", "a", "--computed_steps", "7"], "--computed_steps 7: give 1 to 6, the --num"),
        (["--output", "a", "--computed_steps", "3", "0"], "--computed_steps 0: give 1 to 6"),
        (["--output", "a", "--batch_size", "1"], "--batch_size 1: give 2 or more, to fit on"),
        (["--output", "a", "--start_from", "b"], "say of how many steps with --computed_steps"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        calibrate.parse([*FLAGS["calibrate"], *flags])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_prompts", "4"], "4 generations, but alpha = 0.5 needs 5: give more prompts"),
        (["--significance_level", "1.5"], "alpha = 1.5 must lie between 0 and 1"),
        (["--call", '{"hight": 64}'], "FluxPipeline takes no 'hight'; it takes"),
        (["--prompts", "few.txt", "--num_prompts", "9"], "--num_prompts 9, but few.txt holds 2"),
        (
            ["--computed_steps", "3", "--start_from", SHIPPED],
            "fastcache.safetensors' has masks of 28 steps, and this run",
        ),
        (
            ["--computed_steps", "3", "--start_from", "none.safetensors"],
            "cannot read the calibration 'none.safetensors'",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a ring\na square\n")
    assert Run(tmp_path)(*flags, most=0) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastcache calibrate: ") and words in line


# ---- moving steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[1, 0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0, 1]])
def test_one_or_two_steps_but_never_the_first_are_moved_by_one_or_two(mask: list[int]) -> None:
    rng = random.Random(0)
    found = [masks.moved(mask, rng) for _ in range(300)]
    assert all(one[0] and sum(one) == sum(mask) for one in found)
    assert {int(np.abs(np.subtract(one, mask)).sum()) for one in found} <= {0, 2, 4}
    # Each step that may move does, both ways where there is room.
    for step in np.flatnonzero(mask)[1:]:
        for to in (step - 2, step - 1, step + 1, step + 2):
            if 0 < to < len(mask) and not mask[to]:
                wanted = list(mask)
                wanted[step], wanted[to] = 0, 1
                assert wanted in found


@pytest.mark.parametrize("mask", [[1, 1, 1], [1, 0, 0], [1]])
def test_where_no_step_can_move_the_search_ends(mask: list[int]) -> None:
    assert masks.improved(1.0, mask, 5, lambda _: 2.0, seed=0) == (1.0, mask)


def closeness(wanted: list[int]) -> Callable[[list[int]], float]:
    """Return how near a mask's steps are to others, highest for those themselves."""
    places = np.flatnonzero(wanted)
    return lambda mask: -float(np.abs(np.flatnonzero(mask) - places).sum())


def test_steps_are_moved_as_long_as_that_helps_and_tries_last() -> None:
    begin, end = [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1]
    tried: list[list[int]] = []

    def of(mask: list[int]) -> float:
        tried.append(mask)
        return closeness(end)(mask)

    assert masks.improved(of(begin), begin, 99, of, seed=0) == (0.0, end)
    assert len(tried) == len({tuple(mask) for mask in tried})
    tried.clear()
    value, mask = masks.improved(of(begin), begin, 3, of, seed=0)
    assert len(tried) == 1 + 3 and value == max(map(closeness(end), tried)) == closeness(end)(mask)
    assert masks.improved(0.0, end, 99, of, seed=0) == (0.0, end)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = [
        Trajectory(rng.normal(size=(4, 4)), rng.random(2) < 0.5, rng.random(2)) for _ in range(2)
    ]
    runs._write(tmp_path / "a.npz", found)
    for one, other in zip(runs._read(tmp_path / "a.npz"), found, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
