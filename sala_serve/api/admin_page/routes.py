"""The admin page's paths: log in, look, revoke a key, cancel a request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs

import jinja2
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from sala_serve.api.admin_page.session import COOKIE, SESSION_S, Session, Sessions
from sala_serve.errors import StateUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from sala_serve.api.admin_page.view import Overview

MAX_FORM_BYTES = 16 * 1024
_FOLDER = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
DONE = {
    "revoked": "The key is revoked.",
    "cancelled": "The request is cancelled.",
    "gone": "It is not there any more.",
    "unavailable": "The shared state does not answer; nothing was done.",
}
"""What the page says after an action."""


class Actions(Protocol):
    """What the page can read and do."""

    async def overview(self) -> Overview:
        """Look at everything."""

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key; False if there is none."""

    async def cancel_request(self, request_id: str) -> bool:
        """Cut a running request; False if there is none."""


class AdminPage:
    """Serves the page; :meth:`routes` go onto the admin port."""

    def __init__(
        self, actions: Actions, *, token: str, unix_clock: Callable[[], float] = time.time
    ) -> None:
        self._actions = actions
        self._sessions = Sessions(token, unix_clock=unix_clock)
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_FOLDER),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"tokens": _tokens, "seconds": _seconds}

    def routes(self) -> list[Route]:
        """Return the page's routes; they check the cookie themselves."""
        return [
            Route("/", self._show, methods=["GET"]),
            Route("/login", self._show_login, methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/logout", self._action(self._log_out), methods=["POST"]),
            Route("/actions/revoke-key", self._action(self._revoke), methods=["POST"]),
            Route("/actions/cancel-request", self._action(self._cancel), methods=["POST"]),
            Route("/admin.css", _file("admin.css", "text/css"), methods=["GET"]),
            Route("/admin.js", _file("admin.js", "text/javascript"), methods=["GET"]),
        ]

    async def _show(self, request: Request) -> Response:
        session = self._sessions.of(request.cookies.get(COOKIE))
        if session is None:
            return _redirect("/login")
        return self._page(
            "overview.html.jinja",
            overview=await self._actions.overview(),
            csrf_token=session.csrf_token,
            message=DONE.get(request.query_params.get("done", "")),
        )

    async def _show_login(self, _request: Request) -> Response:
        return self._page("login.html.jinja", is_wrong=False)

    async def _log_in(self, request: Request) -> Response:
        form = await _form(request)
        session = None if form is None else self._sessions.log_in(form.get("token", ""))
        if session is None:
            return self._page("login.html.jinja", status=403, is_wrong=True)
        response = _redirect("/")
        response.set_cookie(
            COOKIE,
            session.cookie,
            max_age=SESSION_S,
            httponly=True,
            samesite="strict",
            # behind TLS only there; on localhost browsers would drop it
            secure=request.url.scheme == "https",
        )
        return response

    def _action(
        self, act: Callable[[dict[str, str]], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Let only forms of a session of ours reach ``act``."""

        async def check(request: Request) -> Response:
            session = self._sessions.of(request.cookies.get(COOKIE))
            if session is None:
                return _redirect("/login")
            form = await _form(request)
            if form is None or not self._is_from(session, form):
                return Response("The form is not from this page.", 403, _HEADERS)
            return await act(form)

        return check

    def _is_from(self, session: Session, form: dict[str, str]) -> bool:
        return self._sessions.is_csrf_token(session, form.get("csrf_token", ""))

    async def _log_out(self, _form: dict[str, str]) -> Response:
        response = _redirect("/login")
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    async def _revoke(self, form: dict[str, str]) -> Response:
        try:
            is_done = await self._actions.revoke_key(form.get("key_id", ""))
        except StateUnavailable:
            return _redirect("/?done=unavailable")
        return _redirect("/?done=revoked" if is_done else "/?done=gone")

    async def _cancel(self, form: dict[str, str]) -> Response:
        is_done = await self._actions.cancel_request(form.get("request_id", ""))
        return _redirect("/?done=cancelled" if is_done else "/?done=gone")

    def _page(self, template: str, *, status: int = 200, **values: object) -> Response:
        html = self._templates.get_template(template).render(values)
        return HTMLResponse(html, status, _HEADERS)


def _redirect(path: str) -> Response:
    return RedirectResponse(path, 303, _HEADERS)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_FOLDER / name).read_bytes()

    async def send(_request: Request) -> Response:
        headers = {**_HEADERS, "Cache-Control": "max-age=300"}
        return Response(content, headers=headers, media_type=kind)

    return send


async def _form(request: Request) -> dict[str, str] | None:
    """Return the fields of a small form, ``None`` if it is none."""
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_FORM_BYTES:
            return None
    try:
        fields = parse_qs(raw.decode(), strict_parsing=True, max_num_fields=8)
    except ValueError:
        return None
    return {name: values[-1] for name, values in fields.items()}


def _tokens(number: float | None) -> str:
    """Return a number of tokens as people read it: 1,048,576."""
    return "–" if number is None else f"{number:,.0f}"


def _seconds(seconds: float | None) -> str:
    """Return a duration as people read it: 41 s, 12 min, 3.5 h."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
