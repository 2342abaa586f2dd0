"""Every row of docs/compatibility.md, on small pictures; and the page itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.worlds import ROOT
from torch import nn

from scripts.dev import compatibility
from scripts.dev._beside import Broken, Check, Scale, Subject, require, works
from scripts.dev._features import blocks_of, compile_blocks

SMALL = Scale(pixels=64, steps=6, threshold=1.0)


def feature_of(check: Check) -> str:
    """Return what a row is of, whatever the model and whether the cache or it came first."""
    name = check.name.removeprefix(f"{check.model}: ")
    return name.removesuffix(", before the cache").removesuffix(", after the cache")


OF_FEATURE: dict[str, list[str]] = {}
for found in compatibility.CHECKS:
    OF_FEATURE.setdefault(feature_of(found), []).append(found.name)


def is_slow(check: Check) -> bool:
    """Whether a row is left out unless asked for.

    Those that say so are; of a feature that has several, one is not, in turn.
    """
    names = OF_FEATURE[feature_of(check)]
    turn = list(OF_FEATURE).index(feature_of(check)) % len(names)
    return check.slow or names[turn] != check.name


ROWS = [
    pytest.param(check, id=check.name, marks=[pytest.mark.slow] if is_slow(check) else [])
    for check in compatibility.CHECKS
]


@pytest.mark.parametrize("check", ROWS)
def test_the_row_holds(check: Check) -> None:
    assert check(SMALL)


def test_rows_are_told_apart_and_every_model_has_some() -> None:
    names = [f"{check.group}, {check.name}" for check in compatibility.CHECKS]
    assert len(set(names)) == len(names)
    assert {check.model for check in compatibility.CHECKS} == {"flux", "sd3", "pixart"}


def test_the_page_has_every_row_and_none_that_fails() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    for check in compatibility.CHECKS:
        assert f"| {check.feature} | {check.model} | {check.outcome} |" in page, check.name
    assert "does not hold" not in page


def failing(subject: Subject) -> str:
    raise Broken("the latents are not finite")


def raising(subject: Subject) -> str:
    raise TypeError("new() received an\n   invalid argument")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (failing, "the latents are not finite"),
        (raising, "TypeError: new() received an invalid argument"),
    ],
)
def test_a_row_that_does_not_hold_is_shown_and_is_a_failure(
    run: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Check("offloading", "a feature", "flux", run), Check("VAE", "none", "flux", working)]
    monkeypatch.setattr(compatibility, "CHECKS", rows)
    page = tmp_path / "page.md"
    assert compatibility.main(["--output", str(page)]) == 1
    text = page.read_text()
    assert f"| a feature | flux | works | **does not hold**: {words} |" in text
    assert f"- flux: a feature: {words}" in text
    assert "| none | flux | works | all is well |" in text
    monkeypatch.setattr(compatibility, "CHECKS", rows[1:])
    assert compatibility.main(["--output", str(page)]) == 0


def working(subject: Subject) -> str:
    return "all is well"


def is_random(subject: Subject) -> None:
    noise = torch.Generator().manual_seed(0)
    embedder = subject.pipe.transformer.x_embedder
    embedder.register_forward_hook(
        lambda module, given, output: output + torch.randn(output.shape, generator=noise)
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"before": is_random}, "threshold 0 is not uncached to the bit"),
        ({"after": is_random}, "removal does not restore"),
        ({"cache_ratio_threshold": 0}, "nothing is skipped"),
        ({"idle": True}, "skipped, where nothing was to be"),
    ],
    ids=["random", "random later", "no skips", "skips"],
)
def test_a_check_can_fail(how: dict[str, Any], words: str) -> None:
    with pytest.raises(Broken, match=words):
        Check("planted", "a fault", "flux", works(**how))(SMALL)


# ---- what compiling leaves behind --------------------------------------------------------------


def attributes(module: nn.Module) -> dict[str, dict[str, int]]:
    """Return every submodule's own attributes, each by identity."""
    return {
        name: {key: id(value) for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_removal_gives_back_what_was_compiled(when: str) -> None:
    subject = Subject.load("flux", replace(SMALL, steps=2))
    blocks = blocks_of(subject)
    subject()
    if when == "before":
        compile_blocks(subject, "eager")
        before = attributes(subject.pipe.transformer)
        compiled = [block._compiled_call_impl for block in blocks]
    subject.cache()
    if when == "after":
        compile_blocks(subject, "eager")
        compiled = [block._compiled_call_impl for block in blocks]
    subject()
    subject.uncache()
    assert [block._compiled_call_impl for block in blocks] == compiled
    assert not any("forward" in vars(block) for block in blocks)
    if when == "before":
        assert attributes(subject.pipe.transformer) == before


def test_blocks_compiled_anew_under_the_cache_stay_cached() -> None:
    subject = Subject.load("flux", SMALL)
    compile_blocks(subject, "eager")
    subject.cache()
    wanted, hits = subject(), subject.hits
    compile_blocks(subject, "eager")
    require(hits > 0, "nothing is skipped")
    assert torch.equal(subject(), wanted)
    assert subject.hits == hits
