import asyncio
import hashlib
import hmac
import json
import logging
import time

import pytest
from pydantic import SecretStr

from sala_serve.errors import (
    Conflict,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StateUnavailable,
)
from sala_serve.state import State, StateSettings
from sala_serve.tenants import store as store_module
from sala_serve.tenants.keys import KeyRing
from sala_serve.tenants.model import Limits, Principal, Scopes, Tenant, check_scopes
from sala_serve.tenants.secret import ServerSecret
from sala_serve.tenants.settings import TenantsSettings, TierSection

SECRET = ServerSecret(b"a server secret of the tests")


class Clock:
    """Monotonic and Unix seconds at once; stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1_795_608_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def make_ring(state, clock, *, secret=SECRET, static_keys=(), has_admin=True, **settings):
    return KeyRing(
        state,
        TenantsSettings(**settings),
        secret=secret,
        static_keys=static_keys,
        has_admin=has_admin,
        clock=clock,
        unix_clock=clock,
    )


@pytest.fixture
def ring(state, clock):
    return make_ring(state, clock)


async def make_tenant(ring, tenant_id="acme", **fields):
    fields = {"name": "Acme", "tier": "default", "limits": Limits(requests_per_min=5), **fields}
    return await ring.store.create_tenant(tenant_id=tenant_id, **fields)


async def make_key(ring, tenant_id="acme", scopes=None, **fields):
    return await ring.store.create_key(tenant_id, name="a key", scopes=scopes or Scopes(), **fields)


async def is_accepted(ring, token):
    try:
        await ring.authenticate(token)
    except InvalidApiKey:
        return False
    return True


async def test_key_names_its_tenant_and_scopes(ring):
    tenant = await make_tenant(ring)
    scopes = Scopes(models=frozenset({"sala"}), max_context_tokens=1000)
    key, token = await make_key(ring, scopes=scopes)
    assert token.startswith(f"sk-sala-{key.key_id}-")
    assert await ring.authenticate(token) == Principal(tenant, key.key_id, scopes)
    assert await ring.principal("acme", key.key_id) == Principal(tenant, key.key_id, scopes)
    assert await ring.principal("other", key.key_id) is None


async def test_only_a_keyed_hash_is_stored(ring, state):
    await make_tenant(ring)
    key, token = await make_key(ring)
    secret = token.removeprefix(f"sk-sala-{key.key_id}-")
    assert len(secret) >= 43  # 256 bits in base64
    stored = b"".join([await state.redis.get(f"sala:key:{key.key_id}")])
    assert secret.encode() not in stored
    pepper = SECRET.derive("keys")
    digest = hmac.new(pepper, f"{key.key_id}-{secret}".encode(), hashlib.sha256).hexdigest()
    assert json.loads(stored)["secrets"][0]["digest"] == digest
    assert secret not in repr(key)
    assert digest not in repr(key)


async def test_wrong_keys_are_refused_alike(ring):
    await make_tenant(ring)
    key, token = await make_key(ring)
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    unknown = f"sk-sala-{'a' * 16}-{token[-43:]}"
    other_id = token.replace(key.key_id, "b" * 16)
    messages = set()
    for each in (wrong, unknown, other_id, "sk-sala-", "any", token + "x", f"{token} "):
        with pytest.raises(InvalidApiKey) as refused:
            await ring.authenticate(each)
        messages.add(refused.value.message)
    assert messages == {"Incorrect API key provided."}
    with pytest.raises(InvalidApiKey, match="No API key"):
        await ring.authenticate(None)


async def test_unknown_id_takes_the_same_path(ring, monkeypatch):
    await make_tenant(ring)
    _, token = await make_key(ring)
    counts = []
    compare = hmac.compare_digest

    def count(one, other):
        counts[-1] += 1
        return compare(one, other)

    await ring.authenticate(token)
    monkeypatch.setattr("sala_serve.tenants.keys.hmac.compare_digest", count)
    for each in (token, token[:-1] + "_", f"sk-sala-{'a' * 16}-{token[-43:]}"):
        counts.append(0)
        await is_accepted(ring, each)
    assert counts == [2, 2, 2]


async def test_rotation_keeps_the_old_secret_for_a_while(ring, clock):
    await make_tenant(ring)
    key, first = await make_key(ring)
    _, second = await ring.store.rotate_key(key.key_id, keep_old_s=3600)
    clock.now_s += 2
    assert await is_accepted(ring, first)
    assert await is_accepted(ring, second)
    clock.now_s += 3598
    assert not await is_accepted(ring, first)
    assert await is_accepted(ring, second)
    # two live secrets at most, and none of the old ones where that is asked for
    _, third = await ring.store.rotate_key(key.key_id, keep_old_s=3600)
    rotated, fourth = await ring.store.rotate_key(key.key_id, keep_old_s=3600)
    clock.now_s += 2
    assert [await is_accepted(ring, each) for each in (second, third, fourth)] == [
        *(False, True, True)
    ]
    assert len(rotated.secrets) == 2
    _, fifth = await ring.store.rotate_key(key.key_id, keep_old_s=0)
    clock.now_s += 2
    assert [await is_accepted(ring, each) for each in (fourth, fifth)] == [False, True]


async def test_new_secret_works_at_once(ring, clock):
    await make_tenant(ring)
    key, first = await make_key(ring)
    assert await is_accepted(ring, first)
    _, second = await ring.store.rotate_key(key.key_id, keep_old_s=3600)
    clock.now_s += 0.1
    assert await is_accepted(ring, second)
    assert await is_accepted(ring, first)


async def test_key_expires(ring, clock):
    await make_tenant(ring)
    key, token = await make_key(ring, expires_unix_s=clock() + 100)
    assert await is_accepted(ring, token)
    clock.now_s += 100
    assert not await is_accepted(ring, token)
    with pytest.raises(Conflict, match="expired"):
        await ring.store.rotate_key(key.key_id, keep_old_s=0)


async def test_revocation_is_known_to_every_replica_within_two_seconds(state, clock):
    one, other = make_ring(state, clock), make_ring(state, clock)
    await make_tenant(one)
    key, token = await make_key(one)
    assert await is_accepted(one, token)
    assert await is_accepted(other, token)
    await one.store.revoke_key(key.key_id)
    clock.now_s += 1.0
    assert not await is_accepted(one, token)
    assert not await is_accepted(other, token)
    assert await other.principal("acme", key.key_id) is None
    with pytest.raises(Conflict, match="revoked"):
        await one.store.rotate_key(key.key_id, keep_old_s=60)


@pytest.mark.parametrize("slow_s", [1.99, 2.0])
async def test_look_up_that_took_too_long_is_not_believed(state, clock, slow_s):
    one, other = make_ring(state, clock), make_ring(state, clock)
    await make_tenant(one)
    key, token = await make_key(one)
    read_tenant = other.store.tenant

    async def revoked_meanwhile(tenant_id):
        await one.store.revoke_key(key.key_id)
        clock.now_s += slow_s
        return await read_tenant(tenant_id)

    other.store.tenant = revoked_meanwhile
    if slow_s < 2:
        assert await is_accepted(other, token)
    else:
        with pytest.raises(StateUnavailable):
            await other.authenticate(token)
    # and what was believed is not remembered past the time of its look-up
    other.store.tenant = read_tenant
    assert not await is_accepted(other, token)


async def test_cache_cannot_be_set_longer_than_revocation_allows():
    with pytest.raises(ValueError, match="less than or equal to 1.5"):
        TenantsSettings(key_cache_s=2)


@pytest.mark.parametrize("change", ["paused", "deleted"])
async def test_tenant_that_is_paused_or_deleted_has_no_working_key(ring, clock, change):
    await make_tenant(ring)
    key, token = await make_key(ring)
    assert await is_accepted(ring, token)
    if change == "paused":
        await ring.store.update_tenant("acme", is_active=False)
    else:
        await ring.store.delete_tenant("acme")
        await make_tenant(ring)  # another one of the same name
    clock.now_s += 1
    assert not await is_accepted(ring, token)
    assert await ring.principal("acme", key.key_id) is None


async def test_changed_limits_come_with_the_next_look_up(ring, clock):
    await make_tenant(ring)
    _, token = await make_key(ring)
    await ring.authenticate(token)
    await ring.store.update_tenant("acme", limits=Limits(requests_per_min=9))
    clock.now_s += 1
    assert (await ring.authenticate(token)).tenant.limits == Limits(requests_per_min=9)


async def test_changes_at_the_same_time_all_count(ring):
    await make_tenant(ring)
    key, _ = await make_key(ring)

    async def change(index: int) -> None:
        if index % 2:
            await ring.store.update_tenant("acme", name=f"Acme {index}")
        else:
            await ring.store.update_tenant("acme", limits=Limits(requests_per_min=index))

    await asyncio.gather(*(change(index) for index in range(10)), ring.store.revoke_key(key.key_id))
    tenant = await ring.store.tenant("acme")
    assert tenant.name != "Acme"
    assert tenant.limits != Limits(requests_per_min=5)
    assert (await ring.store.keys("acme"))[0].revoked_unix_s is not None


async def test_static_keys_and_no_keys_are_tenant_default(state, clock):
    limits = {"requests_per_min": 7}
    ring = make_ring(
        state, clock, static_keys=["sk-one", "sk-two"], has_admin=False, default_limits=limits
    )
    for token in ("sk-one", "sk-two"):
        principal = await ring.authenticate(token)
        assert (principal.tenant.tenant_id, principal.key_id) == ("default", None)
        assert principal.tenant.limits == Limits(requests_per_min=7)
    for token in ("sk-three", None, "sk-onesk-two"):
        assert not await is_accepted(ring, token)
    everybody = make_ring(state, clock, has_admin=False)
    for token in ("any", None):
        assert (await everybody.authenticate(token)).tenant.tenant_id == "default"
    assert await everybody.principal("default", None) == await everybody.authenticate(None)
    assert await everybody.principal("acme", None) is None


async def test_bad_key_is_refused_even_where_none_is_needed(state, clock):
    ring = make_ring(state, clock, has_admin=False)
    await make_tenant(ring)
    _, token = await make_key(ring)
    assert (await ring.authenticate(token)).tenant.tenant_id == "acme"
    assert not await is_accepted(ring, token[:-1] + "_")


async def test_tenants_are_listed_in_pages(ring):
    for tenant_id in ("c", "a", "b"):
        await make_tenant(ring, tenant_id)
    first = await ring.store.tenants(limit=2)
    rest = await ring.store.tenants(after=first[-1].tenant_id, limit=2)
    assert [each.tenant_id for each in (*first, *rest)] == ["a", "b", "c"]
    await ring.store.delete_tenant("b")
    assert [each.tenant_id for each in await ring.store.tenants()] == ["a", "c"]


async def test_what_cannot_be_is_refused(ring):
    await make_tenant(ring)
    for tenant_id, error in (("acme", Conflict), ("default", Conflict), ("Ac/me", InvalidRequest)):
        with pytest.raises(error):
            await make_tenant(ring, tenant_id)
    with pytest.raises(InvalidRequest, match="default") as refused:
        await ring.store.update_tenant("acme", tier="gold")
    assert refused.value.param == "tier"
    for call in (
        ring.store.tenant("nobody"),
        ring.store.update_tenant("nobody", name="x"),
        ring.store.delete_tenant("nobody"),
        ring.store.keys("nobody"),
        make_key(ring, "nobody"),
        ring.store.revoke_key("nokey"),
        ring.store.rotate_key("nokey", keep_old_s=1),
    ):
        with pytest.raises(NotFound):
            await call


async def test_number_of_keys_is_bounded(ring, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_KEYS", 2)
    await make_tenant(ring)
    await make_key(ring)
    await make_key(ring)
    with pytest.raises(Conflict, match="2 keys"):
        await make_key(ring)


async def test_memory_of_looked_up_keys_is_bounded(ring, monkeypatch):
    monkeypatch.setattr("sala_serve.tenants.keys.MAX_CACHED", 3)
    for letter in "abcde":
        assert not await is_accepted(ring, f"sk-sala-{letter * 16}-{'x' * 43}")
    assert len(ring._cache) == 3


async def test_replica_with_another_secret_says_so(state, clock, caplog):
    ring, other = make_ring(state, clock), make_ring(state, clock, secret=ServerSecret(b"x" * 16))
    await make_tenant(ring)
    _, token = await make_key(ring)
    with caplog.at_level(logging.ERROR), pytest.raises(StateUnavailable):
        await other.authenticate(token)
    with pytest.raises(StateUnavailable):
        await make_key(other)
    assert "another server secret" in caplog.text
    assert await is_accepted(ring, token)


@pytest.mark.parametrize("on_state_loss", ["refuse", "local_share"])
async def test_redis_away_remembered_keys_work_in_tiers_that_go_on(
    redis_server, clock, on_state_loss
):
    settings = StateSettings(url=SecretStr(redis_server.url), command_timeout_s=0.3)
    state = State.create(settings, clock=time.monotonic)
    tiers = {"default": TierSection(on_state_loss=on_state_loss)}
    ring = make_ring(state, clock, tiers=tiers, stale_keys_s=60, static_keys=["sk-one"])
    await make_tenant(ring)
    _, token = await make_key(ring)
    _, unseen = await make_key(ring)
    await ring.authenticate(token)
    redis_server.stop()
    clock.now_s += 30
    if on_state_loss == "refuse":
        with pytest.raises(StateUnavailable):
            await ring.authenticate(token)
    else:
        assert await is_accepted(ring, token)
        assert not await is_accepted(ring, token[:-1] + "_")
    with pytest.raises(StateUnavailable):
        await ring.authenticate(unseen)
    assert await is_accepted(ring, "sk-one")
    clock.now_s += 31
    with pytest.raises(StateUnavailable):
        await ring.authenticate(token)
    # a Redis that comes back without its keys knows nobody
    redis_server.start()
    await state.check()
    assert not await is_accepted(ring, token)
    await state.close()


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"model": "other"}, "model"),
        ({"endpoint": "/v1/completions"}, None),
        ({"tier": "gold"}, "service_tier"),
        ({"context_tokens": 1001}, None),
    ],
)
def test_scopes_are_checked(wanted, param):
    scopes = Scopes(
        frozenset({"sala"}), frozenset({"/v1/chat/completions"}), 1000, frozenset({"default"})
    )
    narrow = Principal(Tenant("a", "A", "default"), "k", scopes)
    check_scopes(
        narrow,
        model="sala",
        endpoint="/v1/chat/completions",
        tier="default",
        context_tokens=1000,
    )
    with pytest.raises(PermissionDenied) as refused:
        check_scopes(narrow, **wanted)
    assert refused.value.param == param
    if "tier" not in wanted:
        check_scopes(Principal(narrow.tenant, None), **wanted)


def test_tier_of_another_tenant_is_not_had_by_asking():
    cheap = Principal(Tenant("a", "A", "cheap"), "k")
    check_scopes(cheap, tier="cheap")
    with pytest.raises(PermissionDenied, match="allowed: cheap"):
        check_scopes(cheap, tier="gold")
    check_scopes(Principal(cheap.tenant, "k", Scopes(tiers=frozenset({"gold"}))), tier="gold")


def test_secret_file_is_made_once_and_private(tmp_path, monkeypatch):
    path = tmp_path / "new" / "secret"
    settings = TenantsSettings(secret_file=path)
    first = ServerSecret.load(settings, is_shared=True)
    assert path.stat().st_mode & 0o077 == 0
    assert len(path.read_bytes()) >= 43
    assert ServerSecret.load(settings, is_shared=True).derive("a") == first.derive("a")
    assert [each.name for each in path.parent.iterdir()] == ["secret"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ServerSecret.load(TenantsSettings(), is_shared=False)
    assert not (tmp_path / "sala-serve").exists()
    shared = ServerSecret.load(TenantsSettings(), is_shared=True)
    assert (tmp_path / "sala-serve" / "secret").exists()
    assert shared.derive("a") != first.derive("a")


def test_derived_keys_are_apart():
    assert len({SECRET.derive(each) for each in ("keys", "check", "cache-salt")}) == 3
    given = TenantsSettings(secret=SecretStr("a server secret of the tests"))
    assert ServerSecret.load(given, is_shared=True).derive("keys") == SECRET.derive("keys")
    assert "server" not in repr(given)


def test_unusable_secret_is_an_error_that_says_what_to_set(tmp_path):
    (tmp_path / "short").write_text("short")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="at least 16"):
        ServerSecret.load(TenantsSettings(secret_file=tmp_path / "short"), is_shared=True)
    with pytest.raises(ValueError, match=r"tenants\.secret_file"):
        ServerSecret.load(TenantsSettings(secret_file=tmp_path / "file" / "x"), is_shared=True)
    with pytest.raises(ValueError, match="named default"):
        TenantsSettings(tiers={"gold": {}})
