"""`with_retries`: repeats requests to a store whose errors are transient, with waits between the attempts.

Every library behind fsspec has error classes of its own, and not all libraries are installed. An error is therefore
classified by the HTTP status of the answer, the standard class that it derives from, and the names of its classes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import ConfigError, StorageError, UserError
from ..shown import without_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT_S = 0.4
MAX_WAIT_S = 20.0
"""A wait is a random time below a limit, so that clients do not retry together. The limit doubles with each attempt."""

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
    """A store sent fewer bytes than were requested."""


def with_retries(call: Callable[[], Result], action: str, url: str, max_attempts: int) -> Result:
    """Runs a call, and repeats it while it fails with transient errors.

    Args:
        call: The request; running it twice must be harmless.
        action: Verb for the error message, such as ``"read"``.
        url: URL for the error message.
        max_attempts: Most attempts.

    Returns:
        The result of the call.

    Raises:
        ConfigError: The bucket is missing, or a credential is missing or wrong.
        FileNotFoundError: The file does not exist.
        StorageError: All attempts failed, or one failed with an error that is not transient.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    url = without_secrets(url)
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
        explained = _explain(error, action, url, max_attempts)
        if without_secrets(str(error)) != str(error):  # A traceback would show the cause as it is.
            raise explained from None
        raise explained from error


def is_transient(error: BaseException) -> bool:
    """Returns whether a failed request may succeed when sent again, judged by its error and the error's causes."""
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


def error_code(error: BaseException) -> str | None:
    """Returns the S3 code in an error or its causes, such as ``"NoSuchBucket"``; None if there is none."""
    return next((code for one in _chain(error) if (code := _code(one)) is not None), None)


def _explain(error: Exception, action: str, url: str, max_attempts: int) -> Exception:
    """Returns the error to raise instead of `error`; its message says what failed at which URL and what to do."""
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
    """Yields an error, its `__cause__`, the cause of that cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status in an error of botocore, requests, aiohttp or another library; None if it has none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    given = [getattr(response, "status_code", None), *found]
    return next((one for one in given if isinstance(one, int)), None)


def _code(error: BaseException) -> str | None:
    """Returns the S3 code of an error, such as ``"NoSuchBucket"``; None if it has none."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _bucket(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _describe(state: Any) -> str:
    error = state.outcome.exception()
    return f"{type(error).__name__}: {without_secrets(_first_line(error))}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
