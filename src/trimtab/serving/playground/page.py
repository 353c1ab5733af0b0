"""Serves the playground: the page at `/`, its few files under `/playground/`.

The files are read once and answered from memory, with an ETag and `no-cache`: a browser asks again at every
visit and gets 304 unless trimtab was upgraded. The content security policy lets the page load from and talk
to its own server only, and forbids the browser's ways of turning text into markup.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from functools import cache

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
PAGE = "index.html"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: its bytes, its media type and the tag a browser recognises it by."""

    body: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """The page's files by name."""
    found = {}
    for file in importlib.resources.files("trimtab.serving.playground").iterdir():
        media_type = TYPES.get(file.name[file.name.rfind(".") :])
        if media_type is not None:
            body = file.read_bytes()
            found[file.name] = Asset(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:20]}"')
    return found


# Left out of the OpenAPI schema, which tells of the API.
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
def page(request: Request) -> Response:
    """The page."""
    return _answer(request, assets()[PAGE])


@router.api_route("/playground", methods=["GET", "HEAD"])
@router.api_route("/playground/", methods=["GET", "HEAD"])
def elsewhere(request: Request) -> Response:
    """The page is at `/`. The address is relative, for a server behind a proxy under a prefix."""
    return RedirectResponse("../" if request.url.path.endswith("/") else "./")


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
def asset(request: Request, name: str) -> Response:
    """One of the page's files, or 404."""
    found = assets().get(name)
    if found is None or name == PAGE:
        raise HTTPException(404, f"the playground has no file {name!r}")
    return _answer(request, found)


def _answer(request: Request, found: Asset) -> Response:
    headers = HEADERS | {"ETag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)
