"""The page for people on the admin port, whose actions leave a line as those of the API do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sala_serve.api.admin.audit import NOT_FOUND, audited
from sala_serve.api.admin_page import AdminPage, GatewayActions

if TYPE_CHECKING:
    from starlette.routing import Route

    from sala_serve.api.admin_page.routes import Actions
    from sala_serve.api.admin_page.view import Overview
    from sala_serve.gateway import Gateway


class AuditedActions:
    """What the page can read and do; each action leaves a line."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    async def overview(self) -> Overview:
        """Look at everything."""
        return await self._actions.overview()

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key; False if there is none."""
        with audited("key.revoke", key_id) as entry:
            is_done = await self._actions.revoke_key(key_id)
            entry.outcome = entry.outcome if is_done else NOT_FOUND
        return is_done

    async def cancel_request(self, request_id: str) -> bool:
        """Cut a running request; False if there is none."""
        with audited("request.cancel", request_id) as entry:
            is_done = await self._actions.cancel_request(request_id)
            entry.outcome = entry.outcome if is_done else NOT_FOUND
        return is_done


def audited_page(gateway: Gateway) -> list[Route]:
    """Return the page's routes; the gateway's settings have an admin token."""
    token = gateway.settings.admin.token
    assert token is not None
    actions = AuditedActions(GatewayActions(gateway))
    return AdminPage(actions, token=token.get_secret_value()).routes()
