"""Answers from a server that speaks OpenAI's completions protocol with token ids, as vLLM does.

Every prompt is a request of its own with its own seed, so a request that failed is simply made again: nothing that
was answered is asked twice, nothing is lost, and the order is that of the prompts. All sampling settings are sent,
because servers fill in what is left open from the model's generation_config.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Protocol

from opcd_fast.errors import InputError
from opcd_fast.rollout.http import JsonServer, Refused
from opcd_fast.rollout.protocol import Completion, Request, Sampler
from opcd_fast.runtime import token_ids

NEEDS = (
    "a rollout server must take a prompt of token ids and return token ids (vLLM: return_token_ids); text that is "
    "tokenised again has other ids"
)


class Weights(Protocol):
    """How the server gets the trained weights. Both return the model name to ask for."""

    def push(self, server: JsonServer, model: Any) -> str:
        """The weights moved (or nothing is known): make the server answer with those of `model`."""

    def lost(self, server: JsonServer, name: str) -> str:
        """The server does not know `name` any more, as after a restart: give it what it had once more."""


class ServerRollout(Sampler):
    """A sampler on a server. See Rollout.

    Args:
        url: "http://host:port", what stands in front of /v1.
        stop_token_ids: ids that end an answer.
        weights: how the trained weights get there: `LoRAWeights`, `CommandWeights`, or your own.
        timeout: seconds for one answer. tries, patience: how often each is asked for, and how many seconds the server
            may be away, see JsonServer.
        concurrency: answers asked for at the same time.
        logprobs_are: what the server's log-probabilities are of. "raw": the model's, before temperature and top-p
            (vLLM's default); they are passed on only where that is the sampling distribution (temperature 1, top_p 1).
            "processed": after both (vLLM's `--logprobs-mode processed_logprobs`).
        vocab_size: an id from here on in an answer is an error.
        base: the model under the adapter, as a folder, hub id, or the server's name for it. longest: tokens of the
            longest prompt with its answer. Both are compared with what /v1/models says, at the first `sync`.
    """

    uses_model = "saves"

    def __init__(
        self,
        url: str,
        *,
        stop_token_ids: Sequence[int],
        weights: Weights,
        timeout: float = 600.0,
        tries: int = 8,
        first_pause: float = 0.5,
        concurrency: int = 64,
        logprobs_are: str = "raw",
        vocab_size: int | None = None,
        api_key: str | None = None,
        patience: float = 300.0,
        base: str | None = None,
        longest: int | None = None,
    ) -> None:
        super().__init__(stop_token_ids, vocab_size)
        if concurrency < 1:
            raise InputError(f"concurrency={concurrency} must be at least 1")
        if logprobs_are not in ("raw", "processed"):
            raise InputError(f"logprobs_are={logprobs_are!r} is not available; use 'raw' or 'processed'")
        address, mark, query = url.partition("?")
        address = address.rstrip("/").removesuffix("/v1")
        self.server = JsonServer(address + mark + query, timeout, tries, first_pause, api_key, patience)
        self.weights, self.base, self.longest = weights, base, longest
        self.concurrency = concurrency
        self.logprobs_are = logprobs_are
        self._model_name: str | None = None
        self._lock = threading.Lock()

    def sync(self, model: Any) -> None:
        """Send the weights; every answer from now on is of these. Raises InputError or ServerGone."""
        if self._model_name is None:
            self._check_served()
        self._give(lambda: self.weights.push(self.server, model))

    def explain(self) -> str:
        raw = "the model's own: passed on at temperature 1 and top_p 1 only"
        known = raw if self.logprobs_are == "raw" else "those of the sampling distribution"
        name = self._model_name or "no model yet"
        return (
            f"engine: server ({self.server.url}, {name}, {type(self.weights).__name__}, "
            f"{self.concurrency} at a time)\nlogprobs: {self.logprobs_are} ({known})"
        )

    def _answers(self, rows: list[tuple[int, ...]], request: Request) -> list[Completion]:
        """The same seed gives the same answers as far as the server keeps that promise.

        Raises:
            InputError: the server cannot do what is asked (no token ids, unknown model, prompt too long, ...).
            ServerGone: it did not answer. Nothing was changed; the same call can be made again.
        """
        if self._model_name is None:
            raise InputError("the server has no weights yet; call sync(model) before generate()")
        stop = threading.Event()

        def answer(index: int) -> Completion:
            try:
                reply = self._ask(rows[index], request, request.seed_of(index), stop)
            except Refused as error:
                hint = f"; {NEEDS}" if "prompt must be" in str(error) or "token_ids" in str(error) else ""
                raise InputError(
                    f"rollout server {self.server.url} refused a prompt (HTTP {error.status}): {error}{hint}"
                ) from error
            return self._read(reply, rows[index], request, f"rollout server {self.server.url}, prompt {index}")

        pool = ThreadPoolExecutor(max_workers=min(self.concurrency, max(len(rows), 1)), thread_name_prefix="rollout")
        try:
            futures = [pool.submit(answer, index) for index in range(len(rows))]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done and future.exception() is not None:
                    raise future.exception()  # type: ignore[misc]
            return [future.result() for future in futures]
        finally:
            stop.set()  # whatever still waits for its next try gives up
            pool.shutdown(wait=False, cancel_futures=True)

    def _check_served(self) -> None:
        try:
            cards = self.server.post("/v1/models", None)["data"]
            served = [(card["id"], card.get("root") or card["id"], card.get("max_model_len")) for card in cards
                      if not card.get("parent")]  # fmt: skip
        except (Refused, TypeError, KeyError, AttributeError):  # not every server has such a list
            return
        if self.base and served and not any(self.base == name or _same(self.base, root) for name, root, _ in served):
            raise InputError(
                f"rollout server {self.server.url} serves {served[0][1]!r}, and the run trains {self.base!r}; start it "
                f"with that model, or, where they are the same weights, set rollout_model={served[0][0]!r}"
            )
        window = max((most for *_, most in served if isinstance(most, int)), default=None)
        if window is not None and self.longest is not None and self.longest > window:
            raise InputError(
                f"rollout server {self.server.url} has room for {window} tokens, the longest prompt with its answer "
                f"takes {self.longest}; start it with --max-model-len {self.longest}, or lower max_new_tokens"
            )

    # ------------------------------------------------------------------------------------------- one answer

    def _ask(self, prompt: tuple[int, ...], request: Request, seed: int, stop: threading.Event) -> Any:
        body = {
            "prompt": list(prompt),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "seed": seed,
            "stop_token_ids": list(self.stop_token_ids),
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "stream": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # how servers older than return_token_ids give them
            "logprobs": 1,
        }
        name = str(self._model_name)
        try:
            return self.server.post("/v1/completions", {"model": name, **body}, stop)
        except Refused as error:
            if error.status != 404:
                raise
        self._give_again(name)
        return self.server.post("/v1/completions", {"model": self._model_name, **body}, stop)

    def _give_again(self, name: str) -> None:
        """Once for all the requests that found out at the same time."""
        with self._lock:
            if self._model_name == name:
                self._give(lambda: self.weights.lost(self.server, name))

    def _give(self, weights: Callable[[], str]) -> None:
        try:
            self._model_name = weights()
        except Refused as error:
            raise InputError(f"rollout server {self.server.url} refused the weights: {error}") from error

    def _read(self, reply: Any, prompt: tuple[int, ...], request: Request, where: str) -> Completion:
        try:
            (choice,) = reply["choices"]
            listed = choice.get("logprobs") or {}
            tokens = choice.get("token_ids")
            if tokens is None:
                tokens = _ids_in_text(listed.get("tokens"))
            reason = choice.get("finish_reason")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not a completion: {str(reply)[:120]!r}; {NEEDS}") from error
        if tokens is None:
            raise InputError(f"{where}: the answer holds no token ids; {NEEDS}")
        tokens = token_ids(f"{where}: token_ids", tokens)
        seen = choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
        if seen is not None and tuple(seen) != prompt:
            raise InputError(
                f"{where}: the server read {len(seen)} prompt tokens, {len(prompt)} were sent, or others: it must "
                "neither add a start token nor truncate"
            )
        cut = choice.get("stop_reason")
        if reason == "stop" and isinstance(cut, int) and (not tokens or tokens[-1] != cut):
            raise InputError(f"{where}: the stop token {cut} is missing at the end of the answer; the loss needs it")
        answer = self._completion(where, tokens, reason, request.max_new_tokens)
        if not self._knows_logprobs(request):
            return answer
        values = listed.get("token_logprobs")
        if values is None or len(values) != len(tokens) or None in values:
            raise InputError(f"{where}: no log-probability for every token; the server must support logprobs=1")
        return replace(answer, logprobs=tuple(map(float, values)))

    def _knows_logprobs(self, request: Request) -> bool:
        """Whether the server's log-probabilities are wanted, and are those of the sampling distribution."""
        raw = request.temperature in (0.0, 1.0) and request.top_p == 1.0
        return request.logprobs and (raw or (self.logprobs_are == "processed" and request.temperature > 0))


def _same(one: str, other: str) -> bool:
    """Whether two names can mean the same model: one folder, or, where this machine does not have both, a last part."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return PurePath(one).name.lower() == PurePath(other).name.lower()


def _ids_in_text(tokens: Any) -> list[int] | None:
    """Ids of ["token_id:5", ...] (vLLM's return_tokens_as_token_ids), None for text."""
    if not isinstance(tokens, list) or not all(str(token).startswith("token_id:") for token in tokens):
        return None
    return [int(token.removeprefix("token_id:")) for token in tokens]
