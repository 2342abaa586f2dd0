"""Which HTTP requests reach the service at all: told by their heads, before a body is read.

A page in a browser on the same machine can reach a service on loopback. By its `Host` a request
shows by which name it was asked for, which stops names that were pointed here (DNS rebinding); by
`Origin` and `Sec-Fetch-Site` a browser says which page sent it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from xfuser_fastcache.serving.refusals import Declined, refused

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OWN_PAGES = ("same-origin", "none")


class Refusal(NamedTuple):
    """Why a request goes no further."""

    status: int
    reason: str


def refusal_of(
    method: str, headers: Mapping[str, str], hosts: Collection[str], max_bytes: int
) -> Refusal | None:
    """Return why a request is refused, or None.

    Args:
        method: of the request.
        headers: of the request, by names in small letters.
        hosts: names that the service answers to, without port.
        max_bytes: most that a body may have.

    Example:
        >>> refusal_of("GET", {"host": "evil.example:80"}, LOOPBACK, 10).status
        421
    """
    host = headers.get("host", "")
    if _name_of(host) not in hosts:
        return Refusal(
            421,
            f"this service does not answer to the host {host!r:.80}; it answers to "
            f"{', '.join(sorted(hosts))}. Whoever runs it adds names with --allowed_hosts",
        )
    if method != "POST":
        return None
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if site not in _OWN_PAGES or (origin is not None and _netloc(origin) != host.lower()):
        return Refusal(
            403,
            f"pages of other sites may not post here (Origin {origin!r:.80}, Sec-Fetch-Site "
            f"{site!r:.20}); send the request without a browser",
        )
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        return Refusal(
            415, f"Content-Type {kind!r:.80} is not allowed; give application/json and such a body"
        )
    size = headers.get("content-length", "")
    if not (size.isascii() and size.isdecimal() and len(size) < 20 and int(size) <= max_bytes):
        return Refusal(413, f"a body must say its length, of at most {max_bytes} bytes")
    return None


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class HeadCheck:
    """ASGI middleware that answers what `refusal_of` refuses.

    Args:
        app: takes the rest.
        hosts, max_bytes: as of `refusal_of`.
        on_refusal: called for each request that is refused.
    """

    def __init__(
        self, app: Any, hosts: Collection[str], max_bytes: int, on_refusal: Callable[[], None]
    ):
        self.app = app
        self.hosts = hosts
        self.max_bytes = max_bytes
        self.on_refusal = on_refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a refused request, and hand on another."""
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
            refusal = refusal_of(scope["method"], headers, self.hosts, self.max_bytes)
            if refusal is not None:
                self.on_refusal()
                answer = refused(scope["path"], Declined(*refusal))
                return await answer(scope, receive, send)
        await self.app(scope, receive, send)
