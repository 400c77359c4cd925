"""The web application: one page, its two files, and two answers in JSON. Knows the session by its two methods."""

from __future__ import annotations

import json
import logging
import threading
from importlib.resources import files
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from looplm.commands.explorer.guard import Guard

__all__ = ["build_app"]

_FILES = {
    "/": ("commands.explorer", "page.html", "text/html"),
    "/page.js": ("commands.explorer", "page.js", "text/javascript"),
    "/charts.js": ("commands.explorer", "charts.js", "text/javascript"),
    "/explorer.css": ("commands.explorer", "explorer.css", "text/css"),
    "/page.css": ("commands", "page.css", "text/css"),
}
_LOG = logging.getLogger(__name__)


class _Answering(Protocol):
    """What the application asks of a :class:`~looplm.commands.explorer.session.Session`."""

    def describe(self) -> dict[str, Any]:
        """Return what the page says of the model."""
        ...

    def answer(self, request: Any) -> dict[str, Any]:
        """Return what it says of a problem.

        Raises:
            ValueError: If the request is the user's to mend.
        """
        ...


def build_app(session: _Answering, port: int) -> Starlette:
    """Return the application that answers the page's requests, one computation at a time.

    Args:
        session: What computes.
        port: Where it will listen.

    Example:
        >>> from types import SimpleNamespace
        >>> session = SimpleNamespace(describe=lambda: {"name": "sums"}, answer=lambda request: {"text": "46"})
        >>> sorted(route.path for route in build_app(session, port=8000).routes)
        ['/', '/api/answer', '/api/model', '/charts.js', '/explorer.css', '/page.css', '/page.js']
    """
    busy = threading.Lock()

    async def describe(request: Request) -> Response:
        return JSONResponse(session.describe())

    async def answer(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # What a form of another page could send without asking the browser first.
            return _error(415, "a request must be JSON.")
        try:
            content = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _error(400, "a request must be JSON.")
        if not busy.acquire(blocking=False):
            return _error(503, "another problem is being computed; try again when it is done.")
        try:
            return JSONResponse(await run_in_threadpool(session.answer, content))
        except ValueError as error:
            return _error(400, " ".join(str(error).split()))
        except Exception as error:
            # The page gets a line, the terminal the whole.
            _LOG.exception("the computation failed")
            return _error(500, f"the computation failed ({type(error).__name__}); the terminal says more.")
        finally:
            busy.release()

    routes = [Route(path, _file(*place), methods=["GET"]) for path, place in _FILES.items()]
    routes += [Route("/api/model", describe, methods=["GET"]), Route("/api/answer", answer, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, port=port)])


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _file(package: str, name: str, media_type: str) -> Any:
    content = files(f"looplm.{package}").joinpath(name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return serve
