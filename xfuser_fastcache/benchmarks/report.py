"""What a run leaves behind: benchmark.json, benchmark.md, the plot and report.html."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from xfuser_fastcache.backends import BACKENDS
from xfuser_fastcache.benchmarks import curves
from xfuser_fastcache.benchmarks.methods import all_methods
from xfuser_fastcache.benchmarks.quality import drawn_features
from xfuser_fastcache.benchmarks.settings import COUNTS, Settings
from xfuser_fastcache.benchmarks.worker import KEPT, outcomes, picture_name, read_records

OURS = tuple(name.lower() for name in BACKENDS)
# Where sample pictures are compared: the setting of each method nearest to this PSNR, in dB.
SHOWN_DB = 45.0

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .7em; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #8881 } .wide { overflow-x: auto } figure { margin: 0 }
.wide td img { width: 128px; display: block } .wide td { text-align: center }
img.plot { max-width: 100% } code { background: #8882; padding: 0 .2em }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in about %}<p>{{ line }}</p>{% endfor %}
<img class="plot" alt="speed and quality of every method" src="{{ plot }}">
{% for table in tables %}<h2>{{ table.title }}</h2>
{% if table.note %}<p>{{ table.note }}</p>{% endif %}
<table><tr>{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% if samples %}<h2>Pictures</h2><p>{{ samples.note }}</p><div class="wide"><table>
<tr><th></th>{% for name in samples.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in samples.rows %}<tr><td>{{ row.prompt }}</td>
{% for picture in row.pictures %}<td>
{% if picture %}<img alt="" src="{{ picture }}">{% endif %}</td>
{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
</body></html>
"""


def build(directory: Path, levels: list[float], command: str) -> dict[str, Any]:
    """Read the records of a run and return what benchmark.json holds.

    Args:
        directory: of the run.
        levels: PSNR levels, in dB.
        command: that made it.

    Raises:
        ValueError: nothing was measured yet.
    """
    settings = Settings.read(directory / "settings.json")
    records = read_records(directory)
    points = curves.points_of(records, drawn_features(settings.prompts))
    errors = curves.errors_of(records, settings.methods)
    if "baseline" not in points:
        raised = "".join(f"\n{name} could not run: {error}" for name, error in errors.items())
        raise ValueError(f"nothing was measured; see the logs in {directory}{raised}")
    ordered = {
        name: {value: points[name][value] for value in values if value in points[name]}
        for name, values in settings.methods.items()
        if name in points
    }
    known = all_methods()
    environment = next(record for record in records if record["kind"] == "environment")
    complete = sum(len(values) for values in settings.methods.values())
    failed, _ = outcomes(records)
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "model": settings.model,
        "layout": settings.layout,
        "num_inference_steps": settings.steps,
        "converged_steps": settings.converged * settings.steps,
        "prompts": len(settings.prompts),
        "batch_size": settings.batch_size,
        "rounds": len(settings.rounds),
        "complete": all(
            points.get(name, {}).get(value, {}).get("rounds") == len(settings.rounds)
            for name, values in settings.methods.items()
            for value in values
            if (name, value) not in failed
        ),
        "settings_measured": sum(len(rows) for rows in ordered.values()),
        "settings_asked_for": complete,
        "seed": settings.seed,
        "call": settings.call,
        "dtype": settings.dtype,
        "processes": settings.workers * settings.ranks,
        "environment": {k: v for k, v in environment.items() if k != "kind"},
        "methods": {
            name: {"source": known[name].source, "knob": known[name].knob}
            for name in settings.methods
        },
        "baseline": points["baseline"][""],
        "points": ordered,
        "speedup_at_psnr": curves.speedups_at(levels, ordered, "psnr_db"),
        "speedup_at_psnr_converged": curves.speedups_at(levels, ordered, "psnr_converged_db"),
        "psnr_at_computed_steps": curves.psnr_at(COUNTS, ordered),
        "errors": errors,
    }


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def _span(found: dict[str, Any] | None, key: str, form: str) -> str:
    """A value with its interval."""
    if found is None:
        return "-"
    value = format(found[key], form)
    if found["interval_95"] is None:
        return value
    return f"{value} ({' to '.join(format(end, form) for end in found['interval_95'])})"


def about(result: dict[str, Any]) -> list[str]:
    """What was measured on what, in sentences."""
    at = ", ".join(f"{word} {degree}" for word, degree in result["layout"].items())
    env = result["environment"]
    base = result["baseline"]
    lines = [
        f"Model {result['model']}, {at or 'plain diffusers on 1 rank'}, "
        f"{result['num_inference_steps']} steps, {result['prompts']} prompts in "
        f"{result['rounds']} rounds of {result['batch_size']}, {result['dtype']}.",
        f"Measured {result['date']} on {env['device']}, {result['processes']} process(es) at once "
        f"with {env['threads_per_process']} thread(s) each; torch {env['torch']}, diffusers "
        f"{env['diffusers']}. Command: {result['command']}",
        "Speedup is wall time of the denoising loop, uncached over method, in the same round; the "
        "median over rounds. PSNR is the mean over pictures, none counted above "
        f"{curves.MOST_DB:g} dB; intervals are 95 %, by bootstrap over prompts (over rounds for "
        "speedups).",
        f"The uncached loop takes {base['seconds']['median']:.3f} s and lies at "
        f"{_span(base['psnr_converged_db'], 'mean', '.1f')} dB of a run with "
        f"{result['converged_steps']} steps.",
    ]
    if not result["complete"]:
        lines.append("This run is not complete: some settings or rounds are missing.")
    return lines


def tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All tables, as titles, heads and rows of text."""

    def at_levels(title: str, key: str, note: str) -> dict[str, Any]:
        levels = list(result[key])
        rows = [
            [name, *(_shown(result[key][level].get(name), ".2f", "x") for level in levels), source]
            for name, source in ((n, m["source"]) for n, m in result["methods"].items())
            if name in result["points"]
        ]
        head = ["method", *(f"{level} dB" for level in levels), "whose code"]
        return {"title": title, "head": head, "rows": rows, "note": note}

    found = [
        at_levels(
            "Speedup at a PSNR against the uncached run",
            "speedup_at_psnr",
            "Read off each method's upper hull; - where no setting reaches the level.",
        ),
        at_levels(
            "Speedup at a PSNR against the converged run",
            "speedup_at_psnr_converged",
            "The uncached run itself lies at "
            f"{result['baseline']['psnr_converged_db']['mean']:.1f} dB.",
        ),
    ]
    counts = result["psnr_at_computed_steps"]
    found.append(
        {
            "title": "PSNR against the uncached run at so many computed steps (dB)",
            "head": ["method", *counts],
            "rows": [
                [name, *(_shown(counts[count][name], ".1f") for count in counts)]
                for name in result["points"]
            ],
            "note": "Between two settings the line; - beyond them.",
        }
    )
    if result["errors"]:
        found.append(
            {
                "title": "Could not run",
                "head": ["method", "its own error"],
                "rows": [[name, error] for name, error in sorted(result["errors"].items())],
                "note": "",
            }
        )
    head = [
        "method", "setting", "speedup", "quartiles", "PSNR (dB)", "worst", "SSIM",
        "PSNR, converged (dB)", "captions right", "Fréchet, uncached", "Fréchet, drawn", "memory",
    ]  # fmt: skip
    rows = []
    listed = {"uncached": {"": result["baseline"]}, **result["points"]}
    for name, settings in listed.items():
        for value, point in settings.items():
            peak = point["peak_memory_bytes"]
            rows.append(
                [
                    name,
                    value,
                    _span(point["speedup"], "median", ".2f"),
                    " to ".join(f"{q:.2f}" for q in point["speedup"]["quartiles"]),
                    "identical" if point["identical"] else _span(point["psnr_db"], "mean", ".1f"),
                    f"{point['psnr_db']['worst']:.1f}",
                    _span(point["ssim"], "mean", ".4f"),
                    _span(point["psnr_converged_db"], "mean", ".1f"),
                    _span(point["caption_accuracy"], "ratio", ".0%"),
                    _span(point["frechet_uncached"], "distance", ".3f"),
                    _span(point["frechet_drawn"], "distance", ".2f"),
                    _shown(None if peak is None else peak / 1e6, ".0f", " MB"),
                ]
            )
    knobs = "; ".join(f"{name}: {method['knob']}" for name, method in result["methods"].items())
    found.append({"title": "Every setting", "head": head, "rows": rows, "note": knobs})
    return found


def title_of(result: dict[str, Any]) -> str:
    """A title that names the model."""
    return f"Step caches on {Path(result['model']).name}"


def markdown(result: dict[str, Any], plot: str) -> str:
    """benchmark.md."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"# {title_of(result)}", ""]
    for line in about(result):
        lines += [
            line.replace("Command: ", "Command: `") + "`" if "Command: " in line else line,
            "",
        ]
    lines += [f"![speed and quality]({plot})", ""]
    for table in tables(result):
        lines += [f"## {table['title']}", ""]
        if table["note"]:
            lines += [table["note"], ""]
        lines.append("| " + " | ".join(map(cell, table["head"])) + " |")
        lines.append("| " + " | ".join("---" for _ in table["head"]) + " |")
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table["rows"]]
        lines.append("")
    return "\n".join(lines)


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Speed and quality of every setting, the hulls joined; against uncached and converged."""
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    panels = figure.subplots(1, 2)
    kinds = {"psnr_db": "uncached run", "psnr_converged_db": "converged run"}
    colours = matplotlib.colormaps["tab20"](range(20))
    for axis, (key, against) in zip(panels, kinds.items(), strict=True):
        for index, (name, settings) in enumerate(result["points"].items()):
            shown = [point for point in settings.values() if not point["identical"]]
            if not shown:
                continue
            speedup = np.array([point["speedup"]["median"] for point in shown])
            psnr = np.array([point[key]["mean"] for point in shown])
            ends = np.array([point[key]["interval_95"] or (p, p)
                                    for point, p in zip(shown, psnr, strict=True)]).T  # fmt: skip
            ours = name in OURS
            style = {"color": colours[index % 20], "zorder": 3 if ours else 2}
            corners = curves.hull(psnr, speedup)
            level = np.linspace(psnr[corners[0]], psnr[corners[-1]], 200)
            axis.plot(
                1 / np.interp(level, psnr[corners], 1 / speedup[corners]),
                level,
                linewidth=3 if ours else 1.2,
                linestyle="--" if name.startswith("fewer") else "-",
                label=name,
                **style,
            )
            axis.errorbar(
                speedup, psnr, abs(ends - psnr), fmt="o", markersize=6 if ours else 3,
                linewidth=0.7, **style,
            )  # fmt: skip
        if key == "psnr_converged_db":
            level = result["baseline"][key]["mean"]
            axis.axhline(level, color="black", linewidth=0.8, linestyle=":")
            axis.annotate("uncached", (1.0, level), fontsize=8, va="bottom")
        axis.set(xlabel="speedup of the denoising loop", ylabel=f"PSNR against the {against} (dB)")
        axis.grid(alpha=0.3)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    at = ", ".join(f"{word} {degree}" for word, degree in result["layout"].items()) or "1 rank"
    figure.suptitle(
        f"{title_of(result)}: {result['num_inference_steps']} steps, {result['prompts']} prompts, "
        f"{at}, {result['environment']['device']}"
    )
    figure.savefig(path, dpi=110)


def embedded(path: Path) -> str | None:
    """A PNG as a data URL, None where it is not there."""
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def samples(result: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Pictures side by side: converged, uncached, and each method near `SHOWN_DB`."""
    prompts = Settings.read(directory / "settings.json").prompts
    columns, files = ["converged", "uncached"], [("converged", ""), ("baseline", "")]
    for name, settings in result["points"].items():
        changed = {k: p for k, p in settings.items() if not p["identical"]} or settings
        nearest = min(changed, key=lambda k: abs(changed[k]["psnr_db"]["mean"] - SHOWN_DB))
        point = changed[nearest]
        columns.append(
            f"{name} {nearest}: {point['speedup']['median']:.2f}x, "
            f"{point['psnr_db']['mean']:.1f} dB"
        )
        files.append((name, nearest))
    rows = [
        {
            "prompt": prompt,
            "pictures": [
                embedded(directory / "pictures" / picture_name(name, value, index))
                for name, value in files
            ],
        }
        for index, prompt in enumerate(prompts[: min(KEPT, result["batch_size"])])
    ]
    note = f"Each method at the setting nearest to {SHOWN_DB:g} dB against the uncached picture."
    return {"columns": columns, "rows": rows, "note": note}


def html(result: dict[str, Any], directory: Path, plot: Path) -> str:
    """report.html: one file, no network."""
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title_of(result),
            about=about(result),
            plot=embedded(plot),
            tables=tables(result),
            samples=samples(result, directory),
        )
    )


def write(result: dict[str, Any], directory: Path) -> list[Path]:
    """Write all four files and return their paths."""
    plot = directory / f"speed_quality_{Path(result['model']).name}.png"
    draw_plot(result, plot)
    contents = {
        "benchmark.json": json.dumps(result, indent=2, allow_nan=False) + "\n",
        "benchmark.md": markdown(result, plot.name),
        "report.html": html(result, directory, plot),
    }
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [*(directory / name for name in contents), plot]
