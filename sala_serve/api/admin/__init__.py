"""The admin port: tenants, keys and running requests for programs, and a page for people."""

from sala_serve.api.admin.app import build_admin_app

__all__ = ["build_admin_app"]
