"""Say which models the cache runs on, where, and what it takes there.

    fastcache models
    fastcache models --json
    fastcache models --output docs/models.md
    fastcache models --anchors

One row for each family of models that xfuser 0.7 runs, and for each registered adapter. Nothing is
loaded or downloaded: layouts are those that xDiT runs the family in, less what fails there.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xfuser_fastcache.benchmarks.layouts import EXCLUDED, LAYOUTS, is_excluded
from xfuser_fastcache.cli.flags import flags_of
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.plugins import ADAPTERS, loaded
from xfuser_fastcache.xdit.anchors import wan_table
from xfuser_fastcache.xdit.families import FAMILIES, Family

COLUMNS = (
    "models", "transformer", "xDiT runs it by", "layouts", "blocks' anchor", "output's anchor",
    "TeaCache", "diffusers", "lines",
)  # fmt: skip
_PAGE = """# Models

Written by `fastcache models --output docs/models.md`. One row for each family that xfuser 0.7 runs.

{supported}

Anchors are what a forecaster remembers, here of one guidance branch on one rank, in bf16, at the
size named below; under Ulysses and Ring each rank holds its share of the blocks' anchors. A
forecaster of order n keeps n + 1. Where the column *TeaCache* says so, `Tea` has a polynomial that
TeaCache published for a model of the family (VACE's is Wan's of text to video); for the others
`fastcache fit-polynomial` makes one. Each layout of the
column is a cell of `pytest -m "slow or not slow" tests/test_matrix.py`, on random weights. Lines
are those of the adapter's class, documentation included.

{examples}

## What xDiT itself cannot do with them

{excluded}

## Not supported

{others}

Another model takes a file of about 15 lines: [extending.md](extending.md).
"""


def rows() -> list[dict[str, Any]]:
    """Return a row for each family, and one for each adapter that is for none of them."""
    adapters = loaded(ADAPTERS)
    known = {family.adapter for family in FAMILIES}
    others = [Family(name, adapter=name) for name in adapters if name not in known]
    return [_row(family, adapters.get(family.adapter)) for family in (*FAMILIES, *others)]


def _row(family: Family, adapter: Any) -> dict[str, Any]:
    example = family.example
    return {
        "models": family.title,
        "adapter": family.adapter if adapter is not None else "",
        "why_not": "" if adapter is not None else family.reason,
        "transformer": "" if adapter is None else adapter.model_class,
        "pipelines": list(family.pipelines),
        "runner": bool(family.names),
        "layouts": [at for at in LAYOUTS if adapter and not is_excluded(family.adapter, at)],
        "example": example and f"{example.hub}, latents {example.latents}",
        "tokens": example and example.tokens,
        "anchor_bytes": example and example.anchor_bytes(whole_forward=False),
        "output_anchor_bytes": example and example.anchor_bytes(whole_forward=True),
        "tea_polynomial": bool(adapter and _has_polynomial(adapter)),
        "diffusers": family.since,
        "lines": 0 if adapter is None else len(inspect.getsource(adapter).splitlines()),
    }


def _has_polynomial(adapter: Any) -> bool:
    owner = next(base for base in adapter.__mro__ if "tea_polynomial_of" in vars(base))
    return adapter.tea_polynomial is not None or owner is not ModelAdapter


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a supported family's row as words, in the order of `COLUMNS`."""
    ways = [*row["pipelines"], *(["its runner"] if row["runner"] else [])]
    single = [at for at in row["layouts"] if " x " not in at and not at.endswith(" 4")]
    return [
        row["models"],
        row["transformer"],
        ", ".join(ways) or "diffusers' pipeline",
        ", ".join(single),
        _size(row["anchor_bytes"]),
        _size(row["output_anchor_bytes"]),
        "yes" if row["tea_polynomial"] else "",
        f">= {row['diffusers']}",
        str(row["lines"]),
    ]


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} MB"


def page(found: list[dict[str, Any]]) -> str:
    """Return the page of the documentation."""
    supported = [row for row in found if row["adapter"]]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells_of, supported)]
    return _PAGE.format(
        supported="\n".join(f"| {' | '.join(line)} |" for line in lines),
        examples="\n".join(
            f"- {row['models']}: {row['example']}, {row['tokens']:,} tokens."
            for row in supported
            if row["example"]
        ),
        excluded="\n".join(f"- {e.model}, `{e.flag}`: {e.sentence}" for e in EXCLUDED),
        others="\n".join(
            f"- {row['models']}: {row['why_not']}." for row in found if row["why_not"]
        ),
    )


def show(found: list[dict[str, Any]], console: Console) -> None:
    """Print the rows: those that run as a table, the others below."""
    table = Table(*COLUMNS, title="models")
    for row in found:
        if row["adapter"]:
            table.add_row(*cells_of(row))
    console.print(table)
    for row in found:
        if row["why_not"]:
            console.print(f"not supported: {row['models']}: {row['why_not']}", markup=False)


def main(arguments: list[str]) -> int:
    """Print the table, as JSON where asked, or write the page."""
    flags = flags_of("fastcache models", __doc__)
    flags.add_argument("--json", action="store_true", help="print a list of JSON")
    flags.add_argument(
        "--anchors", action="store_true", help="print what Wan's anchors take, by forecaster"
    )
    flags.add_argument("--output", help="write a page of Markdown there instead")
    given = flags.parse_args(arguments)
    if given.anchors:
        print(wan_table())
        return 0
    found = rows()
    if given.output:
        Path(given.output).write_text(page(found))
    elif given.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    return 0
