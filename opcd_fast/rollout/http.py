"""JSON over HTTP with a deadline, and with repetition of what may be repeated."""

from __future__ import annotations

import json
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from opcd_fast.errors import InputError, pip_install
from opcd_fast.runtime import redacted

LONGEST_PAUSE = 30.0  # seconds between two tries
LOOK_EVERY = 5.0  # seconds, while the server is away
AWAY = (502, 503, 504)  # HTTP: what stands before it says that it is not there
NEVER = re.compile("max_lora_rank|not supported|expected target modules")  # said by vLLM with status 500
_log = logging.getLogger("opcd_fast")


class ServerGone(RuntimeError):
    """A server did not answer, however often it was asked. The message is one line, with the remedy."""


class Refused(Exception):
    """The server understood the request and will not serve it (HTTP 3xx, 4xx, or `NEVER`): asking again is no help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _TryAgain(Exception):
    def __init__(self, why: str, pause: float | None = None, away: bool = False) -> None:
        super().__init__(why)
        self.pause, self.away = pause, away


class JsonServer:
    """A server that answers JSON with JSON; connections are kept and shared between threads.

    It is reached directly: the environment's proxies are for other addresses than a rollout server's.

    Args:
        url: "http://host:port", with or without a path in front of the ones asked for.
        timeout: seconds for one whole answer. Looked at when bytes arrive, and a silence of that length ends it too.
        tries: how often a request is made in all. Connections that break, answers that are cut off or no JSON, HTTP
            408, 429 and 5xx are tried again, after 0.5, 1, 2, ... 30 s; a server's Retry-After is obeyed.
        patience: seconds without an answer in which a server that is away (connections refused, HTTP 502, 503, 504) is
            asked again, every 5 s at least. Such tries do not count.
        api_key: sent as a bearer token.
    """

    def __init__(
        self, url: str, timeout: float = 600.0, tries: int = 8, first_pause: float = 0.5, api_key: str | None = None,
        patience: float = 300.0,
    ) -> None:  # fmt: skip
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise InputError(f"rollout='server' needs the package httpx: {pip_install('train')}") from error
        if not timeout > 0:
            raise InputError(f"rollout_timeout={timeout} must be above 0 seconds")
        if tries < 1:
            raise InputError(f"rollout_tries={tries} must be at least 1")
        if not 0 <= patience < float("inf"):
            raise InputError(f"rollout_patience={patience} must be seconds, 0 or more")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"rollout_url={redacted(url)!r} must look like http://127.0.0.1:8000")
        self.url = redacted(url)
        self.timeout, self.tries, self.first_pause, self.patience = timeout, tries, first_pause, patience
        self._told_away = -float("inf")
        user = (parsed.username, parsed.password) if parsed.userinfo else None
        if parsed.query:  # httpx tells the log of every request, with its address
            logging.getLogger("httpx").setLevel(logging.WARNING)
        self._client = httpx.Client(
            base_url=parsed.copy_with(username="", password=None, query=None),
            params=parsed.params,
            auth=user,
            headers={"Accept": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
            timeout=httpx.Timeout(timeout, connect=min(timeout, LONGEST_PAUSE)),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def post(self, path: str, body: Mapping[str, Any] | None, stop: threading.Event | None = None) -> Any:
        """The parsed answer, or text where the server sends plain text. Without a body it is a GET.

        Raises Refused for HTTP 3xx and 4xx, and for what a server says with 5xx that it can never do; ServerGone after
        the last try, when patience is over, or when `stop` was set.
        """
        why, asked, failed = "stopped", 0, 0
        started = last_seen = time.monotonic()
        wait: Callable[[float], Any] = time.sleep if stop is None else stop.wait
        while stop is None or not stop.is_set():
            asked += 1
            try:
                return self._once(path, body)
            except _TryAgain as error:
                why, pause, away = str(error), error.pause, error.away
            now = time.monotonic()
            if away:
                backoff = min(self.first_pause * 2 ** min(asked, 8), LOOK_EVERY)
                before, self._told_away = self._told_away, now
                if now - before > 4 * LOOK_EVERY:  # once for all the requests that find out at the same time
                    _log.warning("rollout server %s: %s; waiting for it up to %g s", self.url, why, self.patience)
            else:
                last_seen, failed = now, failed + 1
                backoff = min(self.first_pause * 2 ** (failed - 1), LONGEST_PAUSE)
            if now - last_seen >= self.patience if away else failed == self.tries:
                break
            wait(pause if pause is not None else backoff * random.uniform(0.8, 1.2))
        raise ServerGone(
            f"rollout server {self.url}: {redacted(why)} ({path}, {asked} tries in "
            f"{time.monotonic() - started:.0f} s); start it again or correct rollout_url, then go on with resume"
        )

    def _once(self, path: str, body: Mapping[str, Any] | None) -> Any:
        import httpx

        deadline, raw = time.monotonic() + self.timeout, bytearray()
        try:
            with self._client.stream("GET" if body is None else "POST", path, json=body) as response:
                for chunk in response.iter_bytes():
                    raw += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("too slow")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _TryAgain(f"{type(error).__name__}: {_one_line(str(error))}", away=True) from error
        except httpx.TimeoutException:
            raise _TryAgain(f"no whole answer within {self.timeout:g} s") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TryAgain(f"{type(error).__name__}: {_one_line(str(error))}") from error
        status, text = response.status_code, raw.decode(errors="replace")
        if status in (408, 429) or (status >= 500 and status != 501 and not NEVER.search(text)):
            pause = _seconds(response.headers.get("Retry-After"))
            raise _TryAgain(f"HTTP {status}: {_message(text)}", pause, away=status in AWAY)
        if 300 <= status < 400:
            where = redacted(response.headers.get("Location", "nowhere"))
            raise Refused(status, f"it redirects to {where}; give that address as rollout_url")
        if status >= 400:
            raise Refused(status, _message(text))
        try:
            return json.loads(text)
        except ValueError:
            if response.headers.get("Content-Type", "").startswith("text/plain"):
                return text
            raise _TryAgain(f"the answer is no JSON: {text[:80]!r}") from None


def _message(text: str) -> str:
    """What a server says about an error, in OpenAI's or FastAPI's form, or the text itself."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        found = None
    return _one_line(str(found or text)) or "no reason given"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds, at most LONGEST_PAUSE; None for dates and nonsense."""
    try:
        return min(max(float(retry_after or ""), 0.0), LONGEST_PAUSE)
    except ValueError:
        return None
