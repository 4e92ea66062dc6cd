"""The admin page: what the gateway is doing, for people; plain HTML, no build step, nothing from elsewhere."""

from sala_serve.api.admin_page.overview import GatewayActions, admin_page_routes
from sala_serve.api.admin_page.routes import AdminPage

__all__ = ["AdminPage", "GatewayActions", "admin_page_routes"]
