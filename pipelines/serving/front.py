"""What stands before the routes of `tide serve`: who may ask, the line that a request leaves in the
log, errors as OpenAI's clients read them, and the page.
"""

import base64
import hashlib
import logging
import re
import time
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.engine import ServeConfig
from pipelines.serving.protocol import ApiError

logger = logging.getLogger(__name__)
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


def explain(request: Request, error: Exception) -> Response:
    """Any error as OpenAI's clients read it."""
    headers = getattr(error, "headers", None)  # of 405: what is allowed
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, what)
    elif not isinstance(error, ApiError):
        gone = isinstance(error, ClientDisconnect)
        error = ApiError(499 if gone else 500, f"{type(error).__name__}: {error}")
    headers = {"retry-after": "1"} if error.status == 503 else headers
    return JSONResponse(error.body, error.status, headers)


def door(app: ASGIApp, config: ServeConfig) -> ASGIApp:
    """Answers a local server's own names alone, and no page of a site that was not let in; logs."""

    async def enter(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        request, inside, began, status = Request(scope), app, time.monotonic(), 500
        name = re.sub(r":\d*$", "", request.headers.get("host", ""))
        origin, kind = (request.headers.get(name, "") for name in ("origin", "content-type"))
        known = re.match(r"(?i)\s*application/json\s*(;|$)", kind)  # browsers ask before it
        if config.local and name and name.lower() not in _LOCAL:
            what = f"this server is {', '.join(_LOCAL)}, and not {name!r}; a proxy can set Host: "
            what += "localhost, and --host 0.0.0.0 opens the server to other machines"
            inside = explain(request, ApiError(400, what, "invalid_host"))
        elif scope["method"] == "POST" and origin and not (known or {origin, "*"} & {*config.cors}):
            what = f"a page of {origin!r:.80} sent {kind!r:.80}: pages send application/json, and "
            what += "those of other origins are allowed by --cors"
            inside = explain(request, ApiError(403, what, "invalid_origin"))

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await inside(scope, receive, noting)
        finally:
            if config.log and scope["path"] != "/health":
                who = request.client.host if request.client else "-"
                what = f"{who} {request.method} {scope['raw_path'].decode('latin-1')} {status}: "
                if reply := getattr(request.state, "reply", None):
                    what += "{prompt_tokens} + {completion_tokens} tokens, ".format(**reply.usage())
                logger.info("%s%.2f s", what, time.monotonic() - began)

    return enter


def page() -> Route:
    """`/`: one file, which loads nothing, speaks to this server alone, and runs its own script."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for kind in ("script", "style"):
        own = html.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    headers = {"content-security-policy": policy, "cache-control": "no-cache"}
    return Route("/", lambda _: HTMLResponse(html, headers=headers))
