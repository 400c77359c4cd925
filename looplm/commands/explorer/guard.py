"""Who may talk to a local server: only the page that it served itself, in requests of a bounded size.

Knows ASGI; nothing of models. A page of another site that the same browser has open can send requests to this machine,
and, where it points a name of its own at 127.0.0.1 (DNS rebinding), read the answers: its Host and Origin give it away.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MOST_BYTES", "Guard"]

MOST_BYTES = 16 * 1024
"""Largest body of a request."""

_HEADERS = {
    # No script, style or address but this server's own (the icon is an empty one); no frame around the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    r"""Wraps an application: refuses strangers with 403 and large bodies with 413, and adds the security headers.

    Args:
        app: The application.
        port: Where it listens; with 127.0.0.1 and localhost that makes its own names.

    Example:
        >>> import asyncio
        >>> async def send(message):
        ...     print(message.get("status", message.get("body")))
        >>> stranger = {"type": "http", "method": "GET", "headers": [(b"host", b"elsewhere.example")]}
        >>> asyncio.run(Guard(app=None, port=8000)(stranger, None, send))
        403
        b'{"error":"the Host of a request must be this server\'s own."}'
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if port == 80:
            self._hosts |= {"127.0.0.1", "localhost"}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            # Nothing here speaks WebSocket; the server's own start and stop go through.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["method"])
        if refusal is not None:
            await JSONResponse({"error": refusal}, status_code=403)(scope, receive, send_guarded)
            return
        body = await _body(receive)
        if body is None:
            error = {"error": f"a request must have at most {MOST_BYTES:,} bytes."}
            await JSONResponse(error, status_code=413, headers={"Connection": "close"})(scope, receive, send_guarded)
            return
        rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, replay, send_guarded)

    def _refusal(self, headers: Headers, method: str) -> str | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return "the Host of a request must be this server's own."
        if any(origin.lower() not in self._origins for origin in origins):
            return "the Origin of a request must be this server's own."
        # Browsers say it where they send no Origin, as with pictures and scripts. A link may lead here.
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not is_link:
            return "a request must come from this server's own page."
        return None


async def _body(receive: Receive) -> bytes | None:
    """Return the body; None as soon as it is too large, whatever its Content-Length says."""
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return body
