"""The report as a Markdown page: one table a question, and what one card cannot tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xfuser_fastcache.benchmarks.gpu.record import ERROR, OK

Cell = dict[str, Any]

_UNTOLD = """## What one card cannot tell

- How NCCL and gloo behave between several GPUs: a group of one rank sends nothing, and gloo was
  timed between two processes of this machine.
- Whether Ulysses, Ring, PipeFusion and parallel guidance keep these ratios.
- How good pictures are: the large models have random weights. The toys are trained, and small.
- What a gate skips on real weights: here a mask fixes the skipped steps.
"""


def page_of(report: dict[str, Any]) -> str:
    """Return the page.

    Args:
        report: as `schema.errors_of` finds nothing wrong with.
    """
    cells: list[Cell] = report["cells"]
    machine = report["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "triton", "diffusers", "transformers", "cache-dit")
        if machine.get(name)
    )
    lines = ["# On one GPU", ""]
    if report["small"]:
        lines += ["A rehearsal with tiny shapes: its figures say nothing about a GPU.", ""]
    lines += [
        f"{report['device']}, driver {machine['driver'] or 'none'}, CUDA "
        f"{machine['cuda'] or 'none'}, {versions}. Random weights in real shapes, bfloat16, "
        f"{report['steps']} steps a generation. Medians; ratios are between generations of one "
        "round. Share of ideal is that of the median, and beside it that of the fastest runs: "
        "whatever else a host does only ever adds to a time.",
        "",
        "```bash",
        *report["command"].splitlines(),
        "```",
        "",
        f"It took {report['spent_s']:.0f} s"
        + ("." if report["finished"] else ", when its budget was spent before all was measured."),
        "",
    ]
    for family, title in report["families"].items():
        own = [cell for cell in cells if cell["family"] == family]
        lines += [f"## {title}", ""]
        steps = _of(own, "build").get("model", {}).get("steps", report["steps"])
        if steps != report["steps"]:
            lines += [f"{steps} steps a generation.", ""]
        lines += (
            _speed(own) + _facts(own) + _compiled(own, "") + _compiled(own, " with CUDA graphs")
        )
        lines += _peers(own) + _memory(own) + _costs(own)
    lines += _toys(cells, report["families"]) + _consensus(cells)
    lines += [_UNTOLD.strip(), ""] + _unmeasured(cells)
    return "\n".join(lines).rstrip() + "\n"


def _of(cells: list[Cell], name: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a cell's measured variants."""
    return {
        cell["variant"]: cell["figures"]
        for cell in cells
        if cell["cell"] == name and cell["status"] == OK
    }


def _table(head: Iterable[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    names = list(head)
    made = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    return [*made, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _number(figures: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    value = figures.get(key)
    return "" if value is None else f"{value:{form}}{unit}"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else ""


def _speed_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            variant,
            _number(figures, "ms_a_step", ".2f"),
            _number(figures, "share_skipped", ".1%"),
            _number(figures, "speedup", ".3f", "x"),
            _range(figures.get("speedup_of_each_run", [])),
            _number(figures, "ideal_speedup", ".3f", "x"),
            _number(figures, "share_of_ideal", ".1%"),
            _number(figures, "share_of_ideal_fastest", ".1%"),
        ]
        for variant, figures in found.items()
    ]


_SPEED_HEAD = (
    *("", "ms a step", "skipped", "speedup", "rounds", "ideal", "share of ideal"),
    "of fastest",
)


def _speed(cells: list[Cell]) -> list[str]:
    return _table(_SPEED_HEAD, _speed_rows(_of(cells, "speed")))


def _facts(cells: list[Cell]) -> list[str]:
    lines = []
    for variant, figures in _of(cells, "identity").items():
        says = "is" if figures["identical_to_uncached"] else "is NOT"
        lines.append(f"- {variant}: the last latent {says} identical to the uncached one.")
    for figures in _of(cells, "digest").values():
        says = "has" if figures["digest_repeats"] else "does NOT have"
        lines.append(
            f"- A second generation by the gate {says} the first one's digest of decisions "
            f"({figures['share_skipped']:.0%} skipped)."
        )
    repeats = [figures["repeats_to_the_bit"] for figures in _of(cells, "speed").values()]
    if repeats:
        lines.append(
            f"- {sum(repeats)} of {len(repeats)} variants above repeat their latents to the bit."
        )
    odd = [
        variant
        for variant, figures in _of(cells, "speed").items()
        if not figures.get("skipped_as_planned", True)
    ]
    if odd:
        lines.append(
            f"- Not as their mask says: {', '.join(odd)}. A statistic was not finite or too large, "
            "and a step more was computed; ideal is that of the steps that were skipped."
        )
    return [*lines, ""] if lines else []


def _compiled(cells: list[Cell], of_graphs: str) -> list[str]:
    work = _of(cells, f"compile{of_graphs}")
    table = _table(_SPEED_HEAD, _speed_rows(_of(cells, f"compiled speed{of_graphs}")))
    if "uncached" not in work or not table:
        return []
    first = work["uncached"]
    added = sum(figures.get("graphs_added", 0) for figures in work.values())
    text = (
        f"Compiled by `{first['how']}` ({first['seconds']:.0f} s, {first['graphs']} graphs, not "
        f"timed); the cache added {added}. Uncached is compiled too:"
    )
    return [text, "", *table]


def _peers(cells: list[Cell]) -> list[str]:
    found = {name: made for name, made in _of(cells, "peers").items() if "ms_a_step" in made}
    if not found:
        return []
    return [
        "Other caches, by their own code; skipped is the share of attention calls that were left "
        "out, and ideal follows from it. Most compute their first block at every step; diffusers' "
        "TaylorSeer without lite computes the rest of each block, and finds no attention where it "
        "has another name than `attn`:",
        "",
        *_table(_SPEED_HEAD, _speed_rows(found)),
    ]


def _memory(cells: list[Cell]) -> list[str]:
    found = _of(cells, "memory")
    base = found.get("uncached", {}).get("added_bytes")
    rows = []
    for variant, figures in found.items():
        more = {} if base is None else {"more": (figures["added_bytes"] - base) / 2**20}
        held = {"held": figures["cache_bytes"] / 2**20} if "cache_bytes" in figures else {}
        peak = {"peak": figures["peak_bytes"] / 2**30}
        left = {"left": figures.get("left_in_cycles_bytes", 0) / 2**20}
        row = [variant, _number(peak, "peak", ".2f"), _number(more, "more", ".1f")]
        rows.append([*row, _number(held, "held", ".1f"), _number(left, "left", ".1f")])
    head = ("peak memory", "GiB", "MiB more", "MiB that the cache says", "MiB left in cycles")
    return _table(head, rows)


def _costs(cells: list[Cell]) -> list[str]:
    rows = [
        [
            variant,
            ", ".join(map(str, figures["of_each_step"])),
            "; ".join(f"`{place}` ({count})" for place, count in figures["places"].items()),
        ]
        for variant, figures in _of(cells, "synchronisations").items()
    ]
    lines = _table(("host waits for the device", "times in each of 3 steps", "where"), rows)
    for figures in _of(cells, "moments").values():
        share = _number(figures, "share_of_step", ".3%")
        lines += [
            f"Measuring what enters the blocks {figures['shape']}, call after call, takes "
            f"{figures['measure_us']:.0f} us"
            + (f", {share} of an uncached step." if share else "."),
            "",
        ]
    for figures in _of(cells, "kernels").values():
        lines += [
            f"Its kernels alone take {figures['measure_us']:.0f} us "
            f"({figures['measure_kernels']} of them), {figures['measure_share_of_step']:.3%} of "
            f"those of a step; a gate that never passes makes a step's kernels "
            f"{figures['gate_never_passes_us_a_step'] / figures['uncached_us_a_step']:.4f} times "
            "as long.",
            "",
        ]
    return lines


def _toys(cells: list[Cell], families: dict[str, str]) -> list[str]:
    rows = [
        [
            f"{family}, {dtype}",
            "yes" if figures["threshold_0_identical"] else "NO",
            "yes" if figures["digest_repeats"] else "NO",
            f"{figures['share_skipped']:.1%}",
            "corrected" if figures["calibrated"] else "as it is",
            _number(figures, "psnr_db", ".1f") or "identical",
        ]
        for family in families
        for dtype, figures in _of([c for c in cells if c["family"] == family], "toy").items()
    ]
    head = ("toy", "threshold 0 identical", "digest repeats", "skipped", "forecast", "PSNR, dB")
    text = "Trained toys with the mask of their calibration, against uncached in the same dtype:"
    return ["## Toys", "", text, "", *_table(head, rows)] if rows else []


def _consensus(cells: list[Cell]) -> list[str]:
    rows = [
        [f"{backend}, {figures['ranks']} rank(s): {key[:-3].replace('_', ' ')}", f"{value:.1f}"]
        for backend, figures in _of(cells, "consensus").items()
        for key, value in figures.items()
        if key.endswith("_us")
    ]
    return ["## Consensus", "", *_table(("", "us"), rows)] if rows else []


def _unmeasured(cells: list[Cell]) -> list[str]:
    rows = [
        [
            f"{cell['family']}, {cell['cell']}, {cell['variant']}",
            "error" if cell["status"] == ERROR else "left out",
            cell["reason"].strip().splitlines()[-1].replace("|", "/")[:200],
        ]
        for cell in cells
        if cell["status"] != OK
    ]
    return ["## What was not measured", "", *_table(("", "", "why"), rows)] if rows else []
