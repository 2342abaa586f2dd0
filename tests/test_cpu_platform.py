"""The CPU platform: patches and helpers in this process, real xfuser layouts in spawned ranks.

Two layers. Without ranks: the import hook, its errors and the kept sends. With marker ``gloo``:
every layout runs under torchrun, one world a layout, and is compared with one rank.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.worlds import launch, python

from xfuser_fastcache.consensus.errors import ConsensusTimeout
from xfuser_fastcache.xdit import cpu_platform
from xfuser_fastcache.xdit.compat import IncompatibleXfuserError
from xfuser_fastcache.xdit.gloo_waits import PendingSends, wait_limit

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120

needs_no_accelerator = pytest.mark.skipif(
    cpu_platform.has_accelerator(), reason="an accelerator is present: the platform stays off"
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, where no module of xfuser is loaded."""
    return python("-c", textwrap.dedent(code), timeout_s=TIMEOUT_S)


def run_layout(world_size: int, *arguments: str) -> list[dict[str, Any]]:
    """Run ``xdit_control.py`` under torchrun and return the lines of all ranks."""
    printed = launch("xdit_control.py", world_size, *arguments, timeout_s=TIMEOUT_S)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {line["rank"] for line in lines} == set(range(world_size))
    assert all(line["backend"] == "gloo" for line in lines)
    return lines


def outputs(lines: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The lines of ranks that hold latents, of the wanted model or warm-up steps."""
    matching = [line for line in lines if all(line[k] == v for k, v in wanted.items())]
    assert matching, f"no rank reported {wanted}"
    found = [line for line in matching if line["norm"] is not None]
    return sorted(found, key=lambda line: line["rank"])


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to float32 rounding: about seven digits, element by element and as a norm."""
    assert got["sample_norms"] == pytest.approx(expected["sample_norms"], rel=1e-6)
    assert got["values"] == pytest.approx(expected["values"], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Any]]:
    """Every model on one rank, in batches of two: what the layouts are compared with."""
    lines = run_layout(1, "--model", "flux", "sd3", "pixart", "--batch", "2", "--repeat", "2")
    assert all(line["repeats"] for line in lines)
    return {line["model"]: line for line in lines}


@needs_no_accelerator
@pytest.mark.gloo
@pytest.mark.parametrize("flag", ["--ulysses_degree", "--ring_degree"])
def test_flux_sequence_parallel_equals_one_rank(
    one_rank: dict[str, dict[str, Any]], flag: str
) -> None:
    lines = run_layout(2, "--model", "flux", "--batch", "2", flag, "2")
    (output,) = outputs(lines)
    assert output["rank"] == 1
    assert output["sha256"] != one_rank["flux"]["sha256"], "sharded attention rounds differently"
    assert_close(output, one_rank["flux"])


@needs_no_accelerator
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "ulysses"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_flux_pipefusion(
    one_rank: dict[str, dict[str, Any]], world_size: int, ulysses: int
) -> None:
    """Synchronous steps equal one rank; asynchronous patches differ, a little, and repeat."""
    layout = f"--pipefusion_parallel_degree 2 --ulysses_degree {ulysses} --num_pipeline_patch 2"
    steps = ["--warmup_steps", "3", "1", "--repeat", "3", "--prepare_run"]
    lines = run_layout(world_size, "--batch", "2", *layout.split(), *steps)
    expected = one_rank["flux"]

    (synchronous,) = outputs(lines, warmup_steps=3)
    assert_close(synchronous, expected)

    (asynchronous,) = outputs(lines, warmup_steps=1)
    difference = abs(asynchronous["norm"] / expected["norm"] - 1)
    assert 1e-6 < difference < 1e-3, "stale keys and values show from the fifth digit or so"
    assert all(line["repeats"] for line in lines), "generations repeat to the bit"


@needs_no_accelerator
@pytest.mark.gloo
def test_flux_data_parallel_splits_the_batch(one_rank: dict[str, dict[str, Any]]) -> None:
    lines = run_layout(2, "--model", "flux", "--batch", "2", "--data_parallel_degree", "2")
    replicas = outputs(lines)
    assert [replica["rank"] for replica in replicas] == [0, 1]
    norms = [norm for replica in replicas for norm in replica["sample_norms"]]
    assert norms == pytest.approx(one_rank["flux"]["sample_norms"], rel=1e-6)


@needs_no_accelerator
@pytest.mark.gloo
def test_cfg_parallel_equals_one_rank(one_rank: dict[str, dict[str, Any]]) -> None:
    lines = run_layout(2, "--model", "sd3", "pixart", "--batch", "2", "--use_cfg_parallel")
    for model in ("sd3", "pixart"):
        (output,) = outputs(lines, model=model)
        assert_close(output, one_rank[model])


@needs_no_accelerator
@pytest.mark.gloo
def test_finish_names_the_rank_that_does_not_arrive(tmp_path: Path) -> None:
    script = tmp_path / "absent.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            import torch.distributed as dist
            from xfuser_fastcache.xdit.cpu_platform import finish
            dist.init_process_group("gloo")
            if dist.get_rank() == 0:
                try:
                    finish(timeout_s=2)
                except TimeoutError as error:
                    print("REPORTED", error, flush=True)
            else:
                time.sleep(5)
            """
        )
    )
    printed = launch(script, 2, timeout_s=TIMEOUT_S)
    (report,) = [line for line in printed.splitlines() if line.startswith("REPORTED")]
    assert "within 2 s" in report
    assert "anks 1 failed" in report


@needs_no_accelerator
def test_import_changes_nothing_and_the_call_speaks_once() -> None:
    done = run_python(
        """
        import logging, sys
        import torch
        import xfuser_fastcache
        before = list(sys.meta_path)
        from xfuser_fastcache.xdit import cpu_platform
        assert sys.meta_path == before
        assert not any(name.split(".")[0] in ("xfuser", "yunchang") for name in sys.modules)

        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("xfuser_fastcache").addHandler(handler)
        assert cpu_platform.enable_cpu_platform() is True
        assert len(sys.meta_path) == len(before) + 1
        assert cpu_platform.enable_cpu_platform() is True
        assert len(sys.meta_path) == len(before) + 1
        assert "xfuser" not in sys.modules, "the call waits for the user's own import"
        import xfuser
        assert cpu_platform.enable_cpu_platform() is True
        assert len(said) == 1 and "CPU" in said[0], said
        """
    )
    assert done.returncode == 0, done.stderr


# What has to hold however xfuser came to be imported.
CHECK_PATCHED = """
from xfuser import envs
from xfuser.core.distributed import attention_backend, group_coordinator, parallel_state
from xfuser.model_executor.layers import attention_processor, usp
assert envs.get_torch_distributed_backend() == "gloo"
assert envs.get_device(0).type == "cpu" and envs.get_device_name() == "cpu"
for module in (group_coordinator, parallel_state, attention_processor):
    assert module.HAS_LONG_CTX_ATTN is True, module
assert usp.PROCESS_GROUP is not None
assert group_coordinator.synchronize() is None
flash = attention_backend.AttentionBackendType.SDPA_FLASH
assert attention_backend.ATTENTION_FUNCTION_REGISTRY[flash].__module__.startswith("xfuser_fast")
# Loaders keep their type, so that sources and tracebacks are still found.
assert "def USP" in usp.__loader__.get_source(usp.__name__)
"""


@needs_no_accelerator
@pytest.mark.skipif(torch.version.cuda is not None, reason="xfuser imports with a CUDA build")
def test_a_failed_import_of_xfuser_can_be_followed_by_one_that_works() -> None:
    done = run_python(
        """
import sys
try:
    import xfuser
except NotImplementedError:
    pass
else:
    raise SystemExit("xfuser imports here without help")
assert "xfuser.envs" in sys.modules, "nothing was left behind: the test shows nothing"
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
enable_cpu_platform()
"""
        + CHECK_PATCHED
    )
    assert done.returncode == 0, done.stderr


@needs_no_accelerator
def test_modules_that_are_loaded_already_are_patched_too() -> None:
    """As under a CUDA build of torch on a machine without a GPU, where xfuser does import."""
    done = run_python(
        """
import torch
import torch.distributed as dist
torch.version.cuda = "12.8"
from xfuser import envs
from xfuser.core.distributed import parallel_state
assert envs.get_device_name() == "cuda" and not parallel_state.HAS_LONG_CTX_ATTN
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
enable_cpu_platform()
"""
        + CHECK_PATCHED
    )
    assert done.returncode == 0, done.stderr


@needs_no_accelerator
def test_a_missing_attribute_is_named_when_its_module_loads() -> None:
    done = run_python(
        """
        from xfuser_fastcache.xdit import cpu_platform
        from xfuser_fastcache.xdit.compat import replace
        name = "xfuser.logger"
        cpu_platform.PATCHES[name] = lambda module: replace(module, "SomeClass.gone", None)
        cpu_platform.enable_cpu_platform()
        import xfuser
        """
    )
    assert done.returncode != 0
    assert "IncompatibleXfuserError: xfuser.logger.SomeClass.gone does not exist" in done.stderr
    assert 'pip install "xfuser==0.7.0"' in done.stderr


@pytest.mark.parametrize("name", sorted(cpu_platform.PATCHES))
def test_every_patch_refuses_a_module_without_its_attributes(name: str) -> None:
    with pytest.raises(IncompatibleXfuserError, match=rf"{name}\.\w+.* does not exist"):
        cpu_platform.PATCHES[name](types.ModuleType(name))


@pytest.mark.parametrize("version", ["0.6.3", "0.9.0", "1.0", "0.70.0"])
def test_unknown_version_is_an_error(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(cpu_platform, "has_accelerator", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    finders = list(sys.meta_path)
    with pytest.raises(IncompatibleXfuserError) as caught:
        cpu_platform.enable_cpu_platform()
    for part in (f"xfuser {version} ", "expected 0.7.x or 0.8.x", 'pip install "xfuser==0.7.0"'):
        assert part in str(caught.value)
    assert sys.meta_path == finders


def test_missing_xfuser_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cpu_platform, "has_accelerator", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(IncompatibleXfuserError, match="xfuser is not installed"):
        cpu_platform.enable_cpu_platform()


def test_an_accelerator_turns_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finders = list(sys.meta_path)
    with caplog.at_level(logging.DEBUG, logger="xfuser_fastcache"):
        assert cpu_platform.enable_cpu_platform() is False
    assert sys.meta_path == finders
    assert not caplog.records


def engine_config(ring_degree: int = 1, attention_backend: str | None = None) -> Any:
    runtime = types.SimpleNamespace(dtype=torch.float16, attention_backend=attention_backend)
    parallel = types.SimpleNamespace(ring_degree=ring_degree)
    return types.SimpleNamespace(runtime_config=runtime, parallel_config=parallel)


PIPELINE = types.SimpleNamespace(transformer=types.SimpleNamespace(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("ring_degree", "given", "chosen"),
    [(1, None, "SDPA"), (2, None, "SDPA_FLASH"), (1, "sdpa_math", "sdpa_math")],
)
def test_engine_config_is_prepared(
    monkeypatch: pytest.MonkeyPatch, ring_degree: int, given: str | None, chosen: str
) -> None:
    monkeypatch.setattr(cpu_platform, "has_accelerator", lambda: False)
    config = engine_config(ring_degree, given)
    assert cpu_platform.prepare_engine_config(config, PIPELINE) is config
    assert config.runtime_config.dtype is torch.bfloat16
    assert config.runtime_config.attention_backend == chosen


def test_engine_config_keeps_the_attention_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_platform, "has_accelerator", lambda: True)
    config = engine_config(attention_backend="FLASH")
    cpu_platform.prepare_engine_config(config, PIPELINE)
    assert config.runtime_config.attention_backend == "FLASH"
    assert config.runtime_config.dtype is torch.bfloat16


@pytest.mark.parametrize(("ring_degree", "given"), [(1, "FLASH"), (2, "SDPA")])
def test_engine_config_refuses_what_the_cpu_cannot_do(
    monkeypatch: pytest.MonkeyPatch, ring_degree: int, given: str
) -> None:
    monkeypatch.setattr(cpu_platform, "has_accelerator", lambda: False)
    with pytest.raises(ValueError, match=f"attention_backend='{given}'.*allowed: .*SDPA_FLASH"):
        cpu_platform.prepare_engine_config(engine_config(ring_degree, given), PIPELINE)


class FakeWork:
    """A send that completes when it is told to, and counts how often it is waited for."""

    def __init__(self, error: Exception | None = None):
        self.received = threading.Event()
        self.waits = 0
        self.error = error

    def wait(self) -> None:
        self.waits += 1
        self.received.wait()
        if self.error is not None:
            raise self.error


def test_sends_are_kept_until_received_and_then_let_go() -> None:
    sends = PendingSends()
    works = [FakeWork() for _ in range(3)]
    tensors = [torch.zeros(4) for _ in works]
    alive = [weakref.ref(tensor) for tensor in tensors]
    for work, tensor in zip(works, tensors, strict=True):
        sends.keep(work, tensor, 1)
    del tensors, tensor
    gc.collect()
    assert len(sends) == 3
    assert all(reference() is not None for reference in alive)
    with pytest.raises(TimeoutError, match="3 sends were not received within 0.05 s"):
        sends.drain(0.05)
    for work in works:
        work.received.set()
    sends.drain(5.0)
    gc.collect()
    assert len(sends) == 0
    assert [reference() for reference in alive] == [None, None, None]
    assert [work.waits for work in works] == [1, 1, 1]


def test_a_kept_send_can_be_waited_for_without_waiting_twice() -> None:
    sends = PendingSends()
    work = FakeWork()
    kept = sends.keep(work, torch.zeros(1), 1)
    work.received.set()
    assert kept.wait() and kept.wait()
    assert work.waits == 1


def test_a_message_that_no_one_takes_is_waited_for_no_longer_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wait_limit, "seconds", 0.2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    kept = PendingSends().keep(FakeWork(), torch.zeros(1), 3)
    started = time.monotonic()
    with pytest.raises(ConsensusTimeout, match="rank 0 waited .* taken by rank 3, .*_s=0.2 s"):
        kept.wait()
    assert time.monotonic() - started < 5


def test_a_failed_send_is_reported_to_all_who_ask() -> None:
    sends = PendingSends()
    work = FakeWork(RuntimeError("connection closed by peer"))
    kept = sends.keep(work, torch.zeros(1), 1)
    work.received.set()
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        kept.wait()
    with pytest.raises(RuntimeError, match="a send to a peer failed: connection closed"):
        sends.drain(5.0)
    with pytest.raises(RuntimeError, match="an earlier send to a peer failed"):
        sends.keep(FakeWork(), torch.zeros(1), 1)


def test_flash_attention_for_cpu_equals_plain_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 8, 16, generator=generator) for _ in range(3))
    mask = torch.zeros(8, 8)
    mask[:, 5:] = -float("inf")
    for attention_mask in (None, mask):
        output, log_sum_exp = cpu_platform._flash_attention_for_cpu(
            query, key, value, 0.0, False, {"attn_mask": attention_mask}
        )
        scores = query @ key.transpose(-1, -2) / 4.0
        scores = scores if attention_mask is None else scores + attention_mask
        torch.testing.assert_close(output, scores.softmax(-1) @ value)
        torch.testing.assert_close(log_sum_exp, scores.logsumexp(-1))


def test_generators_that_the_runner_asks_the_device_for_are_the_hosts() -> None:
    made = cpu_platform._HostTorch().Generator(device="cuda").manual_seed(1)
    assert made.device.type == "cpu" and made.initial_seed() == 1
