"""What people see, and what is kept in files, holds no password and no key."""

from __future__ import annotations

import logging
import pickle
import traceback

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.errors import ConfigError, RequestError, StorageError, quote
from millrace.engine.shown import HIDDEN, without_secrets
from millrace.engine.storage import Location, StorageOptions
from millrace.engine.storage.retries import with_retries


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host:1/a?b=c", "https://***@host:1/a?b=c"),
        ("https://ghp_token@host/a", "https://***@host/a"),
        ("s3://id:p@ss@bucket/a and http://x:y@z", "s3://***@bucket/a and http://***@z"),
        ("https://h/a?X-Amz-Signature=1f&x=2&api-key=3#end", "https://h/a?X-Amz-Signature=***&x=2&api-key=***#end"),
        ("https://h/a?sig=a%2Fb&sv=2", "https://h/a?sig=***&sv=2"),
        ("s3://AKIAX:ab/SEC?RE#T'@bucket/m", "s3://***@bucket/m"),
        (
            "file at https:/u:SECRET@host/t and https://u:pw@host/a@b",
            "file at https:/***@host/t and https://***@host/a@b",
        ),
        ("http://host:80/a@b and http://host:8000", "http://host:80/a@b and http://host:8000"),
        ("https://h/a?jwt=eyJ#access_token=abc", "https://h/a?jwt=***#access_token=***"),
        ("{'api-key': 'abc', 'n': 1}", "{'api-key': '***', 'n': 1}"),
        ("x-api-key: abc1, Set-Cookie: id5=x", "x-api-key: ***, Set-Cookie: ***"),
        ("Authorization: Token abcdef, password=abc", "Authorization: Token ***, password=***"),
        ("api_key: input should be a text; api_key is missing", "api_key: input should be a text; api_key is missing"),
        ("Authorization: Bearer abcdef.123", "Authorization: Bearer ***"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("write to me@here.org: is a basic idea a key? yes=1", "write to me@here.org: is a basic idea a key? yes=1"),
    ],
)
def test_places_of_secrets_in_a_text_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


def test_values_under_names_of_secrets_are_hidden() -> None:
    given = {"hf_token": "x", "env_vars": {"AWS_SECRET_ACCESS_KEY": "x", "A": "1"}, "max_tokens": 3, "token": None}
    shown = {
        "hf_token": HIDDEN,
        "env_vars": {"AWS_SECRET_ACCESS_KEY": HIDDEN, "A": "1"},
        "max_tokens": 3,
        "token": None,
    }
    assert without_secrets(given) == shown
    names = (
        "huggingface_token",
        "gitlab_token",
        "id_token",
        "pwd",
        "passphrase",
        "set-cookie",
        "jwt",
        "dsn",
        "connection_string",
    )
    assert set(without_secrets(dict.fromkeys((*names, "password"), 12345)).values()) == {HIDDEN}
    plain = {"pad_token": "a", "max_tokens": 3, "valid_tokens": 1, "grid": 2}
    assert without_secrets(plain) == plain
    assert without_secrets([("https://a:b@c", 1)]) == [("https://***@c", 1)]


@pytest.mark.parametrize("kind", [ConfigError, StorageError])
def test_an_error_holds_no_secret(kind: type[Exception]) -> None:
    error = kind("cannot read https://me:pw@host/a")
    assert "pw" not in f"{error!r} {error} {error.args}" and "host/a" in str(pickle.loads(pickle.dumps(error)))
    assert "pw" not in RequestError.from_exception(OSError("https://me:pw@host/a")).message


def test_a_location_and_the_errors_of_its_store_show_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    url = "https://me:pw@host/a?token=pw"
    assert "pw" not in repr(Location.at(url)) and Location.at(url).url == url

    def fail() -> None:
        raise ConnectionError(f"no answer from {url}")

    with caplog.at_level(logging.INFO), pytest.raises(StorageError) as caught:
        with_retries(fail, "read", url, 1)
    assert "pw" not in str(caught.value) + caplog.text

    def miss() -> None:
        raise FileNotFoundError(url)

    with pytest.raises(FileNotFoundError) as missed:
        with_retries(miss, "read", url, 1)
    assert "pw" not in str(missed.value)


def test_credentials_in_an_endpoint_are_refused() -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        StorageOptions(endpoint_url="http://minio:pw@host:9000")
    assert "pw" not in str(caught.value)


def test_a_warning_about_a_token_does_not_quote_it(caplog: pytest.LogCaptureFixture) -> None:
    EngineConfig.from_kwargs(model="m", hf_token="hf_abc")
    assert "hf_token" in caplog.text and "hf_abc" not in caplog.text


def test_a_value_is_cleaned_before_it_is_cut() -> None:
    assert "SECRET" not in quote("https://host/" + "x" * 60 + "/t?X-Amz-Date=1&X-Amz-Signature=" + "SECRET" * 11)
    assert quote({"model": "m", "nested": {"hf_token": "SECRET"}}) == "{'model': 'm', 'nested': {'hf_token': '***'}}"


@pytest.mark.parametrize("name", ["speculative_config", "override_generation_config", "quantization_config"])
def test_an_error_about_a_setting_shows_no_secret_in_it(name: str) -> None:
    with pytest.raises(ConfigError, match="not supported") as caught:
        EngineConfig.from_kwargs(model="m", **{name: {"model": "m", "hf_token": "hf_SECRET"}})
    assert "SECRET" not in str(caught.value)


def test_the_text_of_a_config_shows_no_secret() -> None:
    config = EngineConfig(model="s3://KEY:SECRET@bucket/m", hf_overrides={"auth_token": "SECRET"})
    assert "SECRET" not in repr(config) and "bucket/m" in repr(config) and "hf_overrides=" in repr(config)


def test_a_missing_file_of_a_store_shows_no_secret() -> None:
    file = Location.at("memory://x?token=SECRET")
    for use in (file.read_bytes, file.size, file.etag, file.open_input):
        with pytest.raises(FileNotFoundError) as caught:
            use()
        assert "SECRET" not in str(caught.value)


def test_a_cause_with_a_secret_is_left_out_of_a_traceback() -> None:
    word = "secret".upper()  # The traceback quotes the lines of this function.

    def fail() -> None:
        raise ValueError(f"bad name in s3://AKIAX:{word}@bucket")

    with pytest.raises(StorageError) as caught:
        with_retries(fail, "read", f"s3://AKIAX:{word}@bucket", 1)
    assert word not in "".join(traceback.format_exception(caught.value))
