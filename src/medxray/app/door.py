"""Who is answered: this machine alone, or who gives the password."""

import base64
import binascii
import hmac

from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from medxray.loopback import is_loopback


class Door:
    """Refuses who may not come in.

    Args:
        app: the room.
        token: the password; None answers requests to this machine's own address only.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            if self.token is None and not is_loopback(headers.get("host", "")):
                await PlainTextResponse("without a token only this machine is answered", 403)(scope, receive, send)
                return
            given = _password(headers.get("authorization", ""))
            if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
                asked = {"WWW-Authenticate": 'Basic realm="medxray"'}
                await PlainTextResponse("expected the token as password, by any name", 401, asked)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _password(header: str) -> bytes:
    scheme, _, given = header.partition(" ")
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2] if scheme.lower() == "basic" else b""
    except binascii.Error:
        return b""
