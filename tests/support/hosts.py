"""Two hosts on one machine, for the launchers' tests: network namespaces joined by a wire.

Where they are not to be had (no root, no iproute2), both hosts are this machine's loopback: two
launchers still meet, but over an address that they share.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from types import TracebackType

_ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoHosts:
    """Context in which `enter(host)` precedes a command that runs on host 0 or 1.

    Attributes:
        kind: "network namespaces" or "loopback".
        address: of host 0.
        port: one that is free there.
    """

    def __init__(self) -> None:
        self.kind, self.address = "loopback", "127.0.0.1"
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = str(door.getsockname()[1])
        self._keepers: list[subprocess.Popen[bytes]] = []

    def enter(self, host: int) -> list[str]:
        """Return the words that take a command to a host."""
        return ["nsenter", "-t", str(self._keepers[host].pid), "-n"] if self._keepers else []

    def __enter__(self) -> TwoHosts:
        tools = all(shutil.which(name) for name in ("unshare", "nsenter", "ip"))
        if tools and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
            # A namespace lives as long as a process in it.
            self._keepers = [
                subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 900"], stdout=-1)
                for _ in _ADDRESSES
            ]
            for keeper in self._keepers:
                assert keeper.stdout is not None
                keeper.stdout.readline()  # it is in its namespace now
            try:
                self._wire()
            except subprocess.CalledProcessError:
                self.__exit__(None, None, None)
            else:
                self.kind, self.address = "network namespaces", _ADDRESSES[0]
        return self

    def _wire(self) -> None:
        def ip(*words: str, host: int | None = None) -> None:
            entered = [] if host is None else self.enter(host)
            subprocess.run([*entered, "ip", *words], check=True, capture_output=True)

        ends = [f"fc{keeper.pid}" for keeper in self._keepers]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, keeper in enumerate(self._keepers):
            ip("link", "set", ends[host], "netns", str(keeper.pid))
            ip("addr", "add", f"{_ADDRESSES[host]}/24", "dev", ends[host], host=host)
            for name in ("lo", ends[host]):
                ip("link", "set", name, "up", host=host)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for keeper in self._keepers:
            keeper.kill()
            keeper.wait()
        self._keepers = []
