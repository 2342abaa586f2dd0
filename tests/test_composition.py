"""Gates that decide together: what they measure, when they skip, and how configs hold them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.stack import Stack, ones
from test_backends import STEPS, Pipeline, levels, without_gradients  # noqa: F401

from xfuser_fastcache import CacheConfig, get_cache_statistics, remove_cache
from xfuser_fastcache.backends import BACKENDS, gate_of
from xfuser_fastcache.gates.base import Verdict
from xfuser_fastcache.gates.combined import AllOf, AnyOf
from xfuser_fastcache.measurements.probes import Probe

FB = {"name": "Fb", "cache_ratio_threshold": 0.1}
TEA = {"name": "Tea", "rel_l1_thresh": 0.25}
EVERY_THIRD = {"name": "TaylorSeer", "cache_interval": 3}


def stack(gate: Any) -> Stack:
    return Stack(use_cache="Tea", gate=gate)


def run(gate: Any, first: list[float]) -> list[bool]:
    """Return at which steps all but the first block is skipped, by what that block adds."""
    made = stack(gate)
    for level, added in zip(levels(len(first)), first, strict=True):
        made.added = [added, 2.0, 4.0, 8.0]
        made(ones(), level)
    assert made.consensus.collectives == len(first)
    return [bool(flags) for flags in made.flags]


def test_all_of_skips_where_every_gate_would_and_any_of_where_one_would() -> None:
    adds = [1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 3.0, 3.0]
    steady = [False, True, True, True, False, True, True, False, True]
    third = [False, True, True, False, True, True, False, True, True]
    assert run(FB, adds) == steady
    # Fb alone would have its reference at each computed step; together they share the steps.
    assert run({"all_of": [FB, EVERY_THIRD]}, adds) == [
        False, True, True, False, False, True, True, False, True,
    ]  # fmt: skip
    either = run({"any_of": [FB, EVERY_THIRD]}, adds)
    assert either[:7] == [False, True, True, True, False, True, True]
    assert sum(either) >= max(sum(steady), sum(third))


def test_each_gate_remembers_for_itself_and_learns_from_the_common_decision() -> None:
    """Tea's sum starts anew where the other gate makes the step be computed."""
    both = stack({"all_of": [TEA, {"name": "TaylorSeer", "cache_interval": 2}]})
    for index, level in enumerate(levels(6)):
        both(ones(1.1**index), level)
    assert both.flags == [0, 1, 0, 1, 0, 1]
    state = both.engine.agreement.branch(0).spans[0].gate_state
    assert state == (pytest.approx(0.1), None)


def test_what_gates_measure_rides_in_one_vector_each_once() -> None:
    gate = gate_of(CacheConfig(gate={"all_of": ["Fast", {"any_of": ["Fb", "Tea"]}, "Fast"]}))
    assert gate.probes == (Probe.SPAN_INPUT, Probe.FIRST_RESIDUAL, Probe.MODULATED_INPUT)


@pytest.mark.parametrize("one", [None, Verdict(0.1, 0.2), Verdict(0.3, 0.2), Verdict(None, 0.0)])
@pytest.mark.parametrize("two", [None, Verdict(0.1, 0.2), Verdict(0.3, 0.2), Verdict(None, 0.0)])
def test_the_tables_of_both_combinations(one: Verdict | None, two: Verdict | None) -> None:
    skips = [verdict is not None and verdict.may_skip for verdict in (one, two)]
    every, either = AllOf([]).combined([one, two]), AnyOf([]).combined([one, two])
    assert (every is not None and every.may_skip) == all(skips)
    assert (either is not None and either.may_skip) == any(skips)


@pytest.mark.parametrize("key", ["all_of", "any_of"])
def test_every_pair_of_backends_runs_and_repeats(key: str) -> None:
    found = Pipeline("flux")
    uncached = found()
    names = list(BACKENDS)
    for one, two in zip(names, names[1:] + names[:1], strict=True):
        found.cache("Fb", gate={key: [one, two]}, max_consecutive_skips=3)
        first = found()
        assert torch.equal(found(), first)
        statistics = get_cache_statistics(found.transformer)
        assert statistics["collectives_per_step"] == 1
        assert bool(statistics["block_approx_ratio"]) != torch.equal(first, uncached)
        remove_cache(found.transformer)
    assert torch.equal(found(), uncached)
    assert STEPS > 3


CONFIG = CacheConfig(
    use_cache="Tea",
    gate={"all_of": ["Fast", {"name": "Fb", "cache_ratio_threshold": 0.08}, {"any_of": [TEA]}]},
    forecaster="taylor2",
    num_steps=28,
    max_consecutive_skips=7,
)
SINGLE = CacheConfig(
    use_cache="Custom", cache_ratio_threshold=0.3, coefficients=[2.0, 0.5], num_steps=28
)
ADA = CacheConfig(use_cache="Ada", codebook="fast")


@pytest.mark.parametrize("config", [CONFIG, SINGLE, ADA, CacheConfig()])
@pytest.mark.parametrize("form", ["yaml", "json", "lightx2v"])
def test_a_config_goes_to_a_file_and_back(config: CacheConfig, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"config.{form}"
    if form == "lightx2v":
        held = config.to_lightx2v()
        assert held["feature_caching"] == config.use_cache and "use_cache" not in held
        path.write_text(json.dumps(held))
    else:
        write = yaml.safe_dump if form == "yaml" else json.dumps
        path.write_text(write(config.to_dict()))
    found = CacheConfig.from_file(path)
    assert found == config
    assert found.digest() == config.digest()


def test_a_file_of_lightx2v_is_read_for_its_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {
        "infer_steps": 50, "target_height": 480, "feature_caching": "Tea", "seed": 42,
        "coefficients": [[5.0, 1.0], [2.0, 0.5]], "use_ret_steps": True, "teacache_thresh": 0.26,
    }  # fmt: skip
    path = tmp_path / "wan.json"
    path.write_text(json.dumps(given))
    with caplog.at_level(logging.WARNING, "xfuser_fastcache"):
        found = CacheConfig.from_file(path)
    wanted = {
        "use_cache": "Tea", "cache_ratio_threshold": 0.26, "coefficients": [5.0, 1.0],
        "num_steps": 50, "num_warmup_steps": 5,
    }  # fmt: skip
    assert found == CacheConfig(**wanted)
    assert "no options of the cache: seed, target_height" in caplog.text
    path.write_text(json.dumps({**given, "use_ret_steps": False}))
    found = CacheConfig.from_file(path)
    assert (found.coefficients, found.num_warmup_steps) == ([5.0, 1.0], 1)
    path.write_text(json.dumps({**given, "coefficients": [[], [2.0, 0.5]]}))
    assert CacheConfig.from_file(path).coefficients == [2.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feature_caching": "NoCaching"}, "asks for no cache"),
        ({"cache_ratio_threshold": 0.5}, "are one option"),
        ({"feature_caching": "Slow", "gate": 3}, "gate=3 is not allowed"),
    ],
)
def test_a_wrong_file_of_lightx2v_says_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"feature_caching": "Tea", "teacache_thresh": 0.1, **changes}))
    with pytest.raises((ValueError, TypeError), match=words):
        CacheConfig.from_file(path)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (3, "gate=3 is not allowed; give a gate's name"),
        ({}, "is not allowed"),
        ({"name": 3}, "is not allowed"),
        ({"all_of": []}, "names no gate"),
        ({"all_of": "Fast"}, "names no gate"),
        ({"any_of": ["Fast"], "name": "Tea"}, "'any_of' stands alone"),
        ({"all_of": ["Fast", 3]}, "gate=3 is not allowed"),
    ],
)
def test_a_gate_of_another_form_is_refused(gate: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        CacheConfig(gate=gate)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_ratio_threshold": 0.1},
        {"coefficients": [1.0]},
        {"cache_interval": 3},
        {"test": "chi2"},
        {"significance_level": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_gate_stand_inside_it(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is an option of a gate; give it inside gate="):
        CacheConfig(use_cache="Tea", gate="Fast", **options)


@pytest.mark.parametrize("option", ["forecaster", "calibration", "num_steps"])
def test_options_that_are_no_gates_stand_beside_it(option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} in gate=.* is no option of the gate"):
        gate_of(CacheConfig(gate={"any_of": [{"name": "Fast", option: "taylor"}]}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_cache": "Tea", "significance_level": 0.1}, "no option of use_cache='Tea'"),
        (
            {"use_cache": "Fb", "cache_interval": 3},
            "cache_interval=3 is no option of use_cache='Fb'",
        ),
        ({"use_cache": "Ada", "cache_ratio_threshold": 0.1}, "no option of use_cache='Ada'"),
        (
            {"use_cache": "Tea", "calibration": "x"},
            "with use_cache='Tea': .* takes no calibration",
        ),
        ({"gate": "Tea", "calibration": "x"}, "with gate='Tea': .* takes no calibration"),
        ({"gate": "Fast", "calibration": "x"}, "with gate='Fast': .* takes no calibration"),
        ({"use_cache": "Tea", "coefficients": []}, "coefficients=.. is not allowed"),
        ({"use_cache": "Tea", "coefficients": ["x"]}, "coefficients=.* is not allowed"),
        ({"use_cache": "Ada", "codebook": "slower"}, "codebook='slower' is not allowed"),
        ({"use_cache": "Ada", "codebook": {0.1: 0}}, "codebook=.* is not allowed"),
        ({"use_cache": "TaylorSeer", "cache_interval": 0}, "cache_interval=0 is not allowed"),
    ],
)
def test_options_of_other_backends_and_wrong_values_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        CacheConfig(**options)
