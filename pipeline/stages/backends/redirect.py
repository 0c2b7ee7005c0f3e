"""`post`: sends a request and follows redirects, without giving the request to another origin.

An origin is a scheme, a host and a port. A server may send a request on to another address of its own origin. Another
origin never gets the body, the headers or the cookies of a request, because they may hold keys and the row.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp

__all__ = ["HttpRedirectError", "post"]

MAX_REDIRECTS = 5
"""Most redirects that are followed for one request."""

_POST_AGAIN, _THEN_GET = frozenset({307, 308}), frozenset({301, 302, 303})
"""Statuses that ask for the same request at another address, and those that say where to get the answer."""

Encode = Callable[[], tuple[Any, dict[str, str]]]
"""Returns the body and the headers of a request. It is called for each address, since a form can be sent only once."""


class HttpRedirectError(aiohttp.ClientError):
    """A server sends a request to an address to which it must not go."""


@asynccontextmanager
async def post(
    session: aiohttp.ClientSession, url: str, encode: Encode, timeout: aiohttp.ClientTimeout, leaves_origin: bool
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Posts a request, follows redirects and yields the answer.

    Args:
        session: The session of the requests to the origin of `url`.
        url: Address of the request.
        encode: Makes the body and the headers.
        timeout: Limits on the time of each request.
        leaves_origin: Whether an answer may be fetched from another origin, by a GET without headers and body.

    Raises:
        HttpRedirectError: The server redirects to another origin, too often, or to no address.
    """
    body, headers = encode()
    async with AsyncExitStack() as stack:
        asked: dict[str, Any] = {"timeout": timeout, "allow_redirects": False}
        response = await stack.enter_async_context(session.post(url, data=body, headers=headers, **asked))
        for _ in range(MAX_REDIRECTS):
            if response.status not in _POST_AGAIN | _THEN_GET or "Location" not in response.headers:
                break
            target = _target(response)
            is_post = response.request_info.method == "POST" and response.status in _POST_AGAIN
            if target.origin() != response.url.origin():
                if is_post or not leaves_origin:
                    raise HttpRedirectError(_refusal(target, is_post))
                # Another session, since the headers, cookies and credentials of this one belong to its origin.
                session = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
                headers = {}
            elif is_post:
                body, headers = encode()
            if not is_post:
                headers = {name: text for name, text in headers.items() if name.lower() != "content-type"}
            method = "POST" if is_post else "GET"
            sent = session.request(method, target, data=body if is_post else None, headers=headers, **asked)
            response = await stack.enter_async_context(sent)
        else:
            raise HttpRedirectError(f"the server has redirected the request more than {MAX_REDIRECTS} times")
        yield response


def _target(response: aiohttp.ClientResponse) -> Any:
    """Returns the address to which an answer redirects, as read by the class that aiohttp uses for its requests."""
    try:
        target = response.url.join(type(response.url)(response.headers["Location"]))
        target.origin()
    except ValueError as error:
        raise HttpRedirectError("the server redirects to what is no address") from error
    return target


def _refusal(target: Any, is_post: bool) -> str:
    asked = "set url to that address" if is_post else "set url to that address, or follow_other_origins to True"
    return f"the server redirects to another origin, {target.origin()}, which the row was not sent to; {asked}"
