"""`fastcache inspect` says what is in a file, of either kind, and refuses what does not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrations import even_levels, fitted_on

from xfuser_fastcache import cli
from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.artifacts.linear_map import LinearMap, SpanMaps
from xfuser_fastcache.artifacts.linear_maps import MAPPED, FittedMaps

TOY = Path(__file__).resolve().parent.parent / "toys" / "flux" / "fastcache.safetensors"


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_calibration_is_told_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.safetensors"
    slopes = np.ones((4, 3, 4))
    slopes[0] = np.inf
    masks = {2: [1, 0, 0, 1], 3: [1, 1, 0, 1]}
    steering = np.full((2, 4, 5), 0.5, np.float32)
    fitted_on(
        even_levels(4),
        slopes=slopes,
        masks=masks,
        steering=steering,
        metadata={"cache_ratio_threshold": 0.3, "model": "Some", "scheduler": "Euler"},
    ).save(path)
    code, out, _ = ask(capsys, path, "--json")
    found = json.loads(out)
    assert code == 0 and found["digest"] == load_fitted(path).digest
    assert found["made_for"]["model"] == "Some" and found["made_with"]["scheduler"] == "Euler"
    assert found["covers"] == {
        "steps": 4,
        "noise_levels": [1.0, 0.25],
        "skips_in_a_row": 3,
        "cells_seen": 0.75,
    }
    assert found["gate"]["lambda_of_alpha"] == {"0.05": 1.0, "0.1": 2.0}
    assert found["masks"]["2"] == {"mask": [1, 0, 0, 1], "corrected": True, "longest_gap": 2}
    code, out, _ = ask(capsys, path)
    assert code == 0 and "#..#" in out and "Euler" in out


def test_the_plot_is_of_the_mask_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = []
    for steps in (5, 5, 10):
        path = tmp_path / f"{len(pictures)}.png"
        assert ask(capsys, TOY, "--plot", path, "--computed_steps", steps)[0] == 0
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    code, _, error = ask(capsys, TOY, "--plot", tmp_path / "no.png", "--computed_steps", 2)
    assert code == 2 and "masks of [3, 4" in error and not (tmp_path / "no.png").exists()
    code, _, error = ask(capsys, TOY, "--computed_steps", 5)
    assert code == 2 and "give --plot PNG" in error


def test_an_audit_belongs_to_its_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    level = {
        "false_skip_rate": 0.0123,
        "false_skip_interval": [0.001, 0.03],
        "skips": 77,
        "hit_ratio": 0.5,
        "oracle": {"hit_ratio": 0.6},
        "literal_test": {"false_skip_rate": 0.4},
    }
    report = {"calibration": "x", "digest": load_fitted(TOY).digest, "levels": {"0.05": level}}
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(report))
    code, out, _ = ask(capsys, TOY, "--audit", path)
    assert code == 0 and "0.0123" in out and "77" in out
    for wrong, words in (({**report, "digest": "other"}, "digest other"), ([], "no report")):
        path.write_text(json.dumps(wrong))
        code, _, error = ask(capsys, TOY, "--audit", path)
        assert code == 2 and words in error


def test_linear_maps_are_told_by_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "maps.safetensors"
    some = LinearMap(diagonal=torch.ones(2))
    maps = SpanMaps((0.5, 1.0), (some, None), (None, None))
    FittedMaps(dict.fromkeys(MAPPED, maps), {"model": "Some"}).save(path)
    code, out, _ = ask(capsys, path, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["kind"] == "linear_maps" and found["made_for"]["model"] == "Some"
    assert found["maps"] == dict.fromkeys(MAPPED, {"edges": [0.5, 1.0], "image": 1, "text": 0})
    code, _, error = ask(capsys, path, "--plot", tmp_path / "no.png")
    assert code == 2 and "linear maps" in error


def test_a_file_that_is_neither_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(TOY.read_bytes()[:-9])
    for path, words in ((torn, "no whole calibration"), (tmp_path / "none", "cannot read")):
        code, _, error = ask(capsys, path)
        assert code == 2 and words in error
