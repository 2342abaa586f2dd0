"""What people are shown of a cache: the table, the file of decisions, the heat map, the sheet.

Pure CPU. Pictures are read back from the written PNG, pixel by pixel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import xfuser_fastcache
from xfuser_fastcache import comparison_sheet, save_heat_map, statistics_table, write_trace
from xfuser_fastcache.reports.views import COLOURS

BLOCKS = [f"transformer_blocks.{i}" for i in range(4)] + ["single_transformer_blocks.0"]


def entry(
    step: int, decision: str, first: str = BLOCKS[0], last: str = BLOCKS[-1], **changes: Any
) -> dict[str, Any]:
    """Return what `get_cache_trace` says of one span at one step, in the parts that are read."""
    return {
        "generation": 0, "step": step, "branch": 0, "noise_level": 0.5, "span": 0,
        "first_block": first, "last_block": last, "decision": decision, **changes,
    }  # fmt: skip


def statistics(skipped: dict[str, int], decided: int = 8) -> dict[str, Any]:
    """Return what `get_cache_statistics` says, with counts of skips by block."""
    return {
        "use_cache": "Fast",
        "steps": 8,
        "generations": 2,
        "block_approx_ratio": 0.625,
        "blocks": {
            name: {"computed": decided - n, "skipped": n, "hit_ratio": n / decided}
            for name, n in skipped.items()
        },
        "spatial_approx_ratio": 0.125,
        "estimated_flops_saved_ratio": 0.4567,
        "collectives": 9,
        "collectives_per_step": 1.125,
        "consensus_wait_s": 0.0123,
        "cache_bytes": 3 * 2**20,
        "audits": 0,
        "false_skip_rate": None,
        "nonfinite_steps": 3,
        "decisions_digest": "0123456789abcdef" * 4,
    }


def printed(table: Any, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return the printed lines, each split where two or more spaces are."""
    from rich.console import Console

    Console(width=100).print(table)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_shows_the_totals_in_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(statistics_table(statistics(dict.fromkeys(BLOCKS, 5))), capsys)
    cells = [cell for line in lines for cell in line]
    shown = dict(zip(cells[1:25:2], cells[2:25:2], strict=True))
    assert cells[0] == "Fast cache"
    assert shown == {
        "steps": "8",
        "generations": "2",
        "hit ratio": "62.5%",
        "tokens left out": "12.5%",
        "estimated FLOPs saved": "45.7%",
        "collectives per step": "1.12",
        "consensus wait": "12.3 ms",
        "cache size": "3.0 MiB",
        "nonfinite steps": "3",
        "audits": "0",
        "false-skip rate": "-",
        "decisions digest": "0123456789ab",
    }


def test_a_false_skip_rate_is_shown_once_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    audited = {**statistics({"a.0": 1}), "audits": 40, "false_skip_rate": 0.025}
    lines = printed(statistics_table(audited), capsys)
    assert ["false-skip rate", "2.50%", "decisions digest", "0123456789ab"] in lines


def test_blocks_of_one_list_with_equal_counts_share_a_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    skipped = dict(zip(BLOCKS, (5, 5, 5, 2, 2), strict=True))
    lines = printed(statistics_table(statistics(skipped)), capsys)
    header = lines.index(["blocks", "computed", "skipped", "hit ratio"])
    assert lines[header + 1 :] == [
        ["transformer_blocks.0 ... 2", "3", "5", "62.5%"],
        ["transformer_blocks.3", "6", "2", "25.0%"],
        ["single_transformer_blocks.0", "6", "2", "25.0%"],
    ]


def test_equal_counts_that_are_apart_stay_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(statistics_table(statistics({"a.0": 5, "a.1": 2, "a.2": 5})), capsys)
    assert [line[0] for line in lines[-3:]] == ["a.0", "a.1", "a.2"]


# ---- the file of decisions -----------------------------------------------------------------------


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    trace = [
        entry(0, "forced", statistic=None, threshold=None, consensus_wait_s=0.0),
        entry(1, "skipped", statistic=0.1 + 0.2, threshold=1e-300, consensus_wait_s=1 / 3),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("an older and longer trace\n" * 100)
    write_trace(trace, path)
    text = path.read_text()
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == trace
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), (float("inf"), ValueError), ({1, 2}, TypeError)],
)
def test_a_trace_that_json_cannot_hold_leaves_the_old_file(
    tmp_path: Path, value: Any, error: type[Exception]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("old\n")
    with pytest.raises(error):
        write_trace([entry(0, "forced"), entry(1, "computed", statistic=value)], path)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "trace.jsonl"
    path.write_text("old\n")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_trace([entry(0, "forced")], path)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


# ---- the heat map --------------------------------------------------------------------------------


def panels(path: Path, count: int, blocks: int, steps: int) -> list[list[list[str]]]:
    """Return what each panel of a PNG shows, left to right, by block and step.

    The panels are the largest coloured areas; each cell is read at its centre.
    """
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    meaning = {tuple(bytes.fromhex(code[1:])): name for name, code in COLOURS.items()}
    coloured = np.any([np.all(pixels == code, axis=-1) for code in meaning], axis=0)
    areas, found = ndimage.label(coloured)
    sizes = ndimage.sum_labels(coloured, areas, range(1, found + 1))
    boxes = ndimage.find_objects(areas)
    # One swatch of the legend for each meaning is left over.
    assert np.sum(sizes > 50) == count + len(meaning)
    largest = sorted((boxes[i] for i in np.argsort(sizes)[-count:]), key=lambda box: box[1].start)
    shown = []
    for rows, columns in largest:
        height, width = (rows.stop - rows.start) / blocks, (columns.stop - columns.start) / steps
        shown.append(
            [
                [
                    meaning.get(
                        tuple(
                            pixels[
                                int(rows.start + (block + 0.5) * height),
                                int(columns.start + (step + 0.5) * width),
                            ].tolist()
                        ),
                        "blank",
                    )
                    for step in range(steps)
                ]
                for block in range(blocks)
            ]
        )
    return shown


def test_each_cell_has_the_colour_of_its_decision(tmp_path: Path) -> None:
    upper, lower = (BLOCKS[0], BLOCKS[1]), (BLOCKS[2], BLOCKS[4])
    decided = {
        upper: ["forced", "computed", "skipped", "skipped", "computed", "forced"],
        lower: ["forced", "skipped", "computed", "skipped", "forced", "forced"],
    }
    trace = [
        entry(step, decision, *span)
        for span, decisions in decided.items()
        for step, decision in enumerate(decisions)
    ]
    save_heat_map(trace, BLOCKS, tmp_path / "map.png")
    (shown,) = panels(tmp_path / "map.png", count=1, blocks=5, steps=6)
    assert shown == [decided[upper]] * 2 + [decided[lower]] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_each_branch_has_a_panel(tmp_path: Path) -> None:
    decided = {0: ["forced", "computed", "skipped"], 1: ["forced", "skipped", "skipped"]}
    trace = [
        entry(step, decisions[step], branch=branch)
        for step in range(3)
        for branch, decisions in reversed(decided.items())
    ]
    save_heat_map(trace, BLOCKS, tmp_path / "map.png")
    shown = panels(tmp_path / "map.png", count=2, blocks=5, steps=3)
    assert shown == [[decided[0]] * 5, [decided[1]] * 5]


def test_a_step_without_the_branch_is_blank(tmp_path: Path) -> None:
    # The first block goes on, so that the panel is one area.
    trace = [entry(step, "computed", BLOCKS[0], BLOCKS[0]) for step in range(3)]
    trace += [entry(step, "skipped", BLOCKS[1], BLOCKS[4]) for step in (0, 2)]
    save_heat_map(trace, BLOCKS, tmp_path / "map.png")
    (shown,) = panels(tmp_path / "map.png", count=1, blocks=5, steps=3)
    assert shown == [["computed"] * 3] + [["skipped", "blank", "skipped"]] * 4


def test_colours_differ_in_lightness() -> None:
    """Also who sees no hue, or a grey print, can tell them apart."""

    def luminance(code: str) -> float:
        parts = np.frombuffer(bytes.fromhex(code[1:]), np.uint8) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    levels = sorted(luminance(code) + 0.05 for code in COLOURS.values())
    ratios = [lighter / darker for darker, lighter in zip(levels, levels[1:], strict=False)]
    assert min(ratios) > 1.5


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([], "run a generation"),
        (
            [entry(0, "guessed")],
            "unknown decision 'guessed'; known: computed, scheduled, skipped, forced",
        ),
        ([entry(0, "skipped", first="blocks.7")], "'blocks.7' of the trace is not among the 5"),
        ([entry(0, "skipped", last="blocks.9")], "'blocks.9' of the trace is not among the 5"),
        ([entry(0, "skipped"), entry(0, "skipped", generation=3)], r"generations \[0, 3\]"),
    ],
)
def test_a_trace_that_cannot_be_drawn_is_refused(
    tmp_path: Path, trace: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_heat_map(trace, BLOCKS, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


# ---- the comparison sheet ------------------------------------------------------------------------


def grey_area(path: Path, level: int) -> int:
    """Number of pixels of this grey, give or take one for rounding."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int(np.all(np.abs(pixels - level) <= 1, axis=-1).sum())


def test_the_sheet_shows_both_and_ten_times_their_difference(tmp_path: Path) -> None:
    before, after = (np.full((8, 8, 3), level / 255) for level in (51, 68))
    comparison_sheet([before], [after], ["a caption"], tmp_path / "sheet.png")
    areas = [grey_area(tmp_path / "sheet.png", level) for level in (51, 68, 170)]
    # Three squares of the same size, each a good part of the sheet; text has few such pixels.
    assert min(areas) > 10_000
    assert max(areas) < 1.1 * min(areas)


def test_the_sheet_ends_after_eight_pictures(tmp_path: Path) -> None:
    widths = []
    for count in (8, 9):
        pictures = [np.zeros((4, 4, 3))] * count
        comparison_sheet(pictures, pictures, ["x"] * count, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as picture:
            widths.append(picture.width)
    assert widths[0] == widths[1]


@pytest.mark.parametrize(
    ("baseline", "cached", "captions", "message"),
    [
        (0, 0, 0, "0 baseline and 0 cached pictures with 0 captions"),
        (2, 1, 2, "2 baseline and 1 cached"),
        (2, 2, 1, "with 1 captions"),
    ],
)
def test_a_sheet_needs_equally_many_of_each(
    tmp_path: Path, baseline: int, cached: int, captions: int, message: str
) -> None:
    picture = np.zeros((4, 4, 3))
    with pytest.raises(ValueError, match=message):
        comparison_sheet(
            [picture] * baseline, [picture] * cached, ["x"] * captions, tmp_path / "sheet.png"
        )
    assert not list(tmp_path.iterdir())


def test_a_pair_of_different_shapes_is_named(tmp_path: Path) -> None:
    # Shapes that numpy would stretch to fit.
    whole, line = np.zeros((4, 4, 3)), np.zeros((1, 4, 3))
    with pytest.raises(ValueError, match=r"picture 1 is \(4, 4, 3\) in .* \(1, 4, 3\) in cached"):
        comparison_sheet([whole, whole], [whole, line], ["x", "y"], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


# ---- what importing and drawing leave alone ------------------------------------------------------


def test_drawing_is_imported_late_and_stays_private(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "import xfuser_fastcache.reports.views as views\n"
        "early = [n for n in ('rich', 'matplotlib', 'torch') if n in sys.modules]\n"
        f"trace = json.loads({json.dumps([entry(0, 'forced')])!r})\n"
        f"views.save_heat_map(trace, {BLOCKS!r}, {str(tmp_path / 'map.png')!r})\n"
        "late = [n for n in ('matplotlib', 'matplotlib.pyplot') if n in sys.modules]\n"
        "print(json.dumps([early, late]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["matplotlib"]]


@pytest.mark.parametrize(
    "name", ["comparison_sheet", "save_heat_map", "statistics_table", "write_trace"]
)
def test_the_package_offers_them(name: str) -> None:
    assert name in xfuser_fastcache.__all__
    assert getattr(xfuser_fastcache, name).__module__ == "xfuser_fastcache.reports.views"
