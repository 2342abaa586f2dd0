"""Every cache option is checked, survives its file formats, and is documented as it is."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.worlds import python

from xfuser_fastcache import CacheConfig
from xfuser_fastcache.config.checks import checked, options_of
from xfuser_fastcache.config.mappings import read_mapping
from xfuser_fastcache.config.methods import REGISTRIES
from xfuser_fastcache.config.option_tables import backends_table, methods_table, options_table
from xfuser_fastcache.plugins import BUILT_IN

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "configuration.md"
BUILT = {
    name: registry[name] for registry in REGISTRIES.values() for name in BUILT_IN[registry.group]
}
CUSTOM = {
    "cache_ratio_threshold": 1e-5,
    "granularity": 3,
    "forecaster": "linear",
    "num_steps": 28,
    "verify_consensus": True,
    "stagger_stages": True,
    "return_hidden_states_first": False,
    "steps_mask": [1, 0, 1],
}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("cache_ratio_treshold", "did you mean 'cache_ratio_threshold'"),
        ("num_step", "did you mean 'num_steps'"),
        ("zzz", "known: use_cache, gate, forecaster"),
        (7, "known: use_cache"),
    ],
)
def test_an_unknown_option_is_named_with_a_hint(key: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown cache option {key!r}; {hint}"):
        CacheConfig.from_dict({key: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", 3),
        ("cache_ratio_threshold", "0.1"),
        ("cache_ratio_threshold", True),
        ("significance_level", [0.05]),
        ("test", 2),
        ("enable_spatial_approx", 1),
        ("motion_threshold", "0.1"),
        ("adaptive_beta", (0.1, 0.0, 0.0, 0.0)),
        ("adaptive_beta", [0.1, "0", 0.0, 0.0]),
        ("static_kv", True),
        ("enable_token_merge", "yes"),
        ("token_merge_k", 2.0),
        ("token_merge_lambda", "1"),
        ("num_stages", True),
        ("merge_ratio", [0.5]),
        ("granularity", True),
        ("granularity", 2.0),
        ("num_warmup_steps", False),
        ("num_warmup_steps", 1.0),
        ("max_consecutive_skips", "4"),
        ("num_steps", True),
        ("enable_block_approx", 1),
        ("enable_block_approx", None),
        ("sync_backend", 1),
        ("sync_timeout_s", True),
        ("verify_consensus", "yes"),
        ("stagger_stages", 1),
        ("return_hidden_states_first", 0),
        ("calibration", 3),
        ("linear_maps", 3),
        ("computed_steps", 7.0),
        ("computed_steps", True),
        ("steps_mask", (1, 0)),
        ("steps_mask", "101"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_type_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        CacheConfig(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not allowed; give ")


def nested(levels: int) -> list[Any]:
    return [nested(levels - 1)] if levels else []


def endless() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def bomb() -> list[Any]:
    found: list[Any] = ["entry"]
    for _ in range(9):
        found = [found] * 9
    return found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (nested(330), "nests more than 16 levels deep, or holds itself"),
        (endless(), "nests more than 16 levels deep, or holds itself"),
        (bomb(), "holds more than 20000 entries, counting those behind an alias each time"),
    ],
)
@pytest.mark.parametrize("name", ["gate", "steps_mask", "codebook", "adaptive_beta"])
def test_what_nests_without_end_is_a_value_error_that_names_it(
    name: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        CacheConfig(**{"use_cache": "Ada", name: value})
    assert str(caught.value) == f"{name} {words}"


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        (
            "num_stages",
            lambda: 10**5000,
            "num_stages=an int of 16610 bits is not allowed; give 1 <= int",
        ),
        ("use_cache", lambda: "x" * 9999, "unknown cache backend 'xxx"),
        ("granularity", lambda: Unshowable(), "granularity=<Unshowable instance at "),
        ("cache_ratio_threshold", lambda: np.array([0.1, 0.2]), "cache_ratio_threshold=array("),
        ("steps_mask", lambda: [np.array([1, 0]), 0], "steps_mask=[array("),
        ("num_steps", lambda: np.int64(28), "num_steps=np.int64(28) is not allowed"),
        ("motion_threshold", lambda: torch.tensor(0.1), "motion_threshold=tensor(0.1"),
        ("gate", lambda: {"name": "Fb", 3: 1}, "gate={'name': 'Fb', 3: 1} is not allowed"),
        ("gate", lambda: {"nam": 10**5000}, "gate={'nam': an int of 16610 bits} is not allowed"),
    ],
)
def test_whatever_is_given_the_error_names_its_key_and_is_short(
    name: str, make: Callable[[], Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        CacheConfig(**{name: make()})
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("other", [np.array([0.1, 0.2]), torch.ones(2), [0.1], "0.1", None])
def test_two_names_of_one_option_are_not_compared_where_they_are_no_numbers(other: Any) -> None:
    with pytest.raises(ValueError, match="^rel_l1_thresh=.* are two names of one option"):
        CacheConfig.from_dict({"rel_l1_thresh": other, "cache_ratio_threshold": 0.1})


NUMBERS = {
    (method, name): option
    for method, made in {"": CacheConfig, **BUILT}.items()
    for name, option in options_of(made).items()
    if re.search("number|int", option.metadata["allowed"])
    and "{'name'" not in option.metadata["allowed"]
}


@pytest.mark.parametrize("key", NUMBERS, ids=" ".join)
@pytest.mark.parametrize("value", [10**400, 1e308, 1e200, math.inf, -math.inf, math.nan, 10**9 + 1])
def test_every_number_has_an_upper_bound(key: tuple[str, str], value: Any) -> None:
    option = NUMBERS[key]
    shapes = {"list": [value], "mapping": {1.0: value}}
    given = next((v for k, v in shapes.items() if k in option.metadata["allowed"]), value)
    with pytest.raises((TypeError, ValueError), match=f"^{option.name}=.* is not allowed; give "):
        checked(option, given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_ratio_threshold", -0.01),
        ("cache_ratio_threshold", 1e200),
        ("cache_ratio_threshold", math.inf),
        ("num_stages", 101),
        ("num_stages", 10**9),
        ("num_steps", 10**400),
        ("token_merge_k", 10_001),
        ("adaptive_beta", [1e308, 0.0, 0.0, 0.0]),
        ("adaptive_beta", [10**400, 0.0, 0.0, 0.0]),
        ("sync_timeout_s", 1e308),
        ("sync_timeout_s", 1e-300),
        ("steps_mask", [1] * 10_001),
        ("steps_mask", [1.0, 0]),
        ("calibration", ""),
        ("calibration", "a\0b"),
        ("linear_maps", ""),
        ("cache_ratio_threshold", math.nan),
        ("significance_level", 0),
        ("significance_level", 1),
        ("significance_level", math.nan),
        ("motion_threshold", -0.1),
        ("motion_threshold", math.inf),
        ("adaptive_beta", [0.1, 0.0, 0.0]),
        ("adaptive_beta", [0.1, 0.0, 0.0, math.nan]),
        ("static_kv", "keep"),
        ("token_merge_k", 0),
        ("token_merge_lambda", -1),
        ("num_stages", 0),
        ("merge_ratio", 0),
        ("merge_ratio", 1),
        ("test", "Chi2"),
        ("computed_steps", 0),
        ("steps_mask", []),
        ("steps_mask", [0, 1]),
        ("steps_mask", [1, 2]),
        ("steps_mask", [1, "0"]),
        ("steps_mask", [True, False]),
        ("granularity", 0),
        ("granularity", "span"),
        ("num_warmup_steps", -1),
        ("max_consecutive_skips", 0),
        ("num_steps", 0),
        ("sync_backend", "mpi"),
        ("sync_timeout_s", 0),
        ("sync_timeout_s", math.nan),
        ("sync_timeout_s", math.inf),
    ],
)
def test_a_value_out_of_range_is_a_value_error_that_says_the_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        CacheConfig(**{name: value})
    owned = [options_of(BUILT[key]) for key in ("Fast", "motion_static", "merging")]
    (option,) = [options[name] for options in (options_of(CacheConfig), *owned) if name in options]
    said, _, allowed = str(caught.value).partition(" is not allowed; give ")
    assert said.startswith(f"{name}={value!r}" if len(repr(value)) < 100 else f"{name}=")
    assert allowed == option.metadata["allowed"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_ratio_threshold", 0),
        ("significance_level", 1e-9),
        ("granularity", 1),
        ("granularity", "block"),
        ("num_warmup_steps", 0),
        ("max_consecutive_skips", 1),
        ("num_steps", 1),
        ("num_steps", None),
        ("return_hidden_states_first", None),
        ("test", None),
        ("steps_mask", [1]),
        ("steps_mask", [1, 0, 0]),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(name: str, value: Any) -> None:
    assert getattr(CacheConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": "conformal"}, ".* test='conformal' needs a calibration; give calibration='FILE'"),
        ({"computed_steps": 3, "speedup": 2}, "computed_steps=3 does not go with speedup=2.0: "),
        (
            {"calibration": "x", "test": "paper"},
            "calibration='x' does .* with test='paper'",
        ),
        ({"calibration": "x", "forecaster": "reuse"}, "calibration='x' does not go with forec"),
        # It is the default without a calibration; it is refused where it is asked for.
        ({"calibration": "x", "forecaster": "damped_taylor"}, "calibration='x' .*='damped_taylor'"),
        ({"calibration": "x", "linear_maps": "y"}, "linear_maps='y' does not go with calibration="),
        ({"forecaster": "output", "granularity": 3}, "granularity=3 does not go with forecaster="),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        CacheConfig(**options)


@pytest.mark.parametrize(
    "options", [{"test": "conformal"}, {"test": "chi2"}, {"computed_steps": 3}]
)
def test_options_that_need_a_calibration_are_allowed_with_one(options: dict[str, Any]) -> None:
    config = CacheConfig(calibration="x", **options)
    assert config.to_dict() == CacheConfig(calibration="x").to_dict() | options


def test_the_options_of_the_published_call_are_all_known() -> None:
    published = {
        "cache_ratio_threshold", "motion_threshold", "significance_level", "adaptive_beta",
        "enable_spatial_approx", "enable_block_approx", "enable_token_merge", "token_merge_k",
        "token_merge_lambda", "num_stages", "merge_ratio", "enable_adacorrection", "adacorr_gamma",
        "adacorr_lambda", "calibration", "use_cache", "return_hidden_states_first", "num_steps",
    }  # fmt: skip
    assert published <= {option.name for option in dataclasses.fields(CacheConfig)}


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().num_steps = 3  # type: ignore[misc]


def test_rel_l1_thresh_is_the_threshold_under_xdits_name() -> None:
    assert CacheConfig.from_dict({"rel_l1_thresh": 0.2}).cache_ratio_threshold == 0.2
    both = {"rel_l1_thresh": 0.2, "cache_ratio_threshold": 0.2}
    assert CacheConfig.from_dict(both).cache_ratio_threshold == 0.2


def test_rel_l1_thresh_may_not_contradict_the_threshold() -> None:
    with pytest.raises(ValueError, match="rel_l1_thresh=0.2 and cache_ratio_threshold=0.1 are two"):
        CacheConfig.from_dict({"rel_l1_thresh": 0.2, "cache_ratio_threshold": 0.1})


def test_reading_options_leaves_the_callers_mapping_alone() -> None:
    options = {"rel_l1_thresh": 0.2}
    CacheConfig.from_dict(options)
    assert options == {"rel_l1_thresh": 0.2}


@pytest.mark.parametrize(
    "write",
    [json.dumps, lambda o: json.dumps(o, indent="\t"), yaml.safe_dump],
    ids=["json", "json with tabs", "yaml"],
)
@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: {"cache_config": o, "model": "x"}])
def test_a_config_survives_a_file(tmp_path: Path, write: Any, wrap: Any) -> None:
    config = CacheConfig(**CUSTOM)
    path = tmp_path / "cache.conf"
    path.write_text(write(wrap(config.to_dict())))
    assert CacheConfig.from_file(path) == config


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.e-3", "+1.0e-3", ".001", "0.001"])
def test_a_number_in_yaml_may_be_written_with_an_exponent(tmp_path: Path, written: str) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text(f"cache_config:\n  cache_ratio_threshold: {written}\n")
    assert CacheConfig.from_file(path).cache_ratio_threshold == 0.001


@pytest.mark.parametrize("text", ["e5", "1e", "1e-3x", "fast-1e3"])
def test_text_in_yaml_stays_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text(f"name: {text}\n")
    assert read_mapping(path) == {"name": text}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{a: [1", "is not valid YAML or JSON"),
        (b"\xff\xfe\xff", "is not valid YAML or JSON"),
        (b"- num_steps\n- 3\n", "must hold a mapping of options, not list"),
        (b"[1, 2]", "must hold a mapping of options, not list"),
        (b"", "must hold a mapping of options, not NoneType"),
        (b"cache_config: [num_steps]", "'cache_config' in the config file .* not list"),
        (b"cache_config:\n", "'cache_config' in the config file .* not NoneType"),
        (b"cache_config: {num_stepz: 3}", "did you mean 'num_steps'"),
        # YAML 1.1 takes these for 8, 31, 3, 90 and 1000.
        *(
            (f"num_steps: {text}".encode(), f"num_steps='{text}' is not allowed; give 1 <= int")
            for text in ("010", "0x1F", "0b11", "1:30", "1_000")
        ),
        (b"num_steps: 2026-01-01", "num_steps='2026-01-01' is not allowed"),
        (b"num_steps: " + b"9" * 4001, "num_steps=an int of 13292 bits is not allowed"),
        (b"num_steps: " + b"9" * 9999, "num_steps='999.* is not allowed"),
        (b'{"num_steps": ' + b"9" * 9999 + b"}", "num_steps='999.* is not allowed"),
        (b"num_steps: 3\nnum_steps: 4", "the key 'num_steps' stands there twice"),
        (b'{"num_steps": 3, "num_steps": 4}', "the key 'num_steps' stands there twice"),
        (b"codebook: {0.1: 3, 0.10: 4}", "the key 0.1 stands there twice"),
        (b"num_steps: !!int abc", "the tag 'tag:yaml.org,2002:int' is not allowed; leave it out"),
        (b"a: !!python/object/apply:os.getcwd []", "the tag .* is not allowed"),
        (b"num_steps: " + b"[" * 330 + b"]" * 330, "num_steps nests more than 64 levels deep"),
        (b'{"num_steps": ' + b"[" * 330 + b"]" * 330 + b"}", "num_steps in the .* nests more than"),
        (b'{"num_steps": ' + b"[" * 9999 + b"]" * 9999 + b"}", "num_steps nests more than 64 lev"),
        (b"num_steps: &a [*a]", "num_steps in the config file .* nests more than 16 levels"),
        (
            b"a: &a [1]\nb: &b [" + b"*a, " * 200 + b"]\nc: [" + b"*b, " * 200 + b"]",
            "c in the config file .* holds more than 20000 entries",
        ),
        (b"? [num_steps]\n: 3", "is not valid YAML or JSON"),
        (b"7: 3", "7 in the config file .* is no name of an option"),
        (b"num_steps: 3 #" + b" " * 2**20, "it has 1048590 bytes, more than 1048576"),
        (b"feature_caching: Tea\nuse_ret_steps: 5", "^use_ret_steps=5 is not allowed; give true"),
        (b"feature_caching: Tea\ncoefficients: {0: 1}", "^coefficients={0: 1} is not allowed"),
        (b"feature_caching: [Tea]", r"^use_cache=\['Tea'\] is not allowed"),
    ],
)
def test_a_file_that_holds_no_options_is_an_error(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "cache.yaml"
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=words):
        CacheConfig.from_file(path)


def test_what_is_merged_into_a_mapping_of_yaml_may_be_said_again(tmp_path: Path) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_mapping(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("+28", 28),
        ("0.5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("1e3", 1e3),
    ],
)
def test_numbers_of_yaml_are_those_of_json(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text(f"x: {text}\n")
    found = read_mapping(path)["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "words"), [("none.yaml", "No such file"), (".", "directory")])
def test_a_path_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"cannot read the config file .*{words}"):
        CacheConfig.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({"num_steps": 3, "granularity": 2}, {"granularity": 2, "num_steps": 3}),
        ({"cache_ratio_threshold": 1}, {"cache_ratio_threshold": 1.0}),
        ({"sync_timeout_s": 600}, {}),
        ({"rel_l1_thresh": 0.2}, {"cache_ratio_threshold": 0.2}),
    ],
)
def test_equal_options_have_one_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    digest = CacheConfig.from_dict(one).digest()
    assert digest == CacheConfig.from_dict(other).digest()
    assert 0 <= digest < 2**48


@pytest.mark.parametrize("change", CUSTOM.items(), ids=lambda item: item[0])
def test_any_other_option_has_another_digest(change: tuple[str, Any]) -> None:
    assert CacheConfig(**dict([change])).digest() != CacheConfig().digest()


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from xfuser_fastcache import CacheConfig; print(CacheConfig(num_steps=3).digest())"
    found = python("-c", code)
    assert int(found.stdout) == CacheConfig(num_steps=3).digest()


@pytest.mark.parametrize(
    "options",
    [{}, {"computed_steps": 8}, {"steps_mask": [1, 0, 1]}, {"use_cache": "Tea"}, {"gate": "Fb"}],
    ids=str,
)
def test_keys_of_other_patches_are_carried_unless_stages_are_staggered(
    options: dict[str, Any],
) -> None:
    assert CacheConfig(**options).resolved().patch_kv_slope == 0.7
    assert CacheConfig(**options, stagger_stages=True).resolved().patch_kv_slope == 0
    given = CacheConfig(**options, stagger_stages=True, patch_kv_slope=0.4)
    assert given.resolved().patch_kv_slope == 0.4


@pytest.mark.parametrize(
    ("name", "table"),
    [("options", options_table), ("backends", backends_table), ("methods", methods_table)],
)
def test_the_documented_tables_are_the_codes_own(name: str, table: Callable[[], str]) -> None:
    text = DOCUMENT.read_text()
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    assert text.split(begin)[1].split(end)[0] == table(), (
        "docs/configuration.md is out of date; the command in it regenerates the tables"
    )


CELLS = {
    **{("", name): option for name, option in options_of(CacheConfig).items()},
    **{(m, name): option for m, made in BUILT.items() for name, option in options_of(made).items()},
}


@pytest.mark.parametrize("key", CELLS, ids=" ".join)
def test_the_table_gives_type_default_and_range_of_every_option(key: tuple[str, str]) -> None:
    (method, name), option = key, CELLS[key]
    lines = (methods_table() if method else options_table()).replace("\\|", "/").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    if method:
        rows = [row[1:] for row in rows if row[0].endswith(f" `{method}`")]
    (row,) = [row for row in rows if row[0].split(" (flat")[0] == f"`{name}`"]
    meta = option.metadata
    default = option.default is None and meta["none"] or f"`{option.default!r}`"
    wanted = [f"`{option.type}`", default, meta["allowed"], meta["meaning"]]
    assert row[1:] == [cell.replace("|", "/") for cell in wanted]


def test_every_flat_option_is_owned_by_a_method() -> None:
    owned = {
        option.metadata.get("flat", name)
        for made in BUILT.values()
        for name, option in options_of(made).items()
    }
    flat = {f.name for f in dataclasses.fields(CacheConfig)} - set(options_of(CacheConfig))
    # These stand inside their forecaster alone.
    inside = {"share", "of", "scale", "interval", "history", "degree", "ridge"}
    assert flat == owned - inside


# ---- given and default --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quality": "auto"}, {}),
        ({"quality": "auto", "num_warmup_steps": 1}, {}),
        ({"forecaster": {"name": "data", "share": 0.1}}, {}),
        ({"max_consecutive_skips": 4, "num_warmup_steps": 2}, {"test": "chi2"}),
        ({"test": "chi2", "forecaster": {"name": "damped_taylor", "share": 0.6}}, {"test": "chi2"}),
        ({"cache_ratio_threshold": 0.05, "significance_level": 0.05}, {"test": "chi2"}),
        ({"enable_adacorrection": False, "adacorr_gamma": 1.0, "enable_token_merge": False}, {}),
        ({"gate": {"name": "Fb", "rel_l1_thresh": 0.05}}, {"gate": "Fb"}),
        ({"use_cache": "Ada", "codebook": "slow"}, {"use_cache": "Ada"}),
        ({"motion_threshold": 0.01}, {"token_plan": "motion_static"}),
    ],
    ids=str,
)
def test_what_is_given_as_the_default_differs_and_means_the_same(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    given, left_out = CacheConfig(**one), CacheConfig(**other)
    assert given != left_out
    assert given.resolved() == left_out.resolved() == left_out.resolved().resolved()
    assert given.digest() == left_out.digest() == given.resolved().digest()


def test_an_option_of_a_method_has_another_digest() -> None:
    digests = {
        CacheConfig(forecaster={"name": "damped_taylor", "share": share}).digest()
        for share in (0.5, 0.6, 0.7)
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"forecaster": "Taylor"},
            "unknown forecaster 'Taylor'; known: reuse, .* 'xfuser_",
        ),
        ({"token_plan": "mrging"}, "unknown token_plan 'mrging'; known: motion_static, merging"),
        ({"forecaster": {"share": 0.7}}, "is not allowed; give the name of a forecaster"),
        ({"forecaster": {"name": "taylor", "share": 0.7}}, "{'share': 0.7}: .* unexpected"),
        (
            {"forecaster": {"name": "damped_taylor", "gamma": 1}},
            "gamma in forecaster=.* share",
        ),
        (
            {"forecaster": {"name": "damped_taylor", "share": 1}},
            "share=1 is not allowed",
        ),
        (
            {"token_plan": {"name": "merging", "merge_ratio": 2}},
            "merge_ratio=2 is not allowed",
        ),
        ({"adacorr_gamma": -1}, "adacorr_gamma=-1 is not allowed; give 0 <= number"),
    ],
    ids=str,
)
def test_wrong_methods_and_options_of_methods_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        CacheConfig(**options)


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_methods_with_options_survive_a_file(tmp_path: Path, write: Any) -> None:
    config = CacheConfig(
        gate={"any_of": ["Fb", {"name": "Ada", "codebook": {"0.1": 3}}]},
        forecaster={"name": "adacorrection", "of": {"name": "damped_taylor", "share": 0.7}},
    )
    for name, form in (("given", config), ("resolved", config.resolved())):
        path = tmp_path / name
        path.write_text(write(form.to_dict()))
        found = CacheConfig.from_file(path)
        assert found.digest() == config.digest()
        assert found.resolved() == config.resolved()
