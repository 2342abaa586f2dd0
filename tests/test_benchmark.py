"""`fastcache bench`: a known answer comes out at its known place, and runs can be broken off."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.worlds import ROOT

from diffusers_adapters.registry import adapters
from scripts.dev import fastcache_benchmark
from toys.captions import Caption, sample_captions
from toys.classifier import WEIGHTS, evaluate
from xfuser_fastcache import get_cache_statistics
from xfuser_fastcache.benchmarks import curves, methods, peers, quality, worker
from xfuser_fastcache.benchmarks.methods import Method, fixed
from xfuser_fastcache.benchmarks.settings import TOY_PROMPTS, Settings, parse_layout
from xfuser_fastcache.benchmarks.subject import Sample, Subject
from xfuser_fastcache.calibration.prompts import read_prompts
from xfuser_fastcache.cli import main
from xfuser_fastcache.xdit.loaded import call_arguments

TOY = str(ROOT / "toys" / "flux")
PROMPTS = ROOT / "toys" / TOY_PROMPTS
ISSUE = (
    "fewer-steps fewer-steps-2nd xdit-teacache xdit-fbcache cache-dit-dbcache cache-dit-taylorseer "
    "diffusers-fbcache diffusers-taylorseer diffusers-magcache"
).split()


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The toy FLUX at 64 px: 64 image tokens."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(TOY, local_files_only=True)
    return Subject(pipe, 12, {**call_arguments(TOY), "height": 64, "width": 64})


def settings_of(subject: Subject, count: int, **chosen: list[str]) -> Settings:
    return Settings(
        model=TOY, prompts=sample_captions(count, seed=2), methods=chosen, steps=subject.steps,
        converged=2, batch_size=1, call=subject.call, seed=0, dtype="float32", layout={}, workers=1,
    )  # fmt: skip


def measured(
    subject: Subject, settings: Settings, found: dict[str, Method]
) -> tuple[list[dict[str, Any]], worker.Measurement]:
    stream = io.StringIO()
    run = worker.Measurement(subject, settings, found, worker.Records(stream), None, set())
    run.warm_up()
    for number in range(len(settings.rounds)):
        run.measure_round(number, set())
    return [json.loads(line) for line in stream.getvalue().splitlines()], run


# ---------------------------------------------------------------- the known answer


@contextmanager
def each_step(subject: Subject, after: Callable[[], None]) -> Iterator[None]:
    """Do something after every call of the transformer."""
    handle = subject.transformer.register_forward_hook(lambda *_: after())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def grey(subject: Subject) -> Iterator[None]:
    """Pictures in the middle of their range, so that noise is not clipped."""
    handle = subject.pipe.vae.decoder.register_forward_hook(lambda m, i, output: 0.2 * output)
    try:
        yield
    finally:
        handle.remove()


def noisy(clock: dict[str, float]) -> Method:
    """A method with a known error, whose setting is its PSNR in dB, and a known time."""

    @contextmanager
    def prepare(subject: Subject, value: str) -> Iterator[dict[str, Any]]:
        random = torch.Generator().manual_seed(0)
        # The decoder gives -1..1, the picture is 0..1.
        deviation = 2 * 10 ** (-float(value) / 20)

        def disturb(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + deviation * torch.randn(output.shape, generator=random)

        handle = subject.pipe.vae.decoder.register_forward_hook(disturb)
        clock["step"] = 3.0 if value == "40" else 5.0
        try:
            yield {}
        finally:
            handle.remove()
            clock["step"] = 10.0

    return Method("noisy", "this test", "PSNR (dB)", fixed(40, 50), prepare)


def test_a_known_error_and_a_known_time_come_out_at_their_known_place(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 10 s of a clock of its own uncached; 5 s at 50 dB, 3 s at 40 dB."""
    clock = {"now": 0.0, "step": 10.0}

    def tick() -> None:
        clock["now"] += clock["step"]

    monkeypatch.setattr(
        "xfuser_fastcache.reports.measured.time", SimpleNamespace(perf_counter=lambda: clock["now"])
    )
    short = Subject(subject.pipe, 2, subject.call)
    settings = settings_of(short, 2, noisy=["40", "50"])
    with grey(subject), each_step(subject, tick):
        records, _ = measured(short, settings, {"noisy": noisy(clock)})
    points = curves.points_of(records, quality.drawn_features(settings.prompts))
    for level, speedup in ((40, 10 / 3), (50, 2.0)):
        point = points["noisy"][str(level)]
        assert point["psnr_db"]["mean"] == pytest.approx(level, abs=0.3)
        assert point["speedup"]["median"] == pytest.approx(speedup)
        assert point["pictures"] == point["rounds"] == 2
    assert points["baseline"][""]["identical"]
    assert points["baseline"][""]["seconds"]["median"] == 20.0
    found = curves.speedups_at([30, 45, 60], {"noisy": points["noisy"]}, "psnr_db")
    assert found["30"]["noisy"] == pytest.approx(10 / 3)
    assert found["45"]["noisy"] == pytest.approx(2.5, rel=0.02)
    assert found["60"]["noisy"] is None


def test_a_known_sleep_is_measured(subject: Subject) -> None:
    """Only a lower bound holds on a machine that others use."""
    short = Subject(subject.pipe, 2, subject.call)
    with each_step(subject, lambda: time.sleep(0.2)):
        assert short.generate(["a ring"], [0]).seconds >= 2 * 0.2


# ---------------------------------------------------------------- curves


def test_a_speedup_is_read_off_the_hull() -> None:
    """In relative time: halfway between 1x and 2x lies 1.33x, which half of each picture gives."""
    psnr, speedup = np.array([60.0, 40.0, 50.0]), np.array([1.0, 2.0, 1.2])
    assert curves.speedup_at(50, psnr, speedup) == pytest.approx(4 / 3)
    assert curves.speedup_at(60, psnr, speedup) == 1.0
    assert curves.speedup_at(10, psnr, speedup) == 2.0
    assert curves.speedup_at(60.1, psnr, speedup) is None
    assert sorted(curves.hull(psnr, speedup)) == [0, 1]
    above = np.array([1.0, 2.0, 1.6])
    assert curves.speedup_at(50, psnr, above) == pytest.approx(1.6)
    assert list(curves.hull(psnr, above)) == [1, 2, 0]


def test_a_worse_and_slower_setting_changes_nothing() -> None:
    psnr, speedup = np.array([60.0, 55.0, 55.0]), np.array([2.0, 1.5, 1.0])
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert curves.speedup_at(50, psnr[order], speedup[order]) == 2.0
    rng = np.random.default_rng(0)
    many, fast = rng.uniform(30, 60, 40), rng.uniform(1, 5, 40)
    read = [curves.speedup_at(level, many, fast) for level in np.linspace(25, many.max(), 50)]
    assert all(a >= b for a, b in zip(read, read[1:], strict=False))
    for quality_db, times in zip(many, fast, strict=True):
        assert curves.speedup_at(quality_db, many, fast) >= times - 1e-9


def test_a_setting_that_changes_nothing_lends_no_line() -> None:
    """A method between "identical" and 45 dB has nothing at 50 dB."""

    def point(psnr: float, speedup: float, identical: bool) -> dict[str, Any]:
        return {
            "psnr_db": {"mean": psnr}, "speedup": {"median": speedup}, "identical": identical
        }  # fmt: skip

    rows = {"a": {"0": point(curves.MOST_DB, 1.0, True), "1": point(45, 2.0, False)}}
    assert curves.speedups_at([45, 50], rows, "psnr_db") == {"45": {"a": 2.0}, "50": {"a": None}}


def test_no_picture_counts_for_more_than_the_most() -> None:
    assert curves.psnr_of(np.array([0.0, 1e-4])).tolist() == [curves.MOST_DB, 40.0]


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(4000, 4))
    assert quality.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert quality.frechet_distance(one, one + 3) == pytest.approx(4 * 9, rel=1e-3)
    # Deviations 1 and 2: (2 - 1)^2 in each of 4 directions.
    assert quality.frechet_distance(one, 2 * one) == pytest.approx(4, rel=0.05)


# ---------------------------------------------------------------- methods


def test_every_registered_backend_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfuser_fastcache.backends import BACKENDS, FORECASTERS

    known = methods.all_methods()
    ours = {name.lower() for name in BACKENDS} | {"fast-budget", "fast-calibrated"}
    variants = {f"fast-{name}" for name in FORECASTERS}
    plans = {f"fast-{name}" for name in ("split-reuse", "split-drop", "merge", "split-merge")}
    budgets = {f"fast-budget-{name}" for name in FORECASTERS}
    assert ours | variants | budgets | plans | {"oracle"} | set(ISSUE) == set(known)
    assert set(methods.choose(["budgets"], 28)) == budgets
    assert set(methods.choose(["all"], 28)) == ours | set(ISSUE)
    assert set(methods.choose(["forecasters"], 28)) == variants
    assert set(methods.choose(["fast", "tokens"], 28)) == {"fast"} | plans
    assert set(methods.choose(["backends"], 28)) == {name.lower() for name in BACKENDS}
    monkeypatch.setattr(methods, "BACKENDS", {**BACKENDS, "Dream": BACKENDS["Fast"]})
    assert "dream" in methods.all_methods()
    monkeypatch.setattr(methods, "BACKENDS", {**BACKENDS, "FAST": BACKENDS["Fast"]})
    with pytest.raises(ValueError, match="one name for two methods"):
        methods.all_methods()


def test_every_method_has_five_settings_or_more() -> None:
    for name, values in methods.choose(["all"], 28).items():
        assert len(values) == len(set(values)) >= 5, name
    assert {v[:2] for v in methods.choose(["cache-dit-dbcache"], 28)["cache-dit-dbcache"]} == {
        "F1", "F4",
    }  # fmt: skip


def test_every_backend_of_ours_runs_at_its_last_setting(subject: Subject) -> None:
    """The widest of its settings skips, and each of ours takes the option that it is swept by."""
    chosen = {n: [v[-1]] for n, v in methods.choose(["backends"], 28).items()}
    records, run = measured(subject, settings_of(subject, 1, **chosen), methods.all_methods())
    assert not run.failed
    points = curves.points_of(records, None)
    for name, (value,) in chosen.items():
        assert not points[name][value]["identical"], name


def test_computed_steps_are_known_of_caches_and_of_fewer_steps(subject: Subject) -> None:
    chosen = {
        "fast-budget": ["3", "6"],
        "fast-budget-output": ["6"],
        "fast": ["0.0"],
        "fewer-steps": ["4"],
    }
    records, _ = measured(subject, settings_of(subject, 1, **chosen), methods.all_methods())
    points = curves.points_of(records, None)
    found = {(n, v): p["computed_steps"] for n, rows in points.items() for v, p in rows.items()}
    assert found == {
        ("baseline", ""): 12.0,
        ("fast-budget", "3"): 3.0,
        ("fast-budget", "6"): 6.0,
        ("fast-budget-output", "6"): 6.0,
        ("fast", "0.0"): 12.0,
        ("fewer-steps", "4"): 4.0,
    }
    assert points["fast-budget"]["6"]["psnr_db"] != points["fast-budget-output"]["6"]["psnr_db"]


def test_quality_is_read_off_between_numbers_of_computed_steps() -> None:
    def point(steps: float | None, db: float) -> dict[str, Any]:
        return {"computed_steps": steps, "psnr_db": {"mean": db}}

    points = {
        "gate": {"b": point(10.0, 50.0), "a": point(6.0, 40.0)},
        "budget": {"7": point(7.0, 45.0)},
        "peer": {"x": point(None, 60.0)},
    }
    assert curves.psnr_at([10, 7, 5], points) == {
        "10": {"gate": 50.0, "budget": None, "peer": None},
        "7": {"gate": 42.5, "budget": 45.0, "peer": None},
        "5": dict.fromkeys(points),
    }


def test_the_polynomial_beside_a_model_is_used() -> None:
    from diffusers import DiffusionPipeline

    from xfuser_fastcache import CacheConfig
    from xfuser_fastcache.hooks import hook_on

    pipe = DiffusionPipeline.from_pretrained("toys/sd3", torch_dtype=torch.float32)
    with methods.all_methods()["tea"].prepare(Subject(pipe, 4, {}), "0.5"):
        gate = hook_on(pipe.transformer).engine.plan.gate
        fitted = CacheConfig.from_file("toys/sd3/teacache.yaml").coefficients
        assert (gate.cache_ratio_threshold, list(gate.coefficients)) == (0.5, fitted)


def test_settings_can_be_given() -> None:
    assert methods.choose(["fast:0.1,0.2", "fewer-steps"], 4) == {
        "fast": ["0.1", "0.2"], "fewer-steps": ["3", "2", "1"],
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="unknown method 'quick'; known: all, forecasters, budgets, tokens"
    ):
        methods.choose(["quick"], 4)


@pytest.mark.parametrize("name", ["split-reuse", "split-drop", "merge", "split-merge"])
def test_a_token_plan_is_measured_with_its_gate(subject: Subject, name: str) -> None:
    method = methods.all_methods()[f"fast-{name}"]
    setting = method.values(28)[-1]
    with method.prepare(subject, setting):
        subject.generate(sample_captions(1, seed=3), [0])
        statistics = get_cache_statistics(subject.transformer)
    assert statistics["spatial_approx_ratio"] > 0 and statistics["block_approx_ratio"] > 0


def test_second_order_is_nearer_to_the_converged_run(subject: Subject) -> None:
    """From the same noise; it would be far off with another shift, or another starting noise."""
    prompts, seeds = sample_captions(1, seed=3), [0]
    aim = subject.generate(prompts, seeds, num_inference_steps=80).images
    own = subject.pipe.scheduler

    def error(name: str) -> float:
        with methods.all_methods()[name].prepare(subject, "10") as changes:
            images = subject.generate(prompts, seeds, **changes).images
        return float(np.mean([quality.squared_error(*p) for p in zip(images, aim, strict=True)]))

    assert error("fewer-steps-2nd") < error("fewer-steps") < 1e-3
    assert subject.pipe.scheduler is own


def test_second_order_keeps_the_shift_of_the_own_scheduler() -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    own = FlowMatchEulerDiscreteScheduler(shift=2.5)
    found = methods.second_order(own)
    own.set_timesteps(50)
    found.set_timesteps(50)
    assert float((own.sigmas - found.sigmas).abs().max()) < 0.05
    diffusion = DPMSolverMultistepScheduler(beta_end=0.03, prediction_type="v_prediction")
    unipc = methods.second_order(diffusion)
    assert type(unipc).__name__ == "UniPCMultistepScheduler"
    assert (unipc.config.beta_end, unipc.config.prediction_type) == (0.03, "v_prediction")


def test_diffusers_first_block_cache_is_exact_at_0_and_skips_at_1(subject: Subject) -> None:
    settings = settings_of(subject, 1, **{"diffusers-fbcache": ["0", "1.0"]})
    records, _ = measured(subject, settings, methods.all_methods())
    points = curves.points_of(records, None)["diffusers-fbcache"]
    assert points["0"]["identical"]
    assert not points["1.0"]["identical"]


def test_every_peer_runs_on_flux_and_leaves_it_as_it_was(subject: Subject) -> None:
    """`warm_up` raises where one leaves a trace; a package that is missing is an error as well."""
    chosen = {m.name: [m.values(12)[-1]] for m in peers.peers()}
    records, run = measured(subject, settings_of(subject, 1, **chosen), methods.all_methods())
    errors = curves.errors_of(records, chosen)
    missing = {name for name, e in errors.items() if e.startswith("ModuleNotFoundError")}
    assert set(errors) == {name for name, _ in run.failed} == missing
    assert all(name.startswith("cache-dit") for name in missing)
    points = curves.points_of(records, None)
    for name, (value,) in chosen.items():
        if name not in missing:
            assert not points[name][value]["identical"], name


def test_cache_dit_forecasts_better_than_it_reuses(subject: Subject) -> None:
    pytest.importorskip("cache_dit", reason="needs the extra bench")
    names = ("cache-dit-dbcache", "cache-dit-taylorseer")
    chosen = {name: ["F1/0.2"] for name in names}
    records, _ = measured(subject, settings_of(subject, 2, **chosen), methods.all_methods())
    points = curves.points_of(records, None)
    reuse, forecast = (points[name]["F1/0.2"]["psnr_db"]["mean"] for name in names)
    assert forecast > reuse + 1


def test_a_setting_that_raises_is_listed_with_its_own_error(subject: Subject) -> None:
    """The method's other settings and the other methods go on."""

    @contextmanager
    def prepare(inner: Subject, value: str) -> Iterator[dict[str, Any]]:
        if value == "2":
            raise RuntimeError("no such\nblock")
        yield {}

    short = Subject(subject.pipe, 2, subject.call)
    found = {
        "broken": Method("broken", "", "", fixed(1, 2), prepare),
        "fewer-steps": methods.all_methods()["fewer-steps"],
    }
    settings = settings_of(short, 1, **{"broken": ["1", "2"], "fewer-steps": ["1"]})
    records, run = measured(short, settings, found)
    assert run.failed == {("broken", "2")}
    ((name, error),) = curves.errors_of(records, settings.methods).items()
    assert name == "broken at 2"
    assert error.startswith("RuntimeError: no such block (test_benchmark.py:")
    assert list(curves.errors_of(records, {"broken": ["2"]})) == ["broken"]
    points = curves.points_of(records, None)
    assert set(points) == {"baseline", "fewer-steps", "broken"}
    assert set(points["broken"]) == {"1"}


def test_a_method_that_leaves_a_trace_stops_the_run(subject: Subject) -> None:
    @contextmanager
    def prepare(inner: Subject, value: str) -> Iterator[dict[str, Any]]:
        handles.append(inner.pipe.vae.decoder.register_forward_hook(lambda m, i, o: o + 0.01))
        yield {}

    handles: list[Any] = []
    short = Subject(subject.pipe, 2, subject.call)
    found = {"dirty": Method("dirty", "", "", fixed(1), prepare)}
    try:
        with pytest.raises(RuntimeError, match="dirty left the pipeline changed"):
            measured(short, settings_of(short, 1, dirty=["1"]), found)
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- settings and records


def test_the_shipped_prompts_are_64_captions_that_no_toy_was_trained_on() -> None:
    prompts = read_prompts(PROMPTS, None)
    assert len(prompts) == len(set(prompts)) == 64
    assert {Caption.parse(prompt).split for prompt in prompts} == {"unseen"}
    with pytest.raises(ValueError, match="--num_prompts 65, but .* holds 64"):
        read_prompts(PROMPTS, 65)


def test_a_layout_is_read_or_refused() -> None:
    assert parse_layout("ulysses=2, pipefusion=4") == {"ulysses": 2, "pipefusion": 4}
    assert parse_layout("") == {}
    for text in ("ulysses", "ulysses=1", "rings=2", "cfg=4"):
        with pytest.raises(ValueError, match="--layout"):
            parse_layout(text)


def test_a_layout_becomes_flags_of_xdit(subject: Subject) -> None:
    settings = replace(settings_of(subject, 1), layout={"cfg": 2, "pipefusion": 2})
    assert settings.ranks == 4
    assert settings.layout_flags() == [
        "--use_cfg_parallel", "--pipefusion_parallel_degree", "2",
    ]  # fmt: skip


def test_settings_survive_writing_and_name_what_differs(subject: Subject, tmp_path: Path) -> None:
    settings = settings_of(subject, 5, fast=["0.1"])
    settings.write(tmp_path / "settings.json")
    assert Settings.read(tmp_path / "settings.json") == settings
    assert replace(settings, batch_size=2).rounds == [[0, 1], [2, 3], [4]]
    other = replace(settings, steps=3, seed=1, workers=2)
    assert settings.differences(other) == ["steps", "seed"]
    with pytest.raises(ValueError, match="batch_size=0: give at least 1"):
        replace(settings, batch_size=0)


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "records.000-0.jsonl").write_text('{"kind": "error"}\n{"kind": "po')
    (tmp_path / "records.001-0.jsonl").write_text('{"kind": "point"}\n')
    kinds = [record["kind"] for record in worker.read_records(tmp_path)]
    assert kinds == ["error", "point"]


def test_other_prompts_have_no_captions_to_mark() -> None:
    images = [np.zeros((32, 32, 3))]
    assert quality.marks(["an oil painting of Ada's cat"], images) == {}
    assert quality.drawn_features(["an oil painting of Ada's cat"]) is None
    assert set(quality.marks(["a small pink cross, center, on white"], images)) == {
        "passed", "features",
    }  # fmt: skip


def test_the_classifier_is_small_and_reads_unseen_captions() -> None:
    assert WEIGHTS.stat().st_size <= 400_000
    assert evaluate(captions=64) >= 0.95


# ---------------------------------------------------------------- the command


def command(directory: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "scripts/benchmark.py", "--model", "toys/flux", "--methods", "fast:0.9",
        "fewer-steps", "--num_prompts", "3", "--num_inference_steps", "4", "--batch_size", "1",
        "--converged", "2", "--workers", "1", "--at_psnr", "30,90", "--output_dir", str(directory),
        *flags,
    ]  # fmt: skip


def test_a_run_can_be_broken_off_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole small comparison, interrupted after its first measurement and then resumed."""
    directory = tmp_path / "run"
    with subprocess.Popen(
        command(directory),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        limit = time.monotonic() + 200
        while '"fast"' not in "".join(map(Path.read_text, directory.glob("records.*"))):
            assert process.poll() is None and time.monotonic() < limit, process.stdout.read()
            time.sleep(0.05)
        # As a terminal does: to the workers as well.
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "--resume goes on" in output
    broken_off = json.loads((directory / "benchmark.json").read_text())
    assert not broken_off["complete"]
    assert "fast" in broken_off["points"]

    given = command(directory)[2:]
    former = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["bench", *given]) == 2
        assert "give --resume" in capsys.readouterr().err
        assert main(["bench", *given, "--converged", "3", "--resume"]) == 2
        assert "a run with another converged" in capsys.readouterr().err
        assert main(["bench", *given, "--resume"]) == 0
    finally:
        signal.signal(signal.SIGTERM, former)
    result = json.loads((directory / "benchmark.json").read_text())
    assert result["complete"]
    assert list(result["points"]) == ["fast", "fewer-steps"]
    assert list(result["points"]["fewer-steps"]) == ["3", "2", "1"]
    assert result["points"]["fewer-steps"]["1"]["speedup"]["median"] > 1.5
    assert set(result["speedup_at_psnr"]) == {"30", "90"}
    assert set(result["psnr_at_computed_steps"]["10"]) == {"fast", "fewer-steps"}
    assert result["speedup_at_psnr"]["90"] == {"fast": None, "fewer-steps": None}
    assert result["baseline"]["caption_accuracy"]["ratio"] >= 0
    assert {"torch", "diffusers", "device"} <= set(result["environment"])
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 1 + 4
    assert "http" not in page
    assert (directory / "speed_quality_flux.png").stat().st_size > 10_000
    assert "| fewer-steps | 1 |" in (directory / "benchmark.md").read_text()


def test_the_documents_benchmark_runs_with_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model_type", "flux", "--model", TOY, "--prompt", "a large red ring, top left, on white",
        "--num_inference_steps", "6", "--seed", "3", "--batch_size", "2", "--height", "64",
        "--width", "64", "--output_dir", str(tmp_path), "--repeat", "1",
        "--cache_ratio_threshold", "0.6", "--motion_threshold", "0.1",
        "--analyze_approximation_quality",
    ]  # fmt: skip
    assert fastcache_benchmark.main(arguments) == 0
    found = json.loads((tmp_path / "fastcache_benchmark.json").read_text())
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == ["Baseline", "FastCache", "TeaCache", "First-Block-Cache"]
    assert rows["FastCache"]["block_approx_ratio"] > 0
    assert rows["FastCache"]["psnr_db"] > 20
    assert rows["FastCache"]["source"] == "xfuser-fastcache, threshold 0.6"
    assert all("error" not in row for row in rows.values())
    assert "2 picture(s) a call, 6 steps, on " in found["measured"]
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "fastcache", "teacache", "first_block_cache",
    }  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Measured: {TOY}" in printed


def test_a_model_of_another_type_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_type", "sd3", "--model", TOY, "--output_dir", str(tmp_path)]
    assert fastcache_benchmark.main(arguments) == 2
    said = " ".join(capsys.readouterr().out.split())
    known = ", ".join(sorted(adapters()))
    assert f"is a FluxPipeline, not of --model_type sd3; known types: {known}" in said


def test_a_method_that_cannot_run_stays_in_the_documents_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """xfuser's caches know FLUX alone; on other models their own errors stand in their place."""
    column = fastcache_benchmark.Column("TeaCache", "xfuser", None)
    column.error = "AttributeError: no such blocks"
    base = fastcache_benchmark.Column("Baseline", "uncached", None)
    base.samples = [Sample(2.0, None, [])]
    rows = fastcache_benchmark.rows_of([base, column], analyze=False)
    assert [row.get("error") for row in rows] == [None, "AttributeError: no such blocks"]
    fastcache_benchmark.print_rows(rows, False, Console(width=100))
    assert "TeaCache could not run: AttributeError: no such blocks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fast-calibrated", "oracle"])
def test_a_method_without_its_calibration_is_listed_with_the_way_to_make_one(name: str) -> None:
    pipe = SimpleNamespace(set_progress_bar_config=lambda **_: None)
    with (
        pytest.raises(FileNotFoundError, match="fastcache calibrate --computed_steps"),
        methods.all_methods()[name].prepare(Subject(pipe, 28, {}), "7"),
    ):
        pass


def test_the_oracle_skips_by_true_errors_and_pays_for_what_it_keeps() -> None:
    from diffusers import FluxPipeline

    from xfuser_fastcache import apply_cache_on_transformer, remove_cache

    pipe = FluxPipeline.from_pretrained(TOY, local_files_only=True)
    file = f"{TOY}/fastcache.safetensors"
    subject = Subject(pipe, 28, call_arguments(TOY), calibration=file)
    prompt, transformer = sample_captions(1, seed=3), pipe.transformer
    found = {}
    for value in ("0", "0.02", "1e9"):
        with methods.all_methods()["oracle"].prepare(subject, value):
            found[value] = subject.generate(prompt, [0])
    uncached = subject.generate(prompt, [0])
    assert "forward" not in transformer.__dict__ and not subject.free_s
    assert np.array_equal(found["0"].images[0], uncached.images[0])
    assert found["1e9"].seconds < found["0.02"].seconds < found["0"].seconds
    assert found["1e9"].seconds < 0.5 * found["0"].seconds
    # Where no error is too large, it is the cache with one computed step.
    options = {"calibration": file, "steps_mask": [1] + [0] * 27}
    apply_cache_on_transformer(transformer, scheduler=pipe.scheduler, **options)
    cached = subject.generate(prompt, [0])
    remove_cache(transformer)
    assert np.array_equal(found["1e9"].images[0], cached.images[0])
    assert not np.array_equal(found["0.02"].images[0], cached.images[0])


def test_the_interval_of_a_frechet_distance_holds_it() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(64, 8)), rng.normal(size=(200, 8))
    found = curves._frechet(own, other, paired=False)
    low, high = found["interval_95"]
    assert 0 <= low < found["distance"] < high < 4 * found["distance"]
    assert curves._frechet(own[:10], other, paired=False) is None
