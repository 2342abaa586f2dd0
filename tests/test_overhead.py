"""scripts/overhead.py: every part is timed and counted, and both command lines work."""

from __future__ import annotations

import contextlib
import io
import json
import math
import socket
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.worlds import ROOT, python

from scripts.dev import _parts, overhead
from scripts.dev._parts import COMPUTED, EVERY, SKIPPED, Breakdown, Part
from xfuser_fastcache.backends import FORECASTERS
from xfuser_fastcache.models.streams import Streams
from xfuser_fastcache.xdit.generator import Run

# Those that stand in for a span, as the toy's and the block's do.
SPANS = [name for name, make in FORECASTERS.items() if not make.whole_forward]
WHOLE = [name for name in FORECASTERS if name not in SPANS]
SCRIPT = str(ROOT / "scripts" / "overhead.py")
CONFIG = str(ROOT / "configs" / "toy_flux_fast.yaml")
PARTS = {
    "hooks: transformer": EVERY,
    "hooks: block": EVERY,
    "moments: change": EVERY,
    "moments: reference": COMPUTED,
    "consensus": EVERY,
    "gate": EVERY,
    **{f"forecast: {name}, remember": COMPUTED for name in SPANS},
    **{f"forecast: {name}": SKIPPED for name in SPANS},
}
SMALL = overhead.BlockShape(width=256, heads=2, side=8, text_tokens=16)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does, on one thread and a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return python(SCRIPT, *arguments, environment={"MASTER_PORT": port}, timeout_s=150)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run on the toy FLUX printed, and its report; three spans, the linear forecaster."""
    path = tmp_path_factory.mktemp("toy") / "report.json"
    done = run_script(
        "--config", CONFIG, "--pairs=2", "--num_inference_steps", "4", "--prompt",
        "a large red ring, top left, on dark blue", "--report", str(path),
        "--cache_config", '{"granularity": 3, "forecaster": "linear"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())


@pytest.fixture(scope="module")
def block(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, dict[str, Any], list[torch.Tensor]]]:
    """What --flux_block printed for a small block, its report, and the tokens it measured."""
    path = tmp_path_factory.mktemp("block") / "report.json"
    measured: list[torch.Tensor] = []
    measure, measure_block = _parts.measure, overhead.measure_block

    def spy(hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        measured.append(hidden_states)
        return measure(hidden_states, *others)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(_parts, "LIMIT_S", 0.05)
        patch.setattr(_parts, "measure", spy)
        patch.setattr(overhead, "measure_block", lambda dtype: measure_block(dtype, SMALL, 0.5))
        flags = ["--flux_block", "--dtype", "bfloat16", "--report", str(path)]
        assert overhead.main(flags) == 0
    yield out.getvalue(), json.loads(path.read_text()), measured


@pytest.mark.parametrize("which", ["toy", "block"])
def test_every_part_is_timed(which: str, request: pytest.FixtureRequest) -> None:
    printed, report = request.getfixturevalue(which)[:2]
    breakdown = report["breakdown"]
    assert {part["name"]: part["when"] for part in breakdown["parts"]} == PARTS
    for part in breakdown["parts"]:
        for key in ("microseconds", "calls", "share"):
            assert math.isfinite(part[key]) and part[key] > 0, part
        assert part["share"] == part["microseconds"] * part["calls"] / breakdown["step_us"]
        assert part["name"] in printed
    assert breakdown["step_us"] > 0
    threads = report["environment"]["threads_per_process"]
    assert f"{threads} thread(s)" in printed


def test_the_toy_counts_its_calls(toy: tuple[str, dict[str, Any]]) -> None:
    """12 blocks in three spans: each is measured and weighed once a step, by one vector."""
    parts = toy[1]["breakdown"]["parts"]
    expected = {"hooks: transformer": 1, "hooks: block": 12, "consensus": 1}
    assert {p["name"]: p["calls"] for p in parts} == {name: 3 for name in PARTS} | expected


def test_the_parts_of_the_toy_explain_a_small_share_of_a_step(
    toy: tuple[str, dict[str, Any]],
) -> None:
    """Three spans cost tens of microseconds and nowhere near half a step, on a busy machine too."""
    for total in toy[1]["breakdown"]["totals"].values():
        assert total["share"] < 0.5
        assert total["microseconds"] > 10


def test_the_never_skip_ratio_comes_with_its_interval(toy: tuple[str, dict[str, Any]]) -> None:
    printed, report = toy
    low, high = report["interval"]
    assert len(report["ratios"]) == 2
    assert low <= sum(report["ratios"]) / 2 <= high
    assert f"(95 % interval {low:.4f} to {high:.4f}, 2 pairs)" in printed
    assert report["step_ms"]["uncached"] * 1e3 == report["breakdown"]["step_us"]
    assert report["environment"]["ranks"] == report["environment"]["threads_per_process"] == 1


def test_the_block_has_the_asked_dtype_and_shape(
    block: tuple[str, dict[str, Any], list[torch.Tensor]],
) -> None:
    printed, report, measured = block
    assert {(tokens.dtype, tokens.shape) for tokens in measured} == {
        (torch.bfloat16, (1, SMALL.side**2, SMALL.width))
    }
    assert "64 + 16 tokens, bfloat16" in printed
    assert "57 times less" in printed
    assert {part["calls"] for part in report["breakdown"]["parts"]} == {1}
    # What the flag stands for, where no test makes it small.
    assert report["shape"] == {"width": 3072, "heads": 24, "side": 64, "text_tokens": 512}


@pytest.mark.parametrize("chosen", ["output", "taylor"])
def test_only_forecasters_that_stand_in_for_the_same_are_timed(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    """A forecaster of the whole forward pass is not timed on a span's tokens, nor the reverse."""
    monkeypatch.setattr(_parts, "LIMIT_S", 0.01)
    monkeypatch.setattr(_parts, "hooks_us", lambda spans, device: (1.0, 1.0))
    tokens = (Streams(torch.rand(1, 8, 4)) for _ in range(3))
    boundary, config = _parts.Boundary(*tokens), overhead.CacheConfig(forecaster=chosen)
    parts = _parts.time_parts(boundary, config, _parts.Calls(), round_us=1.0, spans=1)
    wanted = SPANS if chosen == "taylor" else WHOLE
    assert [part.forecaster for part in parts if part.forecaster] == sorted(
        2 * wanted, key=wanted.index
    )
    assert all(part.microseconds > 0 for part in parts)


def test_a_sum_has_the_steps_own_parts_and_one_forecaster() -> None:
    parts = [
        Part("hooks", EVERY, 1.0, 4),
        Part("reference", COMPUTED, 10.0, 1),
        Part("mine", SKIPPED, 100.0, 2, "reuse"),
        Part("another", SKIPPED, 1000.0, 1, "linear"),
    ]
    breakdown = Breakdown("a model", 1000.0, "reuse", parts)
    assert breakdown.total_us(COMPUTED) == 14
    assert breakdown.total_us(SKIPPED) == 204
    assert breakdown.as_dict()["totals"][SKIPPED] == {"microseconds": 204, "share": 0.204}


def test_what_is_added_is_the_difference_on_a_disturbed_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two calls 2 us apart take turns; one turn is slow for both, another for one of them."""
    disturbance = iter([0, 0, 100, 100, 0, 50, 0, 0, 0, 0])
    monkeypatch.setattr(_parts, "median_us", lambda call, limit_s: call() + next(disturbance))
    assert _parts.added_us(lambda: 3, lambda: 1) == 2


def test_a_skipped_block_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(seconds=1.0, peak_bytes=None, statistics={"block_approx_ratio": 0.5})
    generator: Any = SimpleNamespace(run=lambda *_: run, gather=lambda run: [run])
    monkeypatch.setattr(overhead.dist, "get_rank", lambda: 0)
    with pytest.raises(RuntimeError, match="measures nothing"):
        overhead.run_pairs(generator, overhead.CacheConfig(), 1)
    run.statistics["block_approx_ratio"] = 0.0
    assert overhead.run_pairs(generator, overhead.CacheConfig(), 3).tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "0"], "--pairs 0: give at least 1"),
        (["--pairs", "many"], "argument --pairs: invalid int value: 'many'"),
        (["--flux_block", "--pairs", "3"], "--pairs: not allowed with argument --flux_block"),
        (["--flux_block", "--pears", "3"], "--flux_block takes --dtype and --report, not --pears"),
        (["--flux_block", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        overhead.parse(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_generates_flags_are_handed_on() -> None:
    given, others = overhead.parse(["--config", "c.yaml", "--pairs", "4", "--ulysses_degree", "2"])
    assert (given.pairs, given.flux_block) == (4, False)
    assert others == ["--config", "c.yaml", "--ulysses_degree", "2"]
    plain = overhead.parse([])[0]
    # No dtype: a config file may name one.
    assert (plain.pairs, plain.dtype, plain.report) == (30, None, None)


def test_a_flag_that_neither_knows_is_named() -> None:
    done = run_script("--config", CONFIG, "--pears", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --pears 3" in done.stderr
