"""Names and ways of other caches: taken where they mean the same, else refused with ours.

CPU. The page's snippets run as they stand, on the tiny FLUX.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.flux import GUIDED, Flux

import xfuser_fastcache as fc
from xfuser_fastcache.config import other_names
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.config.other_names import OTHER_NAMES, REFUSED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming_from.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
VALUES: dict[str, Any] = {"steps_mask": [1, 0, 1], "quality": "fast", "cache_ratio_threshold": 0.2}
STEPS = 12
OF = {"rdt": "Fb", "residual_diff_threshold": "Fb", "threshold": "Fb"}


@pytest.fixture(autouse=True)
def anew() -> None:
    """Each name is noted once a process."""
    other_names._note.cache_clear()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_page_runs_skips_and_leaves_the_pipeline_as_it_was(snippet: str) -> None:
    flux = Flux()
    full = flux(num_inference_steps=STEPS)
    pictures = []

    class Pipe(type(flux.pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **call: Any) -> Any:
            drawn = super().__call__(*args, **call)
            pictures.append(drawn.images)
            return drawn

    flux.pipe.__class__ = Pipe
    call = {
        **flux.call,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(1),
    }
    exec(compile(snippet, str(PAGE), "exec"), {"pipe": flux.pipe, "call": call})
    (picture,) = pictures
    assert picture.shape == full.shape and not torch.equal(picture, full)
    assert not flux.transformer.is_cache_enabled
    assert torch.equal(flux(num_inference_steps=STEPS), full)


@pytest.mark.parametrize("theirs", OTHER_NAMES)
def test_a_name_of_the_same_meaning_is_taken_and_noted_once(
    theirs: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, backend = OTHER_NAMES[theirs], OF.get(theirs, "Tea")
    value = VALUES.get(ours, 5)
    taken = CacheConfig.from_dict({"use_cache": backend, theirs: value})
    assert taken == CacheConfig.from_dict({"use_cache": backend, ours: value})
    CacheConfig.from_dict({"use_cache": backend, theirs: value})
    notes = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    silent = theirs == "rel_l1_thresh"
    assert len(notes) == (not silent) and all(f"{theirs} is taken for {ours}" in n for n in notes)


@pytest.mark.parametrize("theirs", OF)
def test_the_first_blocks_threshold_is_no_other_backends(theirs: str) -> None:
    with pytest.raises(ValueError, match=f"^{theirs}=0.1 .* takes cache_ratio_threshold"):
        CacheConfig.from_dict({theirs: 0.1})
    gate = {"name": "Fb", theirs: 0.1}
    assert CacheConfig.from_dict({"gate": gate}).methods.gates[0].cache_ratio_threshold == 0.1
    assert fc.FbCacheConfig.from_dict({theirs: 0.1}).cache_ratio_threshold == 0.1


@pytest.mark.parametrize("theirs", REFUSED)
def test_a_name_of_another_meaning_is_refused_with_what_there_is(theirs: str) -> None:
    with pytest.raises(ValueError, match=f"^{theirs}=1 is no option here: ") as caught:
        CacheConfig.from_dict({theirs: 1})
    # What a message offers has to exist.
    known = {*CacheConfig.__dataclass_fields__, "leave"}
    assert known & set(re.findall(r"\w+", str(caught.value).partition(": ")[2]))


def test_no_name_of_ours_is_one_of_theirs() -> None:
    theirs = {*OTHER_NAMES, *REFUSED}
    assert len(theirs) == len(OTHER_NAMES) + len(REFUSED)
    assert not theirs & set(CacheConfig.__dataclass_fields__)
    assert set(OTHER_NAMES.values()) <= set(CacheConfig.__dataclass_fields__)


def test_the_page_lists_every_name() -> None:
    def listed(rows: dict[str, str], code: str) -> str:
        lines = [f"| `{name}` | {code}{said}{code} |" for name, said in rows.items()]
        return "\n".join(["| name | here |", "| --- | --- |", *lines])

    text = PAGE.read_text(encoding="utf-8")
    for place, table in (("taken", listed(OTHER_NAMES, "`")), ("refused", listed(REFUSED, ""))):
        (found,) = re.findall(rf"<!-- {place}: begin -->\n(.*?)<!-- {place}: end -->", text, re.S)
        assert found.strip() == table, f"docs/coming_from.md, {place}: put there\n{table}"


def test_a_summary_is_printed_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    flux = Flux()
    assert fc.summary(flux.pipe) == []
    assert "no cache is on transformer" in capsys.readouterr().out
    flux.cache(computed_steps=4)
    flux(**GUIDED)
    (found,) = fc.summary(flux.transformer, details=True)
    out = capsys.readouterr().out
    assert found.name == "FluxTransformer2DModel"
    assert found.cached_steps == {0: [1, 3, 4, 6], 1: [1, 3, 4, 6]}
    assert found.computed_steps == {0: [0, 2, 5, 7], 1: [0, 2, 5, 7]}
    assert found.statistics == fc.get_cache_statistics(flux.transformer)
    assert found.cache_options["computed_steps"] == 4
    assert "50.0%" in out and "computed steps of branch 1: 0, 2, 5, 7" in out
    assert out.count("step 3, branch") == 2 and "\x1b" not in out
    (by_pipe,) = fc.summary(flux.pipe, logging=False)
    assert by_pipe.name == "transformer" and capsys.readouterr().out == ""
