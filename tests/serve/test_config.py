from pathlib import Path

import pytest

from sala_serve.config import (
    ApiKeys,
    ConfigError,
    GatewayConfig,
    load_chat_config,
    load_gateway_config,
    read_api_key_file,
)


def test_defaults_stand_without_an_environment():
    assert load_gateway_config({"PATH": "/bin"}) == GatewayConfig()


def test_environment_beats_default_and_command_line_beats_environment():
    env = {
        "SALA_SERVE_PORT": "9000",
        "SALA_SERVE_HOST": "::",
        "SALA_SERVE_ENGINE_READ_TIMEOUT_S": "7.5",
    }
    config = load_gateway_config(env, port=9001, host=None, engine_url="http://e")
    assert (config.port, config.host, config.engine_url) == (9001, "::", "http://e")
    assert config.engine_read_timeout_s == 7.5
    assert config.engine_connect_timeout_s == GatewayConfig().engine_connect_timeout_s


def test_unknown_variable_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"SALA_SERVE_PROT; known are .*SALA_SERVE_PORT"):
        load_gateway_config({"SALA_SERVE_PROT": "1"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("MAX_BODY_BYTES", "0"),
        ("DRAIN_TIMEOUT_S", "inf"),
        ("DRAIN_TIMEOUT_S", "-1"),
        ("API_KEYS", ","),
        ("API_KEYS", "a b"),
    ],
)
def test_unusable_value_is_an_error_that_names_the_variable(name, text):
    with pytest.raises(ConfigError, match=f"^SALA_SERVE_{name}: "):
        load_gateway_config({f"SALA_SERVE_{name}": text})


def test_repr_shows_no_secret():
    config = load_gateway_config({"SALA_SERVE_API_KEYS": "sk-one,sk-two"})
    assert config.api_keys.values == ("sk-one", "sk-two")
    assert "sk-" not in repr(config)
    assert "<2 keys>" in repr(config)
    assert "sk-" not in repr(load_chat_config({"SALA_SERVE_API_KEY": "sk-one"}))


def test_key_file_has_a_key_a_line_and_comments(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team a\nsk-one\n\nsk-two  \n")
    assert read_api_key_file(path) == ApiKeys(("sk-one", "sk-two"))


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff"])
def test_key_file_without_a_key_is_an_error(tmp_path, content):
    path = Path(tmp_path, "keys")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_api_key_file(path)


def test_chat_reads_its_server_from_the_environment():
    env = {"SALA_SERVE_URL": "http://far", "SALA_SERVE_API_KEY": "sk-one"}
    config = load_chat_config(env, url=None)
    assert (config.url, config.api_key) == ("http://far", "sk-one")
