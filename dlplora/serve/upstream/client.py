"""HTTP client of the upstream server. Only the listed fields are sent, and errors are mapped to our own."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from dlplora.errors import ConfigError
from dlplora.serve.jobs import BadRequestError

UNREADABLE = (ValueError, RecursionError)
"""Errors of reading JSON; the second one if it is nested too deeply."""
_PATH = re.compile(r"[/\\]\S|://")
_RETRY_AFTER = re.compile(r"\d{1,9}|[A-Za-z]{3}, [\w :]{1,40}")
"""Seconds or a date, the two forms of the header."""
_REFUSED = frozenset({400, 413, 422})
_BUSY = frozenset({429, 503})


def checked_url(text: str) -> str:
    """The address of an upstream server without a trailing slash and without ``/v1``.

    Raises:
        ConfigError: If it is not an http or https URL of a host, or holds a password, a query or a fragment.
    """
    parts = urlsplit(text)
    try:
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = None
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"--upstream expects an address such as http://127.0.0.1:8080, got '{text}'.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("--upstream holds a user name or password; give a key with --upstream-api-key.")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


class UpstreamClient:
    """An upstream server.

    Args:
        url: From ``checked_url``.
        api_key: Key of that server; the client's own key is never sent there.
        timeout_s: Time to connect is 5 s; this is the longest silence in an answer.
        transport: Another way to send requests, for tests.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 300.0, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5.0), transport=transport, trust_env=False
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """The JSON that a path answers.

        Raises:
            ConfigError: If the server cannot be reached or answers something else.
        """
        try:
            response = await self._http.get(path)
            response.raise_for_status()
            return response.json()
        except httpx.HTTPStatusError as error:
            raise ConfigError(f"the upstream server answers {error.response.status_code} to GET {path}; check --upstream-kind.") from error
        except (httpx.HTTPError, httpx.InvalidURL, *UNREADABLE) as error:
            raise ConfigError(f"cannot read {path} from the upstream server: {_reason(error)}.") from error

    async def alive(self, path: str) -> bool:
        """Whether a path answers without an error within five seconds."""
        try:
            return (await self._http.get(path, timeout=5.0)).is_success
        except httpx.HTTPError:
            return False

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that a request answers.

        Raises:
            BadRequestError: With a status for the client: 502, 503, 504, or 400 where the server refused the request.
        """
        try:
            response = await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise _failed(error) from error
        if response.is_error:
            raise _refused(response)
        try:
            found = response.json()
        except UNREADABLE as error:
            raise _failed(error) from error
        if not isinstance(found, dict):
            raise _failed(ValueError("no object"))
        return found

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """The data lines of server-sent events, as they come; errors as for ``post``."""
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _refused(response)
                yield _data(response)
        except httpx.HTTPError as error:
            raise _failed(error) from error


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _reason(error: Exception) -> str:
    kind = "it does not answer in time" if isinstance(error, httpx.TimeoutException) else "it cannot be reached"
    return "its answer is not JSON" if isinstance(error, UNREADABLE) and not isinstance(error, httpx.HTTPError) else kind


def _failed(error: Exception) -> BadRequestError:
    late = isinstance(error, httpx.TimeoutException)
    code = "upstream_timeout" if late else "upstream_error"
    return BadRequestError(f"the upstream server failed: {_reason(error)}.", None, code, 504 if late else 502)


def _refused(response: httpx.Response) -> BadRequestError:
    status = response.status_code
    if status in _BUSY:
        after = response.headers.get("retry-after", "")
        return BadRequestError(
            "the upstream server is busy; try again later.", None, "upstream_busy", 503, after if _RETRY_AFTER.fullmatch(after) else "1"
        )
    if status not in _REFUSED:
        return BadRequestError(f"the upstream server failed with status {status}.", None, "upstream_error", 502)
    said = _message(response)
    return BadRequestError(f"the upstream server refused the request{f': {said}' if said else '.'}", None, "upstream_refused", 400)


def _message(response: httpx.Response) -> str:
    """What the server says of a refused request, unless that may hold a path or an address."""
    try:
        body = json.loads(response.content)
    except UNREADABLE:
        return ""
    error = body.get("error", body) if isinstance(body, dict) else {}
    text = error.get("message") if isinstance(error, dict) else error
    if not isinstance(text, str):
        return ""
    line = " ".join(text.split())[:300]
    return "" if _PATH.search(line) else line
