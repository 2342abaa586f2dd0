"""Measure what the cache costs and gains on one GPU, with random weights in real shapes.

    fastcache bench-gpu --output docs/gpu.json --page docs/gpu.md
    fastcache bench-gpu --small
    fastcache bench-gpu --read images.json video.json --output docs/gpu.json --page docs/gpu.md

The first measures every family until the budget is spent; the file holds at any time what was
measured so far. The second rehearses all of it on any machine in less than a minute. The third
measures nothing: it joins earlier reports of one device, and writes their page.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from xfuser_fastcache.artifacts.file import replace_file
from xfuser_fastcache.benchmarks.gpu.families import FAMILIES


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="fastcache bench-gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--output", type=Path, help="JSON to write; runs/gpu.json where it is measured"
    )
    flags.add_argument("--page", type=Path, help="Markdown page to write from the report")
    flags.add_argument(
        "--read",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="reports to join and to write the page from, without measuring",
    )
    flags.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    flags.add_argument("--budget_s", type=float, default=480.0, help="seconds for all of it")
    flags.add_argument("--steps", type=int, help="of a generation; default 28, small 12")
    flags.add_argument("--rounds", type=int, help="of interleaved generations; default 3, small 1")
    flags.add_argument("--small", action="store_true", help="rehearse with tiny shapes")
    flags.add_argument("--toys", type=Path, default=Path("toys"), help="folder of embedded toys")
    return flags


def main(arguments: list[str]) -> int:
    """Run what the command line asks for.

    Returns:
        0, or 1 where cells ended with an error.
    """
    flags = _flags()
    given = flags.parse_args(arguments)
    given.steps = given.steps or (12 if given.small else 28)
    if given.steps < 8 or given.budget_s <= 0 or (given.rounds or 1) < 1:
        flags.error("give at least 8 --steps, 1 of --rounds and a --budget_s above 0")
    from xfuser_fastcache.benchmarks.gpu.page import page_of
    from xfuser_fastcache.benchmarks.gpu.record import ERROR
    from xfuser_fastcache.benchmarks.gpu.schema import errors_of, joined

    if given.read:
        if not given.page and not given.output:
            flags.error("--read needs --page FILE or --output FILE, what to write")
        reports = []
        for path in given.read:
            reports.append(json.loads(path.read_text(encoding="utf-8")))
            wrong = errors_of(reports[-1])
            if wrong:
                flags.error(f"{path} is no report of this command: {'; '.join(wrong[:3])}")
        try:
            report = joined(reports)
        except ValueError as error:
            flags.error(str(error))
        if given.output:
            replace_file(given.output, (json.dumps(report, indent=1) + "\n").encode())
    else:
        from xfuser_fastcache.benchmarks.gpu.run import Plan, default_device, run

        device = default_device()
        if device.type != "cuda" and not given.small:
            flags.error("there is no GPU here; --small rehearses the command on any machine")
        plan = Plan(
            families=given.families,
            steps=given.steps,
            rounds=given.rounds or (1 if given.small else 3),
            small=given.small,
            toys=given.toys,
            device=device,
        )
        command = shlex.join(["fastcache", "bench-gpu", *arguments])
        output = given.output or Path("runs/gpu.json")
        report = run(plan, output, given.budget_s, command)
        print(f"report in {output}")
    if given.page:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        given.page.write_text(page_of(report), encoding="utf-8")
        print(f"page in {given.page}")
    return int(any(cell["status"] == ERROR for cell in report["cells"]))
