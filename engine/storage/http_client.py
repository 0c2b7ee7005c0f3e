"""`http_client`: the session of requests for files behind `http://` and `https://`, which keeps secrets to an origin.

An origin is a scheme, a host and a port. aiohttp follows redirects, and drops the user and the password of a URL,
`Authorization` and cookies when the origin changes. Headers of other names, which fsspec's configuration may set
(``FSSPEC_HTTPS``), may hold keys as well.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp

SENT_ANYWHERE = frozenset({"accept", "accept-encoding", "range", "user-agent"})
"""Headers that another origin may get: they say which bytes of a file to send, and in which form."""


async def http_client(**settings: Any) -> aiohttp.ClientSession:
    """Returns a session that sends no other origin more of a request than `SENT_ANYWHERE`.

    Args:
        settings: Arguments of `aiohttp.ClientSession`.
    """
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_drop_headers)
    settings["trace_configs"] = [*settings.get("trace_configs", ()), trace]
    if (auth := settings.pop("auth", None)) is not None:  # A session would send it to all origins.
        settings["headers"] = {**settings.get("headers", {}), "Authorization": auth.encode()}
    return aiohttp.ClientSession(**settings)


async def _drop_headers(
    session: aiohttp.ClientSession, context: SimpleNamespace, redirect: aiohttp.TraceRequestRedirectParams
) -> None:
    """Removes headers from a request before aiohttp sends it to another origin."""
    headers = redirect.response.headers
    location = headers.get("Location") or headers.get("URI") or ""
    try:
        is_same = redirect.url.join(type(redirect.url)(location)).origin() == redirect.url.origin()
    except ValueError:
        is_same = False
    if not is_same:
        for name in {one for one in redirect.headers if one.lower() not in SENT_ANYWHERE}:
            redirect.headers.popall(name)
