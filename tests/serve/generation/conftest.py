"""A tenant of the tests: its key, and what it is charged."""

import asyncio

import pytest

from sala_serve.tenants.model import Limits, Scopes


@pytest.fixture
def create_key():
    """A function that makes a tenant and a key of it."""
    return _create_key


@pytest.fixture
def used():
    """A function that tells what a tenant is charged and what it holds."""
    return _used


@pytest.fixture
def charged():
    """A function that waits until a tenant holds nothing and tells what it is charged."""
    return _charged


async def _create_key(stack, tenant_id="acme", tier="default", limits=None, **scopes):
    """Make a tenant and a key of it; returns both as the headers of a request need it."""
    store = stack.gateway.keys.store
    limits = Limits(**(limits or {}))
    tenant = await store.create_tenant(
        name=tenant_id, tier=tier, limits=limits, tenant_id=tenant_id
    )
    _, token = await store.create_key(tenant_id, name="k", scopes=Scopes(**scopes))
    return tenant, {"Authorization": f"Bearer {token}"}


async def _used(stack, tenant):
    """Return the tokens charged, or held as a charge, and those in flight."""
    found = await stack.gateway.limiter.used(tenant)
    return found.day, found.flight


async def _charged(stack, tenant):
    """Return the tokens charged once nothing is held; a client is let go before the books are closed."""
    async with asyncio.timeout(20):
        while (found := await _used(stack, tenant))[1] != 0:  # noqa: ASYNC110 - in the store
            await asyncio.sleep(0.02)
    return found[0]
