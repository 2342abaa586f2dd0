"""Random options and files: a few of each kind in every run, thousands by `fastcache chaos`."""

from __future__ import annotations

import random
from typing import Any

import pytest

from xfuser_fastcache.artifacts import file as artifacts_file
from xfuser_fastcache.chaos import files, options
from xfuser_fastcache.chaos.trials import counted, run_trials
from xfuser_fastcache.hooks import hook_on

COUNT = 60


def test_random_options_are_refused_by_name_or_harmless() -> None:
    found = run_trials(options.trial, COUNT, 0)
    assert all(verdict.held for verdict in found), counted(found, "options")
    endings = {verdict.ending for verdict in found}
    assert endings == {"refused by name", "drawn"}
    assert {verdict.kind for verdict in found} >= {"keywords", "keys", "yaml", "json", "lines"}


def test_random_files_are_refused_or_read_as_written() -> None:
    found = run_trials(files.trial, COUNT, 0)
    assert all(verdict.held for verdict in found), counted(found, "files")
    assert {verdict.ending for verdict in found} == {"refused by name", "read as written"}
    flips = [verdict for verdict in found if verdict.kind.endswith("payload bit")]
    assert len(flips) == COUNT / 3


def test_a_file_that_is_taken_in_spite_of_a_changed_bit_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files._specimens()
    monkeypatch.setattr(artifacts_file, "_checksum", lambda content, written: written)
    found = run_trials(files.trial, COUNT, 0, say=lambda _: None)
    assert {verdict.ending for verdict in found if not verdict.held} == {"accepted"}
    assert sum(not verdict.held for verdict in found) > 10


def test_options_that_fail_within_a_generation_or_without_a_name_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = options.subject()

    def verdict_on(given: dict[str, Any], key: str = "") -> str:
        keys = [key] if key else list(given)
        make = lambda: options.CacheConfig.from_dict(given)  # noqa: E731
        by_keywords = options.Given("keywords", keys, make)
        monkeypatch.setattr(random.Random, "choices", lambda *_: [lambda _: by_keywords])
        return options.trial(0).ending

    assert verdict_on({"cache_ratio_threshold": 1e200}) == "refused by name"
    assert verdict_on({"cache_ratio_threshold": 0.1}) == "drawn"
    assert verdict_on({"num_steps": -1}, key="num_stages") == "refused without a name"
    with monkeypatch.context() as patch:
        patch.setattr(made, "latents", made.latents * float("nan"))
        assert verdict_on({}) == "not finite"
    with monkeypatch.context() as patch:
        patch.setattr(made, "denoise", lambda each_step: 1e200**2)
        assert verdict_on({}) == "internal error"
    with monkeypatch.context() as patch:
        patch.setattr(options, "LIMIT_S", 0.05)
        patch.setattr(made, "denoise", lambda each_step: [None for _ in iter(int, 1)])
        assert verdict_on({}) == "endless"
    assert verdict_on({}) == "drawn"


def test_a_seed_makes_the_same_trial_and_leaves_no_cache_behind() -> None:
    run_trials(options.trial, 5, 100)
    assert hook_on(options.subject().model) is None
    one, other = (run_trials(files.trial, 6, 300) for _ in range(2))
    assert [v.kind for v in one] == [v.kind for v in other]
    assert [v.ending for v in one] == [v.ending for v in other]
