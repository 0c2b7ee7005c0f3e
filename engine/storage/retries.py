"""Which faults of a store pass by themselves, and how long to wait for that.

Every library behind fsspec has errors of its own, and not all of them are installed. So a fault is known by what they
have in common: the status of the answer, the standard class it derives from, the names of its classes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import ConfigError, StorageError, UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT_S = 0.4
MAX_WAIT_S = 20.0
"""A wait is random, up to a limit that doubles from the first to the longest, so that clients come apart."""

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
TRANSIENT_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
    "ResponseStreamingError",
    "TimeoutException",
    "TransportError",
}
TRANSIENT_ERRNO = {errno.EBUSY, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EREMOTEIO}

NO_CREDENTIALS = {
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
REFUSED_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
REFUSED_STATUS = {401, 403}


class TruncatedError(ConnectionError):
    """Less came than was asked for."""


def with_retries(call: Callable[[], Result], action: str, url: str, max_attempts: int) -> Result:
    """Calls, and calls again while what fails may pass.

    Args:
        call: What to do; doing it twice must do no harm.
        action: What it does, for the error: ``"read"``.
        url: What it does it to.
        max_attempts: Calls in all.

    Returns:
        What the call returned.

    Raises:
        ConfigError: The bucket is missing, or a credential is missing or wrong.
        FileNotFoundError: There is no such file.
        StorageError: The store failed to the last, or with a fault that does not pass.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    retrying = Retrying(
        stop=stop_after_attempt(max_attempts),
        wait=wait_random_exponential(FIRST_WAIT_S, MAX_WAIT_S),
        retry=retry_if_exception(is_transient),
        before_sleep=lambda state: logger.info("%s %s: %s; again", action, url, _describe(state)),
        reraise=True,
    )
    try:
        return retrying(call)
    except (UserError, StorageError):
        raise
    except Exception as error:
        raise _explain(error, action, url, max_attempts) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may go through if sent again."""
    chain = list(_chain(error))
    if any(_names(one) & NO_CREDENTIALS or _code(one) in REFUSED_CODES for one in chain):
        return False
    return any(
        isinstance(one, ConnectionError | TimeoutError)
        or _status(one) in TRANSIENT_STATUS
        or _code(one) in TRANSIENT_CODES
        or bool(_names(one) & TRANSIENT_CLASSES)
        or (isinstance(one, OSError) and one.errno in TRANSIENT_ERRNO)
        for one in chain
    )


def _explain(error: Exception, action: str, url: str, max_attempts: int) -> Exception:
    """Returns the error that a user can do something with."""
    chain = list(_chain(error))
    codes = {_code(one) for one in chain}
    said = _first_line(error)
    if any(_names(one) & NO_CREDENTIALS for one in chain):
        return ConfigError(
            f"cannot {action} {url}: no credentials ({said}); set them in the environment, for s3:// "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        )
    if "NoSuchBucket" in codes:
        return ConfigError(f"cannot {action} {url}: the bucket {_bucket(url)!r} does not exist; check the URL")
    if codes & REFUSED_CODES or isinstance(error, PermissionError) or {_status(one) for one in chain} & REFUSED_STATUS:
        return ConfigError(f"cannot {action} {url}: access denied ({said}); check the credentials and what they allow")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file", url)
    tries = f" after {max_attempts} attempts" if is_transient(error) else ""
    return StorageError(f"cannot {action} {url}{tries}: {type(error).__name__}: {said}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """Returns the status of the answer that an error is about: botocore, requests, aiohttp and others in turn."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    given = [getattr(response, "status_code", None), *found]
    return next((one for one in given if isinstance(one, int)), None)


def _code(error: BaseException) -> str | None:
    """Returns the code of an error of S3, such as ``"NoSuchBucket"``."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _bucket(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _describe(state: Any) -> str:
    error = state.outcome.exception()
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
