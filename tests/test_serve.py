"""scripts/serve.py as its clients and its operator meet it, on real ranks with the toys."""

from __future__ import annotations

import base64
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.crowds import HALF, SilentCrowd, mixed_requests
from support.crowds import MIXED as MIXED_KINDS
from support.doors import events
from support.failing_methods import MESSAGE, register_in
from support.served import Served, launched
from support.worlds import ROOT

pytestmark = pytest.mark.gloo

STEPS = 8
SLOW = {"num_inference_steps": 20, "use_cache": False}
PATIENCE_S = 3.0
READ_S = 5.0


def toy(model: str, *flags: str) -> tuple[str, ...]:
    """Flags of a service of a toy that caches by its gate."""
    return (
        "--config", str(ROOT / "configs" / f"toy_{model}_fast.yaml"),
        "--num_inference_steps", str(STEPS), "--cache_config", '{"cache_ratio_threshold": 0.5}',
        "--max_side", "256", *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Services know methods that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", register_in(tmp_path_factory.mktemp("site")))
        yield


@pytest.fixture(scope="module")
def ulysses(failing: None) -> Iterator[Served]:
    """FLUX on Ulysses 2."""
    flags = ("--ulysses_degree", "2", "--queue_size", "2", "--read_timeout_s", str(READ_S))
    service = Served(2, *toy("flux", *flags))
    yield service
    service.end()


@pytest.fixture
def pipefusion() -> Iterator[Served]:
    """SD3 on PipeFusion 2 with impatient clients."""
    service = Served(
        2,
        *toy("sd3", "--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "2"),
        *("--warmup_steps", "4", "--request_timeout_s", str(PATIENCE_S)),
        start=launched,
    )
    yield service
    service.end()


LAYOUTS = {
    "ulysses": ("flux", "--ulysses_degree", "2"),
    "pipefusion": ("sd3", "--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "2"),
}
MIXED: list[dict[str, Any]] = [
    {},
    {"height": 256, "width": 256, "num_inference_steps": 6},
    {"use_cache": False},
    {"height": 160, "width": 96, "seed": 7},
    {"use_cache": "TaylorSeer", "cache_config": {"cache_interval": 2}, "num_inference_steps": 12},
    {"height": 192, "width": 224, "num_inference_steps": 2},
    {"cache_config": {"steps_mask": [1, 1, 0, 1, 0, 1, 0, 1]}, "prompt": "a small green square"},
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_mixed_requests_leave_nothing_behind(layout: str) -> None:
    """Every picture repeats to the bit; memory, files and threads stop growing.

    Run with `-s`, it prints what docs/serving.md shows.
    """
    service = Served(2, *toy(*LAYOUTS[layout]))
    try:
        pictures: dict[int, str] = {}
        held = []
        for number in range(50):
            kind = number % len(MIXED)
            image = service.drawn(**MIXED[kind])["image"]
            assert pictures.setdefault(kind, image) == image, number
            if number % 10 == 9:
                memory = service.statistics()["memory_bytes"]
                held += [
                    {
                        "requests": number + 1,
                        "rank": rank,
                        "mb": memory[str(rank)] / 1e6,
                        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
                        "threads": len(list(Path(f"/proc/{process}/task").iterdir())),
                    }
                    for rank, process in sorted(service.ranks().items())
                ]
        for row in held:
            print(layout, " ".join(f"{k} {v:.0f}" for k, v in row.items()))
        assert service.drawn(**MIXED[0])["image"] == pictures[0]
        assert len(set(pictures.values())) == len(MIXED)
        for rank in (0, 1):
            early, late = (
                row for row in held if row["rank"] == rank and row["requests"] in (20, 50)
            )
            assert late["mb"] < 1.03 * early["mb"]
            assert (late["files"], late["threads"]) == (early["files"], early["threads"])
        assert service.stop() == 0
    finally:
        service.end()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_service_outlives_crowds_and_ends_as_it_says(failing: None) -> None:
    """Run with `-s`, it prints what docs/serving.md shows."""
    flags = ("--ulysses_degree", "2", "--read_timeout_s", "5", "--peer_timeout_s", "6")
    service = Served(2, *toy("flux", *flags))
    try:
        pictures: dict[int, str] = {}
        mixed_requests(service, len(MIXED_KINDS), pictures)
        held = {0: measured(service)}
        answers: Counter[int] = Counter()
        for wave in range(1, 6):
            idle = SilentCrowd(service, 300, b"")
            half = SilentCrowd(service, 160, HALF)
            answers += mixed_requests(service, 100, pictures)
            assert idle.all_ended(30) and half.all_ended(30), wave
            held[100 * wave] = measured(service)
        print(f"answers {dict(answers)}, {300 * wave} idle and {160 * wave} half-sent connections")
        for number, row in held.items():
            print(number, row)
        assert answers.total() == 500
        for rank in (0, 1):
            early, late = held[100][rank], held[500][rank]
            assert late["mb"] < 1.03 * early["mb"]
            assert (late["files"], late["threads"]) == (early["files"], early["threads"])

        idle, half = SilentCrowd(service, 300, b""), SilentCrowd(service, 160, HALF)
        with ThreadPoolExecutor(4) as clients:
            waiting = [clients.submit(service.draw, **SLOW, seed=i) for i in range(4)]
            while (said := service.statistics())["running"] + said["waiting"] < 4:
                time.sleep(0.05)
            started = time.monotonic()
            assert service.stop(90) == 0
            statuses = [future.result().status_code for future in waiting]
        assert set(statuses) <= {200, 503} and 200 in statuses
        assert service.left() == [0, 1]
        assert idle.all_ended(5) and half.all_ended(5)
        print(f"SIGTERM: {statuses}, all had left after {time.monotonic() - started:.1f} s")
    finally:
        service.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (signal.SIGKILL, "rank 1 ended the connection"),
        (signal.SIGSTOP, "no sign of life from rank 1 for 6 s"),
    ],
)
def test_a_rank_that_is_gone_ends_the_service(sent: signal.Signals, reason: str) -> None:
    flags = ("--ulysses_degree", "2", "--peer_timeout_s", "6")
    # By torchrun, which ends a stopped rank too.
    service = Served(2, *toy("flux", *flags), start=launched)
    try:
        crowd = SilentCrowd(service, 300, HALF)
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(service.draw, **SLOW | {"num_inference_steps": 100})
            while not service.statistics()["running"]:
                time.sleep(0.02)
            os.kill(service.ranks()[1], sent)
            started = time.monotonic()
            assert answer.result(60).status_code == 503
            answered = time.monotonic() - started
        assert answer.result().json()["detail"] == f"the service ends: {reason}"
        assert service.wait(90) != 0
        gone = time.monotonic() - started
        print(f"{sent.name}: 503 after {answered:.1f} s, gone after {gone:.1f} s")
        assert answered < 30
        assert crowd.all_ended(5)
    finally:
        service.end()


def measured(service: Served) -> dict[int, dict[str, float]]:
    """By rank: resident memory in MB, open files, threads; once nothing is under way."""
    time.sleep(1)
    memory = service.statistics()["memory_bytes"]
    return {
        rank: {
            "mb": round(memory[str(rank)] / 1e6),
            "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
            "threads": len(list(Path(f"/proc/{process}/task").iterdir())),
        }
        for rank, process in sorted(service.ranks().items())
    }


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": "a" * 2001}, "prompt has 2001 characters; give at most 2000"),
        ({"heigth": 128}, "unknown field 'heigth'; known: prompt, negative_prompt, height"),
        ({"height": "128"}, "height: Input should be a valid integer, given '128'"),
        ({"height": 112}, "height=112 is not allowed; give a multiple of 32 up to 256"),
        ({"width": 100}, "width=100 is not allowed; give a multiple of 16 up to 256"),
        ({"width": 512}, "width=512 is not allowed"),
        ({"num_inference_steps": 101}, "num_inference_steps=101 is not allowed; give 1 to 100"),
        ({"num_inference_steps": 0}, "num_inference_steps: Input should be greater"),
        ({"guidance_scale": -1}, "guidance_scale: Input should be greater"),
        ({"seed": -1}, "seed: Input should be greater"),
        ({"use_cache": "Slow"}, "unknown cache backend 'Slow'; known: Fast"),
        ({"cache_config": {"treshold": 1}}, "unknown cache option 'treshold'"),
        ({"cache_config": {"cache_ratio_threshold": "x"}}, "cache_ratio_threshold='x' is not"),
        ({"use_cache": False, "cache_config": {"num_steps": 2}}, "cache_config needs a cache"),
        ({"cache_config": {"sync_timeout_s": 1}}, "sync_timeout_s=1 is not allowed; it is set by"),
        ({"cache_config": {"calibration": "/etc/hostname"}}, "calibration='/etc/hostname' is not"),
        ({"cache_config": {"linear_maps": "/etc/hostname"}}, "linear_maps='/etc/hostname' is not"),
        ({"cache_config": {"steps_mask": [1, 0, 1]}}, "3 entries, but this generation has 8 steps"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(
    ulysses: Served, body: dict[str, Any], message: str
) -> None:
    before = ulysses.statistics()["requests"]
    response = ulysses.draw(**body)
    assert response.status_code == 422, response.text
    assert message in response.json()["detail"]
    after = ulysses.statistics()["requests"]
    assert after == {**before, "refused": before["refused"] + 1}


def test_a_body_that_is_no_json_or_too_long_is_refused(ulysses: Served) -> None:
    send = ulysses.client.post
    as_json = {"Content-Type": "application/json"}
    response = send("/generate", content="{", headers=as_json)
    assert (response.status_code, response.json()["detail"][:26]) == (
        422,
        "the body is not valid JSON",
    )
    response = send("/generate", content=b" " * (1 << 20) + b"{}", headers=as_json)
    assert response.status_code == 413
    response = send("/generate", content=iter([b"{}"]), headers=as_json)
    assert (response.status_code, response.json()["detail"][:25]) == (
        413,
        "a body must say its lengt",
    )


def test_a_picture_comes_as_json_or_as_png(ulysses: Served) -> None:
    answer = ulysses.drawn(width=96)
    picture = base64.b64decode(answer["image"])
    with Image.open(io.BytesIO(picture)) as image:
        assert (image.format, image.size) == ("PNG", (96, 128))
    assert (answer["seed"], answer["height"], answer["width"]) == (1, 128, 96)
    assert answer["num_inference_steps"] == answer["statistics"]["steps"] == STEPS
    assert 0 < answer["statistics"]["block_approx_ratio"] < 1
    plain = ulysses.client.post(
        "/generate",
        json={"prompt": "a large red ring, top left, on dark blue", "width": 96, "seed": 1},
        headers={"Accept": "image/png"},
    )
    assert plain.headers["content-type"] == "image/png"
    assert plain.content == picture
    assert plain.headers["x-seed"] == "1"
    drawn = ulysses.draw(width=96).json()
    again = ulysses.drawn(width=96, seed=drawn["seed"])
    assert drawn["image"] == again["image"] != answer["image"]


def test_a_request_brings_its_own_cache(ulysses: Served) -> None:
    own = ulysses.drawn()
    never = ulysses.drawn(cache_config={"cache_ratio_threshold": 0})
    uncached = ulysses.drawn(use_cache=False)
    masked = ulysses.drawn(cache_config={"steps_mask": [1, 1, 0, 1, 0, 0, 0, 1]})
    other = ulysses.drawn(use_cache="TaylorSeer", cache_config={"cache_interval": 2})
    assert own["statistics"]["use_cache"] == "Fast"
    assert 0 < own["statistics"]["block_approx_ratio"]
    assert never["statistics"]["block_approx_ratio"] == 0
    assert uncached["statistics"] == {}
    assert never["image"] == uncached["image"] != own["image"]
    assert masked["statistics"]["block_approx_ratio"] == 0.5
    assert other["statistics"]["use_cache"] == "TaylorSeer"
    assert ulysses.drawn() | {"seconds": 0, "waited_s": 0, "statistics": {}} == own | {
        "seconds": 0,
        "waited_s": 0,
        "statistics": {},
    }


def test_a_stream_and_openais_images_are_the_same_picture(ulysses: Served) -> None:
    """And telling of steps costs no round of consensus more."""
    own = ulysses.drawn(seed=3)
    asked = {"prompt": "a large red ring, top left, on dark blue", "seed": 3}
    body = {**asked, "stream": True}
    with ulysses.client.stream("POST", "/generate", json=body) as answer:
        found = list(events(answer))
    told = [said for word, said in found if word == "progress"]
    steps = [said["step"] for said in told]
    assert 3 <= len(steps) <= STEPS + 1 and steps == sorted(set(steps))
    assert {said["steps"] for said in told} == {STEPS}
    word, done = found[-1]
    assert (word, done["image"]) == ("done", own["image"])
    for name in ("collectives", "blocks", "decisions_digest"):
        assert done["statistics"][name] == own["statistics"][name]
    assert told[-1]["block_approx_ratio"] <= own["statistics"]["block_approx_ratio"]
    assert told[-1]["block_approx_ratio"] > 0
    for row in done["decisions"]:
        skipped = own["statistics"]["blocks"][row["first_block"]]["skipped"]
        assert (len(row["steps"]), row["steps"].count("-")) == (STEPS, skipped)
    (image,) = ulysses.client.post("/v1/images/generations", json=asked).json()["data"]
    assert image["b64_json"] == own["image"]
    assert image["fastcache"]["decisions"] == done["decisions"]


def test_a_generation_that_fails_fails_alone(ulysses: Served) -> None:
    """Ranks that share an error, or a picture that is none, end nothing but their request."""
    before = ulysses.statistics()["requests"]
    own, uncached = ulysses.drawn()["image"], ulysses.drawn(use_cache=False)["image"]
    failing = {"use_cache": "Failing", "num_inference_steps": STEPS}
    for kind, options, reason in (
        (failing, {}, f"this picture failed: RuntimeError: {MESSAGE}"),
        ({"use_cache": "TaylorSeer"}, {"forecaster": "nan"}, "the picture holds NaN or infinity"),
    ):
        answer = ulysses.draw(**kind, seed=1, cache_config=options)
        assert answer.status_code == 503, answer.text
        assert reason in answer.json()["detail"]
        assert ulysses.drawn()["image"] == own
        assert ulysses.drawn(use_cache=False)["image"] == uncached
    after = ulysses.statistics()["requests"]
    assert after["failed"] == before["failed"] + 2
    # Ranks have made their groups anew: those before are gone, with their sockets and threads.
    held = measured(ulysses)
    for _ in range(2):
        assert ulysses.draw(**failing).status_code == 503
        assert ulysses.drawn()["image"] == own
    for rank, now in measured(ulysses).items():
        assert [now[kind] - held[rank][kind] for kind in ("files", "threads")] == [0, 0]


def test_crowds_change_nothing(ulysses: Served) -> None:
    """A small version of test_a_service_outlives_crowds_and_ends_as_it_says."""
    idle, half = SilentCrowd(ulysses, 100, b""), SilentCrowd(ulysses, 50, HALF)
    for body, status, reason in MIXED_KINDS:
        answer = ulysses.draw(**body)
        assert answer.status_code == status
        assert reason in answer.text
    assert idle.all_ended(READ_S + 10) and half.all_ended(1)


def test_a_full_queue_says_when_to_come_back(ulysses: Served) -> None:
    before = ulysses.statistics()["requests"]
    with ThreadPoolExecutor(6) as clients:
        waiting = [clients.submit(ulysses.draw, **SLOW, seed=i) for i in range(6)]
        answers = [future.result() for future in waiting]
    full = [answer for answer in answers if answer.status_code == 429]
    drawn = [answer for answer in answers if answer.status_code == 200]
    # One is drawn and two wait; the first may still have waited when the others came.
    assert len(drawn) in (2, 3)
    assert len(full) == 6 - len(drawn)
    for answer in full:
        assert int(answer.headers["retry-after"]) >= 1
        assert "no more than 2 may (--queue_size)" in answer.json()["detail"]
    after = ulysses.statistics()["requests"]
    assert after["full"] == before["full"] + len(full)
    assert after["done"] == before["done"] + len(drawn)


def test_metrics_are_what_statistics_say(ulysses: Served) -> None:
    ulysses.drawn()
    families = text_string_to_metric_families(ulysses.client.get("/metrics").text)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    said = ulysses.statistics()
    for outcome, count in said["requests"].items():
        assert found["fastcache_requests_total", outcome] == count
    assert said["requests"]["done"] == found["fastcache_generation_seconds_count",]
    assert found["fastcache_steps_total",] == said["steps"] >= STEPS
    assert found["fastcache_blocks_total", "skipped"] == said["blocks"]["skipped"] > 0
    for rank in ("0", "1"):
        assert found["fastcache_memory_bytes", rank] == said["memory_bytes"][rank] > 1 << 20
    assert found["fastcache_waiting_requests",] == found["fastcache_running_requests",] == 0


def test_idle_ranks_rest(ulysses: Served) -> None:
    ranks = ulysses.ranks()
    assert sorted(ranks) == [0, 1]
    time.sleep(0.5)
    before = {rank: cpu_seconds(process) for rank, process in ranks.items()}
    time.sleep(2)
    for rank, process in ranks.items():
        assert cpu_seconds(process) - before[rank] < 0.2, rank


def test_shutdown_draws_what_waits_and_everybody_leaves(ulysses: Served) -> None:
    health = ulysses.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert health.json()["parallel"]["ulysses"] == health.json()["ranks"] == 2
    silent = SilentCrowd(ulysses, 20, b""), SilentCrowd(ulysses, 20, HALF)
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(ulysses.draw, **SLOW, seed=i) for i in range(2)]
        while (said := ulysses.statistics())["running"] + said["waiting"] < 2:
            time.sleep(0.05)
        # A rank that is told, as torchrun tells all of them, passes it on to rank 0.
        os.kill(ulysses.ranks()[1], signal.SIGTERM)
        while (health := ulysses.client.get("/health")).status_code == 200:
            time.sleep(0.05)
        late = ulysses.draw()
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        assert (late.status_code, late.json()["detail"]) == (
            503,
            "the service is stopping (SIGTERM)",
        )
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert ulysses.wait() == 0
    assert ulysses.left() == [0, 1]
    assert all(crowd.all_ended(1) for crowd in silent)


@pytest.mark.chaos
def test_a_pipeline_serves_until_a_rank_is_killed(pipefusion: Served) -> None:
    """One world for all of it: pictures repeat, clients give up, a rank dies."""
    first = pipefusion.drawn()
    # xDiT would run fewer synchronous steps from then on; this service does not.
    pipefusion.drawn(num_inference_steps=2)
    pipefusion.drawn(height=160, width=96)
    assert pipefusion.drawn()["image"] == first["image"]
    beyond = pipefusion.draw(width=512)
    assert "up to 256" in beyond.json()["detail"]

    done = pipefusion.statistics()["requests"]["done"]
    # Four times the tokens, and as many steps as take about twice a client's patience.
    steps = min(100, int(STEPS * 2 * PATIENCE_S / (4 * first["seconds"])) + 1)
    slow = {"height": 256, "width": 256, "num_inference_steps": steps, "use_cache": False}
    with ThreadPoolExecutor(2) as clients:
        early = clients.submit(pipefusion.draw, **slow)
        while not pipefusion.statistics()["running"]:
            time.sleep(0.02)
        late = clients.submit(pipefusion.draw)
        for answer, why in ((early, "it is still being drawn"), (late, "its turn did not come")):
            assert answer.result().status_code == 504
            assert answer.result().json()["detail"] == f"no picture within {PATIENCE_S:g} s: {why}"
    while pipefusion.statistics()["running"]:
        time.sleep(0.05)
    after = pipefusion.statistics()["requests"]
    assert (after["done"], after["timed_out"]) == (done + 1, 2)
    assert pipefusion.drawn()["image"] == first["image"]

    answers: list[Any] = []
    client = threading.Thread(target=lambda: answers.append(pipefusion.draw(**slow)))
    client.start()
    while not pipefusion.statistics()["running"]:
        time.sleep(0.02)
    os.kill(pipefusion.ranks()[1], signal.SIGKILL)
    started = time.monotonic()
    client.join(30)
    (answer,) = answers
    assert answer.status_code == 503
    assert "the service ends: rank 1 ended the connection" in answer.json()["detail"]
    assert pipefusion.wait(60) != 0
    assert time.monotonic() - started < 30
    assert "rank 0: rank 1 ended the connection. The service ends." in pipefusion.output
