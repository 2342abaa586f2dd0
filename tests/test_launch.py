"""The launch scripts: what they refuse, and two hosts that meet.

tests/served.py starts its services by launch_single_node.sh, so that one is tested there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hosts import TwoHosts
from support.worlds import ROOT

CONFIG = str(ROOT / "configs" / "toy_flux_fast.yaml")
ENVIRONMENT = {
    **os.environ,
    "FASTCACHE_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
MULTI = ["generate", "--nproc_per_node", "1", "--nnodes", "2"]


def refused(script: str, *words: str) -> str:
    """Run a launcher that must refuse, and return what it says."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith(f"{script}: ")
    return done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to run first: generate or serve"),
        (["paint"], "'paint' is nothing to run; the first argument is generate or serve"),
        (["generate", "--nproc_per_node", "two"], "--nproc_per_node two: give a whole number"),
        (["generate", "--nproc_per_node=0"], "--nproc_per_node 0: give a whole number of at least"),
        (["generate", "--nproc_per_node"], "--nproc_per_node needs a value"),
        (["serve", "--nnodes", "2"], "--nnodes is for launch_multi_node.sh"),
    ],
)
def test_a_wrong_launch_on_one_machine_is_refused(words: list[str], message: str) -> None:
    assert message in refused("launch_single_node.sh", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "--nnodes is needed"),
        (["generate", "--nnodes", "1"], "--nnodes 1: give a whole number of at least 2"),
        (["generate", "--nnodes"], "--nnodes needs a value"),
        (MULTI, "--node_rank is needed"),
        ([*MULTI, "--node_rank=2"], "--node_rank 2: with --nnodes 2 give 0 to 1"),
        ([*MULTI, "--node_rank=1"], "--master_addr is needed"),
        (
            [*MULTI, "--node_rank=1", "--master_addr", "nowhere.invalid"],
            "--master_addr nowhere.invalid: no such host",
        ),
        (
            [*MULTI, "--node_rank=0", "--master_addr", "192.0.2.77"],
            "(192.0.2.77) is no address of this machine, but --node_rank is 0",
        ),
        (
            [*MULTI, "--node_rank=1", "--master_addr", "127.0.0.1", "--interface", "wire9"],
            "--interface wire9: no such interface; there are ",
        ),
        (
            [*MULTI, "--node_rank=1", "--master_addr", "127.0.0.1", "--master_port", "1"]
            + ["--join_timeout_s", "1"],
            "machine 0 does not answer at 127.0.0.1:1 after 1 s",
        ),
    ],
)
def test_a_wrong_launch_on_several_machines_is_refused(words: list[str], message: str) -> None:
    assert message in refused("launch_multi_node.sh", *words)


def start(hosts: TwoHosts, host: int, script: str, output: Path, *flags: str) -> subprocess.Popen:
    """Start the launcher on one of two hosts, with output to a file."""
    command = [
        *hosts.enter(host), "bash", str(ROOT / "scripts" / "launch_multi_node.sh"), script,
        "--nnodes", "2", "--node_rank", str(host), "--master_addr", hosts.address,
        "--master_port", hosts.port, "--nproc_per_node", "1", "--join_timeout_s", "120",
        "--config", CONFIG, "--ulysses_degree", "2", *flags,
    ]  # fmt: skip
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.endswith("_SOCKET_IFNAME")}
    with output.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )


def await_line(output: Path, pattern: str, process: subprocess.Popen) -> re.Match[str]:
    until = time.monotonic() + 180
    while time.monotonic() < until:
        found = re.search(pattern, output.read_text())
        if found:
            return found
        assert process.poll() is None, output.read_text()[-4000:]
        time.sleep(0.1)
    raise AssertionError(output.read_text()[-4000:])


@pytest.mark.gloo
@pytest.mark.slow
def test_two_hosts_serve_together(tmp_path: Path, record_property: pytest.FixtureRequest) -> None:
    """A rank on each host: a picture over HTTP, then rank 0 is told to stop and both leave."""
    logs = [tmp_path / f"host{host}.log" for host in (0, 1)]
    with TwoHosts() as hosts:
        record_property("hosts", hosts.kind)
        print(f"ran on two hosts as: {hosts.kind}")
        # The second comes first and waits.
        others = start(hosts, 1, "serve", logs[1])
        launchers = [start(hosts, 0, "serve", logs[0], "--port", "0"), others]
        try:
            _, url, leader = await_line(
                logs[0], r"serving (\S+) on (http://\S+) with 2 rank.* kill (\d+)", launchers[0]
            ).groups()
            for host, log in enumerate(logs):
                await_line(log, f"machine {host} of 2, 1 rank", launchers[host])
            ask = (
                "import json, sys, urllib.request as web; print(web.urlopen(web.Request("
                f"'{url}/generate', b'{{\"prompt\": \"a large red ring\"}}', "
                "{'Content-Type': 'application/json'}), timeout=120).read().decode())"
            )
            answer = subprocess.run(
                [*hosts.enter(0), sys.executable, "-c", ask],
                capture_output=True, text=True, timeout=150,
            )  # fmt: skip
            assert answer.returncode == 0, (answer.stderr, logs[0].read_text()[-3000:])
            assert json.loads(answer.stdout)["statistics"]["block_approx_ratio"] == pytest.approx(
                18 / 28
            )
            os.kill(int(leader), signal.SIGTERM)
            assert [launcher.wait(60) for launcher in launchers] == [0, 0]
            for host, log in enumerate(logs):
                assert f"rank {host} has left" in log.read_text()
        finally:
            for launcher in launchers:
                if launcher.poll() is None:
                    launcher.terminate()
                    launcher.wait(60)


@pytest.mark.gloo
@pytest.mark.slow
def test_two_hosts_draw_together(tmp_path: Path) -> None:
    """scripts/generate.py on two hosts, decisions alike, pictures as with two ranks of one."""
    logs = [tmp_path / f"host{host}.log" for host in (0, 1)]
    with TwoHosts() as hosts:
        print(f"ran on two hosts as: {hosts.kind}")
        flags = ("--baseline", "--output_dir", str(tmp_path))
        launchers = [start(hosts, host, "generate", logs[host], *flags) for host in (0, 1)]
        assert [launcher.wait(280) for launcher in launchers] == [0, 0], logs[0].read_text()[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 2
    assert len(set(report["decisions_digest"].values())) == 1
    assert report["psnr_db"] >= 40
    print(logs[0].read_text()[-3000:])
