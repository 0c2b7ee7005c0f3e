"""What people see, and what is kept in files, holds no password and no key."""

from __future__ import annotations

import logging
import pickle

import pytest

from millrace.engine.config import EngineConfig
from millrace.engine.errors import ConfigError, RequestError, StorageError
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
