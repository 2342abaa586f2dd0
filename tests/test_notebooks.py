"""The notebooks of examples/ run, cell by cell, with small settings; no outputs are kept in them.

A runner of a few lines: nbclient would bring a kernel and its messages into the tests, and these
are plain Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.worlds import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    """Return a notebook's cells of code."""
    held = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in held if cell["cell_type"] == "code"]


def run(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """Run a notebook where it lies; `settings` replace those of its cell of parameters.

    Returns:
        Its variables.
    """
    monkeypatch.chdir(ROOT / "examples")
    variables: dict[str, Any] = {"__name__": "__main__"}
    for index, cell in enumerate(cells(Path(f"{name}.ipynb"))):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {index}", "exec"), variables)
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(settings) <= set(variables)
            variables.update(settings)
    return variables


def test_there_are_two_and_they_hold_no_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["calibrate_and_compare", "first_picture"]
    for path in NOTEBOOKS:
        for cell in cells(path):
            assert cell["outputs"] == [] and cell["execution_count"] is None
        tagged = ["parameters" in cell["metadata"].get("tags", []) for cell in cells(path)]
        assert tagged[0] and sum(tagged) == 1


def test_the_first_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("first_picture", monkeypatch, steps=10, computed_steps=4)
    assert len(found["computed"]) == 4
    assert found["psnr"] > 25
    assert found["heat_map"].size[0] > 100
    assert np.array_equal(found["restored"], found["uncached"])
    assert capsys.readouterr().out.strip().endswith("True")


@pytest.mark.slow
def test_calibrate_and_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run("calibrate_and_compare", monkeypatch, output=str(tmp_path / "flux.safetensors"))
    assert found["status"] == 0
    psnr = found["psnr"]
    assert psnr["calibrated"] > psnr["budget"] > psnr["fewer steps"] > 15
