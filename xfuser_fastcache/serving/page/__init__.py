"""The page on `/`: a form in front of POST /generate, for people."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

_FILES = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
# Nothing from elsewhere runs in it, and no other page frames it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_door() -> APIRouter:
    """Return the routes of the page's three files."""
    door = APIRouter()
    for path, (name, kind) in _FILES.items():
        text = files(__name__).joinpath(name).read_text(encoding="utf-8")
        answer = Response(text, media_type=kind, headers=_HEADERS)
        door.add_api_route(f"/{path}", lambda answer=answer: answer, response_class=Response)
    return door
