"""JSON over HTTP with a deadline, and with repetition of what may be repeated. Standard library only."""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opcd_fast.errors import InputError

CHUNK = 1 << 16
LONGEST_PAUSE = 30.0  # seconds between two tries


class ServerGone(RuntimeError):
    """A server did not answer, however often it was asked. The message is one line, with the remedy."""


class Refused(Exception):
    """The server understood the request and will not serve it (HTTP 4xx); asking again would not help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _TryAgain(Exception):
    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class JsonServer:
    """A server that answers JSON with JSON.

    Args:
        url: "http://host:port", with or without a path in front of the ones asked for.
        timeout: seconds for one whole answer, from connecting to the last byte.
        tries: how often a request is made in all. Connections that fail or break, answers that are cut off or no JSON,
            HTTP 408, 429 and 5xx are tried again, after 0.5, 1, 2, ... 30 s; a server's Retry-After is obeyed.
        api_key: sent as a bearer token.
    """

    url: str
    timeout: float = 600.0
    tries: int = 8
    first_pause: float = 0.5
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"rollout_url={self.url!r} must look like http://127.0.0.1:8000")
        if not self.timeout > 0:
            raise InputError(f"rollout_timeout={self.timeout} must be above 0 seconds")
        if self.tries < 1:
            raise InputError(f"rollout_tries={self.tries} must be at least 1")

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event | None = None) -> Any:
        return self._ask("POST", path, json.dumps(body).encode(), stop)

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None, None)

    def _ask(self, method: str, path: str, body: bytes | None, stop: threading.Event | None) -> Any:
        """The parsed answer; text where it is no JSON and the status is 200 to a path without a model.

        Raises Refused for HTTP 4xx, ServerGone after the last try or when `stop` was set.
        """
        started, why = time.monotonic(), "stopped"
        wait: Callable[[float], Any] = time.sleep if stop is None else stop.wait
        for number in range(self.tries):
            if stop is not None and stop.is_set():
                break
            try:
                return self._once(method, path, body)
            except _TryAgain as error:
                why, pause = str(error), error.pause
            except TimeoutError:
                why, pause = f"no whole answer within {self.timeout:g} s", None
            except (OSError, http.client.HTTPException) as error:
                why, pause = _in_words(error), None
            if number + 1 < self.tries:
                backoff = min(self.first_pause * 2**number, LONGEST_PAUSE)
                wait(pause if pause is not None else backoff * random.uniform(0.8, 1.2))
        raise ServerGone(
            f"rollout server {self.url}: {why} ({method} {path}, {self.tries} tries in "
            f"{time.monotonic() - started:.0f} s); start it again or correct rollout_url, then go on with resume"
        )

    def _once(self, method: str, path: str, body: bytes | None) -> Any:
        parts = urlsplit(self.url)
        deadline = time.monotonic() + self.timeout
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            headers = {"Accept": "application/json", "Connection": "close"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            if self.api_key:
                headers["Authorization"] = f"Bearer {self.api_key}"
            connection.connect()
            held: Any = connection.sock  # the connection lets go of it when the answer is closed
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            raw = bytearray()
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                held.settimeout(left)
                chunk = response.read1(CHUNK)
                if not chunk:
                    break
                raw += chunk
            length = response.headers.get("Content-Length")
            if length is not None and len(raw) < int(length):
                raise _TryAgain(f"the answer broke off after {len(raw)} of {length} bytes")
        finally:
            connection.close()
        status, text = response.status, bytes(raw).decode(errors="replace")
        if status in (408, 429) or status >= 500:
            raise _TryAgain(f"HTTP {status}: {_message(text)}", _seconds(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            where = response.headers.get("Location")
            raise Refused(status, f"it redirects to {where}; give that address as rollout_url")
        if status >= 400:
            raise Refused(status, _message(text))
        try:
            return json.loads(text)
        except ValueError:
            if response.headers.get_content_type() == "text/plain":
                return text
            raise _TryAgain(f"the answer is no JSON: {text[:80]!r}") from None


def _in_words(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "the host name cannot be resolved"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason})"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)):
        return "the connection broke"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _message(text: str) -> str:
    """What a server says about an error: OpenAI's and FastAPI's forms, or the text itself, one line of 300."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        found = None
    return " ".join(str(found or text).split())[:300] or "no reason given"


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds, at most LONGEST_PAUSE; None for dates and nonsense."""
    try:
        return min(max(float(retry_after or ""), 0.0), LONGEST_PAUSE)
    except ValueError:
        return None
