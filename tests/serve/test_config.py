from pathlib import Path

import pytest

from sala_serve.config import (
    ApiKeys,
    ConfigError,
    Settings,
    load_chat_config,
    load_settings,
    read_api_key_file,
    setting_fields,
    settings_page,
)

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_stand_without_an_environment():
    assert load_settings({"PATH": "/bin", "HOST": "other", "SERVER": "x"}) == Settings()


def test_environment_beats_file_and_command_line_beats_environment(tmp_path):
    file = write(
        tmp_path / "settings.toml",
        """
        [server]
        port = 1
        host = "file"
        drain_timeout_s = 5
        [[engines]]
        url = "http://one"
        [[engines]]
        url = "http://two"
        read_timeout_s = 9
        """,
    )
    env = {
        "SALA_SERVE_CONFIG": str(file),
        "SALA_SERVE_PORT": "9000",
        "SALA_SERVE_HOST": "::",
        "SALA_SERVE_ENGINE_READ_TIMEOUT_S": "7.5",
        "SALA_SERVE_DEADLINES__QUEUE_S": "3",
    }
    settings = load_settings(env, overrides={"server": {"port": 9001, "host": None}})
    assert (settings.server.port, settings.server.host) == (9001, "::")
    assert settings.server.drain_timeout_s == 5
    assert settings.deadlines.queue_s == 3
    assert [(engine.url, engine.read_timeout_s) for engine in settings.engines] == [
        ("http://one", 7.5),
        ("http://two", 9),
    ]
    connect_timeout_s = Settings().engines[0].connect_timeout_s
    assert settings.engines[0].connect_timeout_s == connect_timeout_s


def test_lists_are_json_in_the_environment():
    settings = load_settings({"SALA_SERVE_ENGINES": '[{"url": "http://one"}, {"socket": "/s"}]'})
    assert [engine.url for engine in settings.engines] == ["http://one", "http://127.0.0.1:8001"]
    assert settings.engines[1].socket == Path("/s")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SALA_SERVE_PROT", "SALA_SERVE_PORT"),
        ("SALA_SERVE_DEADLINES__QUEUES", "SALA_SERVE_DEADLINES__QUEUE_S"),
        ("SALA_SERVE_SERVR__HOST", "SALA_SERVE_SERVER__HOST"),
    ],
)
def test_unknown_variable_is_an_error_that_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=rf"{name}; the nearest setting is {nearest}\."):
        load_settings({name: "1"})
    with pytest.raises(ConfigError, match=name):
        load_chat_config({name: "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"unknown setting server.prot in .*; .* server.port"),
        ("[sever]\nport = 1", r"unknown setting sever in .*; .* server"),
        ("[[engines]]\nurll = 'x'", r"unknown setting engines.0.urll in .*; .* engines.url"),
        ("[server]\nport = 70000", r"^server.port: input should be less than"),
        ("[server]\nsend_timeout_s = inf", r"^server.send_timeout_s: "),
        ("engines = []", r"^engines: "),
        ("[server", r"^cannot read the settings in "),
    ],
)
def test_unusable_file_is_an_error_that_names_the_setting(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_settings({}, file=write(tmp_path / "settings.toml", text))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings({"SALA_SERVE_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("MAX_BODY_BYTES", "0"),
        ("DRAIN_TIMEOUT_S", "inf"),
        ("DRAIN_TIMEOUT_S", "-1"),
        ("ENGINE_READ_TIMEOUT_S", "0"),
        ("API_KEYS", ","),
        ("API_KEYS", "a b"),
        ("DEADLINES__QUEUE_S", "soon"),
        ("ENGINES", "http://one"),
    ],
)
def test_unusable_value_is_an_error_that_names_the_variable(name, text):
    with pytest.raises(ConfigError, match=f"^SALA_SERVE_{name}: "):
        load_settings({f"SALA_SERVE_{name}": text})


def test_one_setting_under_two_names_is_an_error():
    with pytest.raises(ConfigError, match="one setting"):
        load_settings({"SALA_SERVE_PORT": "1", "SALA_SERVE_SERVER__PORT": "2"})


def test_settings_cannot_be_changed():
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.server = settings.server
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1


def test_log_shows_what_was_set_and_no_secret():
    settings = load_settings(
        {"SALA_SERVE_API_KEYS": "sk-one,sk-two", "SALA_SERVE_PORT": "9"},
        overrides={"engines": [{"url": "http://user:word@far"}]},
    )
    assert settings.server.api_keys.values == ("sk-one", "sk-two")
    shown = settings.masked()
    assert shown.startswith('{"server": {"port": 9, "api_keys": "<2 keys>"}')
    assert "http://***@far" in shown
    for text in (shown, repr(settings), repr(load_chat_config({"SALA_SERVE_API_KEY": "sk-one"}))):
        assert "sk-" not in text


def test_every_setting_has_a_meaning_and_the_page_is_that_of_the_code():
    for path, definition in setting_fields():
        assert definition.description, path
    # written by: python -m sala_serve.config > docs/settings.md
    assert PAGE.read_text(encoding="utf-8") == settings_page()


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
