"""`fastcache calibrate` on the ranks of a layout makes the file of one rank, to rounding."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.calibrations import fitted_on
from support.worlds import ROOT, WorldFailed, launch, run_world

from xfuser_fastcache.artifacts.calibration import Fitted, load_fitted
from xfuser_fastcache.calibration import settle
from xfuser_fastcache.calibration.audit import audit
from xfuser_fastcache.calibration.options import CalibrationOptions
from xfuser_fastcache.cli import main
from xfuser_fastcache.config import CacheConfig
from xfuser_fastcache.reports.progress import Progress
from xfuser_fastcache.xdit.loaded import call_arguments
from xfuser_fastcache.xdit.ranks import Place

STEPS = 5
WORKER = "calibrate_worker.py"
TABLES = ("noise_levels", "weights", "slopes", "degrees")
CORRECTIONS = ("steering", "steering_guided")

Reference = Callable[[str], Path]


def flags(model: str, output: Path) -> list[str]:
    """Return the command line of a small calibration; five generations, of which two calibrate."""
    folder = str(ROOT / "toys" / model)
    call = json.dumps(call_arguments(folder) | {"height": 64, "width": 64})
    return [
        "calibrate", "--model", folder, "--output", str(output), "--call", call,
        "--num_inference_steps", str(STEPS), "--dtype", "float32", "--max_lag", "2",
        "--cache_ratio_threshold", "0.3", "--significance_level", "0.5", "--quiet",
        # Masks are for guidance in one call a step, which Wan has not.
        *("--computed_steps 3 --moves 0 --batch_size 4".split() if model != "wan" else []),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return what makes the file of one rank for a model, once."""
    made: dict[str, Path] = {}

    def of(model: str) -> Path:
        if model not in made:
            output = tmp_path_factory.mktemp(model) / "one.safetensors"
            assert main(flags(model, output)) == 0
            made[model] = output
        return made[model]

    return of


def check_same(found: Fitted, wanted: Fitted) -> None:
    """Check that two calibrations are the same, to rounding."""
    for name in (*TABLES, *CORRECTIONS):
        one, other = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4, err_msg=name)
    assert found.masks == wanted.masks and found.metadata == wanted.metadata
    np.testing.assert_allclose(found.exponents, wanted.exponents, rtol=1e-3)
    assert found.upper == pytest.approx(wanted.upper, rel=1e-3)
    assert found.scales == pytest.approx(wanted.scales, rel=1e-6)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "ranks", "layout"),
    [
        ("flux", 2, "--ulysses_degree 2"),
        pytest.param("pixart", 4, "--use_cfg_parallel --data_parallel_degree 2", marks=slow),
        pytest.param("flux", 2, "--ring_degree 2", marks=slow),
        pytest.param("flux", 2, "--data_parallel_degree 2", marks=slow),
        pytest.param("sd3", 2, "--use_cfg_parallel", marks=slow),
        pytest.param("sd3", 4, "--use_cfg_parallel --ulysses_degree 2", marks=slow),
        pytest.param("pixart", 4, "--use_cfg_parallel --ring_degree 2", marks=slow),
        pytest.param("wan", 2, "--ulysses_degree 2", marks=slow),
    ],
)
def test_ranks_of_a_layout_make_the_file_of_one_rank(
    model: str, ranks: int, layout: str, reference: Reference, tmp_path: Path
) -> None:
    wanted, output = reference(model), tmp_path / "ranks.safetensors"
    # A run that one rank broke off after three records goes on.
    kept = wanted.with_suffix(".records")
    records = output.with_suffix(".records")
    records.mkdir()
    for name in ("settings.json", "full-00000.npz", "full-00001.npz", "full-00003.npz"):
        shutil.copy(kept / name, records)
        os.utime(records / name, (0, 0))
    printed = launch(WORKER, ranks, *flags(model, output), *layout.split())
    check_same(load_fitted(output), load_fitted(wanted))
    assert printed.count("written: ") == 1
    old = [path.name for path in records.iterdir() if not path.stat().st_mtime]
    assert sorted(old) == ["full-00000.npz", "full-00001.npz", "full-00003.npz", "settings.json"]
    assert sorted(path.name for path in records.iterdir()) == sorted(
        path.name for path in kept.iterdir()
    )


def in_stages(output: Path, *more: str) -> str:
    """Run a calibration on two stages of a pipeline, and return what its ranks printed."""
    return launch(WORKER, 2, *flags("flux", output), "--pipefusion_parallel_degree", "2", *more)


def test_stages_that_attend_to_no_old_keys_make_the_file_of_one_rank(
    reference: Reference, tmp_path: Path
) -> None:
    """With one patch PipeFusion draws the pictures of one rank."""
    wanted, output = load_fitted(reference("flux")), tmp_path / "stages.safetensors"
    in_stages(output, "--num_pipeline_patch", "1")
    found = load_fitted(output)
    for name in (*TABLES, *CORRECTIONS):
        one, other = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4, err_msg=name)
    assert found.steering.any() and found.masks == wanted.masks and not found.scales
    different = {
        name for name, value in wanted.metadata.items() if found.metadata.get(name) != value
    }
    assert different == {"layout"}
    assert wanted.metadata["layout"] == "without PipeFusion"
    words = "PipeFusion: 2 stages, patches: 1, synchronous steps: 1"
    assert found.metadata["layout"] == words


@pytest.mark.slow
def test_corrections_are_fitted_on_a_layouts_own_pictures(
    reference: Reference, tmp_path: Path
) -> None:
    """Patches that attend to old keys make other records; their corrections help there."""
    output, report = tmp_path / "stages.safetensors", tmp_path / "report.json"
    # Records that are there, of the same layout alone, are taken.
    shutil.copytree(reference("flux").with_suffix(".records"), output.with_suffix(".records"))
    with pytest.raises(WorldFailed, match="holds records of a run with another layout; give"):
        in_stages(output)
    shutil.rmtree(output.with_suffix(".records"))
    in_stages(output, "--report", str(report))
    found, wanted = load_fitted(output), load_fitted(reference("flux"))
    assert not np.allclose(found.slopes, wanted.slopes, rtol=2e-3, equal_nan=True)
    tried = json.loads(report.read_text())["masks"]["latent_snr_db"]["3"]
    assert tried["steered, even"] > tried["plain, even"] + 1


def test_what_stages_cannot_be_calibrated_with_is_refused() -> None:
    def refused(layout: Place, computed_steps: list[int], replicas: int = 1) -> str:
        runs = SimpleNamespace(team=SimpleNamespace(place=layout, replicas=replicas))
        options = CalibrationOptions(model="", output=Path(), computed_steps=computed_steps)
        try:
            settle.check_layout(runs, options)
        except ValueError as error:
            return str(error)
        return ""

    assert "say of how many steps with --computed_steps" in refused(Place(stages=2), [])
    for layout in (Place(stages=2, shards=2), Place(stages=2, branches=2)):
        assert "is made with --pipefusion_parallel_degree alone: leave" in refused(layout, [3])
    assert "alone: leave" in refused(Place(stages=2), [3], replicas=2)
    assert not refused(Place(stages=2), [3])
    assert not refused(Place(shards=2, branches=2), [], replicas=2)


def test_what_promises_nothing_is_not_audited(tmp_path: Path) -> None:
    def refused(layout: Place, **scales: float) -> str:
        path = tmp_path / "file.safetensors"
        fitted_on([1.0, 0.5, 0.2], scales=scales).save(path)
        runs = SimpleNamespace(team=SimpleNamespace(place=layout), prompts=[])
        with pytest.raises(ValueError) as error:
            audit(runs, path, Progress("none"))
        return str(error.value)

    assert "leave --pipefusion_parallel_degree out" in refused(Place(stages=2), **{"0.05": 1.0})
    assert "holds masks alone" in refused(Place())


def test_a_gate_without_scales_says_what_the_file_is_for() -> None:
    config = CacheConfig(calibration="file", significance_level=0.05)
    with pytest.raises(ValueError, match="is for masks alone; give computed_steps"):
        config.resolved(fitted_on([1.0, 0.5, 0.2], scales={}))


def test_replicas_share_prompts_out_and_say_who_is_missing() -> None:
    reports = run_world(WORKER, 2, "team")
    first = reports[0]
    assert "ranks [0, 1] did not all come within 2 s" in first["missing"]
    assert "Ranks 1 failed to pass" in first.pop("missing")
    assert (first.pop("first"), reports[1].pop("first")) == (True, False)
    assert first.pop("rank") == 0 and reports[1].pop("rank") == 1
    assert first == reports[1]
    assert first["drawn by"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert first["agreed"] == 10
    assert first["error"].startswith("ValueError: invalid literal")
    assert first["shares"] == [[0, 1, 2], [3, 4]]
    assert "a batch of 1 pictures leaves some of 2 data-parallel replicas" in first["empty share"]


def test_one_process_takes_no_flags_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*flags("flux", Path("a")), "--ulysses_degree", "2"])
    words = "unrecognized arguments: --ulysses_degree 2; xDiT's flags of a layout are for the ranks"
    assert words in capsys.readouterr().err
