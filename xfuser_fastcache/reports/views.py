"""What a cache did, for people: a table, a file of decisions, a heat map, pictures side by side.

Everything here takes the plain dicts and lists that the other rooms return. rich and matplotlib are
imported where they are used, and matplotlib's global state is left alone.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xfuser_fastcache.artifacts.file import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# From the palettes of Okabe and Ito, and of Tol. They differ in lightness too, for grey prints.
COLOURS = {
    "computed": "#0072B2",
    "scheduled": "#332288",
    "skipped": "#F0E442",
    "forced": "#999999",
}

MAX_COLUMNS = 8
# A decision in a letter; a point where the branch was left out.
LETTERS = {"computed": "c", "scheduled": "s", "skipped": "-", "forced": "f"}


def statistics_table(statistics: dict[str, Any]) -> Table:
    """Return the statistics as a table to print: the totals, then the blocks.

    Consecutive blocks of one list with equal counts share a row. Waits are shown in milliseconds,
    sizes in MiB, ratios in percent, the digest by its first 12 digits.

    Args:
        statistics: what `get_cache_statistics` returned.

    Raises:
        KeyError: one of its numbers is missing.
    """
    from rich.table import Table

    false_skip_rate = statistics["false_skip_rate"]
    totals = [
        ("steps", f"{statistics['steps']}"),
        ("generations", f"{statistics['generations']}"),
        ("hit ratio", f"{statistics['block_approx_ratio']:.1%}"),
        ("tokens left out", f"{statistics['spatial_approx_ratio']:.1%}"),
        ("estimated FLOPs saved", f"{statistics['estimated_flops_saved_ratio']:.1%}"),
        ("collectives per step", f"{statistics['collectives_per_step']:.2f}"),
        ("consensus wait", f"{1e3 * statistics['consensus_wait_s']:.1f} ms"),
        ("cache size", f"{statistics['cache_bytes'] / 2**20:.1f} MiB"),
        ("nonfinite steps", f"{statistics['nonfinite_steps']}"),
        ("audits", f"{statistics['audits']}"),
        ("false-skip rate", "-" if false_skip_rate is None else f"{false_skip_rate:.2%}"),
        ("decisions digest", statistics["decisions_digest"][:12]),
    ]
    summary = Table(box=None, show_header=False)
    for justify in ("left", "right") * 2:
        summary.add_column(justify=justify)
    for index in range(0, len(totals), 2):
        summary.add_row(*itertools.chain(*totals[index : index + 2]))

    blocks = Table(box=None)
    blocks.add_column("blocks")
    for title in ("computed", "skipped", "hit ratio"):
        blocks.add_column(title, justify="right")
    for (_, counts), names in itertools.groupby(statistics["blocks"].items(), _list_and_counts):
        first, *others = [name for name, _ in names]
        label = f"{first} ... {others[-1].rpartition('.')[2]}" if others else first
        computed, skipped, hit_ratio = counts
        blocks.add_row(label, f"{computed}", f"{skipped}", f"{hit_ratio:.1%}")

    table = Table.grid()
    table.title = f"{statistics['use_cache']} cache"
    table.add_row(summary)
    table.add_row()
    table.add_row(blocks)
    return table


def _list_and_counts(item: tuple[str, dict[str, Any]]) -> tuple[str, tuple[int, int, float]]:
    name, row = item
    return name.rpartition(".")[0], (row["computed"], row["skipped"], row["hit_ratio"])


def write_trace(trace: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a trace as JSON lines, one entry a line; the file appears whole or not at all.

    Args:
        trace: what `get_cache_trace` returned.
        path: of the file; one that is there is replaced.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
        TypeError: a value that JSON does not know.
        OSError: the file cannot be written.
    """
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in trace]
    replace_file(path, "".join(lines).encode())


def decision_rows(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a trace in brief: a row a CFG branch and span, with a letter of `LETTERS` a step.

    Args:
        trace: what `get_cache_trace` returned, of one generation.

    Example:
        >>> place = {"branch": 0, "first_block": "blocks.0", "last_block": "blocks.9"}
        >>> steps = [{"step": 0, "decision": "forced"}, {"step": 2, "decision": "skipped"}]
        >>> decision_rows([{**place, **step} for step in steps])
        [{'branch': 0, 'first_block': 'blocks.0', 'last_block': 'blocks.9', 'steps': 'f.-'}]
    """
    steps = 1 + max((entry["step"] for entry in trace), default=0)
    rows: dict[tuple[int, str, str], list[str]] = {}
    for entry in trace:
        key = (entry["branch"], entry["first_block"], entry["last_block"])
        rows.setdefault(key, ["."] * steps)[entry["step"]] = LETTERS[entry["decision"]]
    return [
        dict(zip(("branch", "first_block", "last_block"), key, strict=True), steps="".join(row))
        for key, row in rows.items()
    ]


def save_heat_map(
    trace: list[dict[str, Any]], blocks: list[str], path: str | os.PathLike[str]
) -> None:
    """Draw what was decided for each block at each step, a panel a CFG branch, as PNG.

    Steps run to the right and blocks downwards. A cell is white where its branch was left out.

    Args:
        trace: what `get_cache_trace` returned, of one generation.
        blocks: names of all blocks, in order: `list(statistics["blocks"])`.
        path: of the file; one that is there is replaced.

    Raises:
        ValueError: the trace is empty or of several generations, or holds a decision that is not
            known or a block that is not in `blocks`.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    panels = _panels(trace, blocks)
    steps = next(iter(panels.values())).shape[1]
    figure = Figure(
        figsize=(2.5 + len(panels) * min(max(0.18 * steps, 3), 10), 1.5 + 0.16 * len(blocks)),
        layout="constrained",
    )
    (columns,) = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (branch, cells) in zip(columns, sorted(panels.items()), strict=True):
        # Nearest: every pixel of a cell has a colour of the legend.
        axes.imshow(cells, aspect="auto", interpolation="nearest")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(blocks)), blocks, fontsize=6)
        if len(panels) > 1:
            axes.set_title(f"branch {branch}", fontsize=9)
    figure.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in COLOURS.items()],
        loc="outside lower center",
        ncols=len(COLOURS),
        fontsize=8,
        frameon=False,
    )
    save_png(figure, path)


def _panels(trace: list[dict[str, Any]], blocks: list[str]) -> dict[int, np.ndarray]:
    """Return the cells of each branch: uint8 `(blocks, steps, 3)`."""
    if not trace:
        raise ValueError("the trace is empty: run a generation with the cache on, then take it")
    generations = sorted({entry["generation"] for entry in trace})
    if len(generations) > 1:
        raise ValueError(f"the trace is of generations {generations}; give the entries of one")
    colour_of = {name: tuple(bytes.fromhex(colour[1:])) for name, colour in COLOURS.items()}
    index_of = {name: index for index, name in enumerate(blocks)}
    steps = 1 + max(entry["step"] for entry in trace)
    panels: dict[int, np.ndarray] = {}
    for entry in trace:
        decision = entry["decision"]
        if decision not in colour_of:
            raise ValueError(f"unknown decision {decision!r}; known: {', '.join(colour_of)}")
        first, last = entry["first_block"], entry["last_block"]
        for name in (first, last):
            if name not in index_of:
                raise ValueError(
                    f"block {name!r} of the trace is not among the {len(blocks)} given; give "
                    'list(statistics["blocks"]) of the transformer that the trace is of'
                )
        cells = panels.setdefault(
            entry["branch"], np.full((len(blocks), steps, 3), 255, dtype=np.uint8)
        )
        cells[index_of[first] : index_of[last] + 1, entry["step"]] = colour_of[decision]
    return panels


def comparison_sheet(
    baseline: Sequence[np.ndarray],
    cached: Sequence[np.ndarray],
    captions: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw baseline, cached and their difference (10 times) below each other, as PNG.

    Each picture has a column; beyond the first 8 they are left out.

    Args:
        baseline: uncached pictures in [0, 1], each `(height, width, 3)`.
        cached: the same pictures drawn with a cache, of the same shapes.
        captions: a title for each.
        path: of the file; one that is there is replaced.

    Raises:
        ValueError: there are no pictures, their numbers or the captions' differ, or the shapes of
            a pair do.
        OSError: the file cannot be written.
    """
    if not len(baseline) == len(cached) == len(captions) > 0:
        raise ValueError(
            f"{len(baseline)} baseline and {len(cached)} cached pictures with {len(captions)} "
            "captions: give equally many of each, at least one"
        )
    from matplotlib.figure import Figure

    columns = min(len(baseline), MAX_COLUMNS)
    figure = Figure(figsize=(2.4 * columns + 0.6, 7.4))
    axes = figure.subplots(3, columns, squeeze=False)
    for column in range(columns):
        before, after = baseline[column], cached[column]
        if before.shape != after.shape:
            raise ValueError(
                f"picture {column} is {before.shape} in baseline and {after.shape} in cached"
            )
        difference = 10 * np.abs(after - before)
        for row, picture in enumerate((before, after, difference)):
            axes[row][column].imshow(np.clip(picture, 0, 1))
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
        axes[0][column].set_title(captions[column], fontsize=7, wrap=True)
    for row, label in enumerate(("baseline", "cached", "difference x 10")):
        axes[row][0].set_ylabel(label)
    figure.tight_layout()
    save_png(figure, path)


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file, in one go."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    replace_file(path, drawn.getvalue())
