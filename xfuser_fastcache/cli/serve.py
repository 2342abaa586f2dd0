"""Serve pictures or clips over HTTP, with a step cache, on as many ranks as torchrun starts.

    torchrun --nproc_per_node 2 -m xfuser_fastcache.cli serve \\
        --config configs/toy_flux_fast.yaml --ulysses_degree 2 --port 8000
    curl -s localhost:8000/generate -H 'Accept: image/png' -o ring.png -d \\
        '{"prompt": "a large red ring, top left, on dark blue"}' -H 'Content-Type: application/json'

Takes the flags of `fastcache generate` that say what is run and how; docs/serving.md has the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time

import torch.distributed as dist

from xfuser_fastcache.cli.generate import cache_config, parser, read_flags
from xfuser_fastcache.serving.desk import Desk
from xfuser_fastcache.serving.drawing import Painter
from xfuser_fastcache.serving.heads import LOOPBACK
from xfuser_fastcache.serving.joining import connect
from xfuser_fastcache.serving.line import Line, RankMissing, StopSign
from xfuser_fastcache.serving.service import Service, follow
from xfuser_fastcache.serving.web import WebServer, listen, make_app
from xfuser_fastcache.xdit.loaded import finish, load_in_layout, start

logger = logging.getLogger("xfuser_fastcache")

_LEAVE_S = 10.0


def flags() -> argparse.ArgumentParser:
    """Return a parser for the flags of `fastcache generate` and those of the service."""
    known = parser("serve", __doc__.splitlines()[0])
    ours = known.add_argument_group("Service")
    ours.add_argument("--host", default="127.0.0.1", help="address to listen on")
    ours.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    ours.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names without port that it answers to, beside those of loopback",
    )
    ours.add_argument("--queue_size", type=int, default=16, help="most requests that wait")
    ours.add_argument("--max_side", type=int, default=2048, help="of a picture, in pixels")
    ours.add_argument("--max_steps", type=int, default=100, help="of a generation")
    ours.add_argument("--max_prompt_length", type=int, default=2000, help="in characters")
    for name, default, text in (
        ("request", 300.0, "longest wait of a client"),
        ("read", 10.0, "longest that a request may take to arrive"),
        ("generation", 600.0, "a picture that takes longer ends the service"),
        ("peer", 30.0, "a rank silent for longer ends the service"),
        ("drain", 15.0, "how long waiting requests are still begun at the end"),
    ):
        flag = f"--{name}_timeout_s"
        ours.add_argument(flag, type=float, metavar="SECONDS", default=default, help=text)
    return known


def options_from(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line over the config file it names.

    Raises:
        ValueError: the file does not parse, or holds a key that is no flag.
        SystemExit: a wrong flag, or one that a service cannot serve.
    """
    known = flags()
    options = read_flags(known, arguments)
    if options.data_parallel_degree > 1:
        known.error(
            f"--data_parallel_degree {options.data_parallel_degree}: a service draws one picture "
            "at a time; start a service for each replica, on ports of their own"
        )
    positive = ("queue_size", "max_side", "max_steps", "max_prompt_length")
    timeouts = [name for name in vars(options) if name.endswith("_timeout_s")]
    for name in (*positive, *timeouts):
        if getattr(options, name) <= 0:
            known.error(f"--{name} {getattr(options, name)}: give more than 0")
    return options


def lead(painter: Painter, line: Line, service: Service, web: WebServer, model: str) -> None:
    """Serve on rank 0 until told to stop."""
    ranks = dist.get_world_size()
    say(f"serving {model} on {web.address} with {ranks} rank(s); end it with: kill {os.getpid()}")
    service.run(line)
    say("the queue is empty, and the ranks leave")
    web.close()
    line.send({"leave": True})
    line.close()


def web_of(
    painter: Painter, service: Service, door: socket.socket, options: argparse.Namespace
) -> WebServer:
    """Start to answer HTTP."""
    about = {
        "model": options.model,
        "ranks": dist.get_world_size(),
        "parallel": {
            "ulysses": options.ulysses_degree,
            "ring": options.ring_degree,
            "pipefusion": options.pipefusion_parallel_degree,
            "cfg": 2 if options.use_cfg_parallel else 1,
        },
        "use_cache": painter.config.use_cache if painter.config else None,
    }
    limits, own = painter.limits(), painter.config
    desk = Desk(service, limits, vars(options), own, options.request_timeout_s)
    names = {*LOOPBACK, *(name.lower() for name in options.allowed_hosts)}
    app = make_app(desk, about, names)
    return WebServer(app, door, options.read_timeout_s)


def say(text: str) -> None:
    """Print a line in one write, so that ranks do not mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Serve on all ranks; return the exit status."""
    began = time.monotonic()
    start()
    options = options_from(arguments)
    config = cache_config(options)
    leads = os.environ["RANK"] == "0"
    # A wrong address is refused before the model is loaded.
    door = listen(options.host, options.port) if leads else None
    painter = Painter(load_in_layout(options, options.dtype), options, config)
    rank = dist.get_rank()
    stop = StopSign()
    service = Service(
        painter,
        stop,
        queue_size=options.queue_size,
        generation_timeout_s=options.generation_timeout_s,
        drain_timeout_s=options.drain_timeout_s,
    )

    def end(reason: str) -> None:
        if leads:
            service.break_down(reason)
        logger.error("rank %d: %s. This rank ends.", rank, reason)
        os._exit(1)

    try:
        line = connect(options.peer_timeout_s, end, stop)
    except RankMissing as error:
        end(str(error))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda given, _: stop.set(signal.Signals(given).name))
    if door is not None:
        service.try_out(line, "the first trial")
        service.start_s = time.monotonic() - began
        lead(painter, line, service, web_of(painter, service, door, options), options.model)
    else:
        follow(line, painter)
    try:
        finish(_LEAVE_S)
    except TimeoutError as error:
        end(str(error))
    say(f"rank {rank} has left")
    return 0
