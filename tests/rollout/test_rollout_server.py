"""The server engine against real server processes: right answers, and every way in which a server can fail."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.rollout import LoRAWeights, ServerGone, ServerRollout

PROMPTS = [[7, 9, 11], [13, 17, 19, 23], [29], [31, 37], [41, 43, 47], [53, 59]]


class FixedWeights:
    """The server's own, which never change."""

    def __init__(self, model_name):
        self.model_name = model_name

    def push(self, server, model):
        return self.model_name

    def lost(self, server, name):
        raise InputError(f"{name} is not served")


class Process:
    """tests/rollout/completion_server.py, on a port that stays the same when it is started again."""

    def __init__(self, folder):
        script = Path(__file__).with_name("completion_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.port = 0
        self.start()

    def start(self):
        print(self.port, file=self.process.stdin, flush=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for_death(self):
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                return
            time.sleep(0.05)
        raise AssertionError("the server is still there")

    def faults(self, *names):
        httpx.post(f"{self.url}/test/faults", json=names).raise_for_status()

    def cards(self, *cards):
        httpx.post(f"{self.url}/test/cards", json=list(cards)).raise_for_status()

    def log(self, since=0):
        return httpx.get(f"{self.url}/test/log").json()[since:]

    def stop(self):
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    server = Process(folder)
    yield server
    server.stop()


@pytest.fixture
def server(running):
    running.faults()
    running.cards()
    return running


def rollout(server, weights=None, **options):
    usual = {"stop_token_ids": [256, *range(0, 250, 7)], "first_pause": 0.01, "tries": 4, "timeout": 20, "patience": 20}
    options = {**usual, **options}
    engine = ServerRollout(server.url, weights=weights or FixedWeights("base"), **options)
    if weights is None:
        engine.sync(None)
    return engine


def completions(server, since):
    return [entry for entry in server.log(since) if entry[0] == "completion"]


def assert_drawn_by(model, prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=1e-4)


def test_answers_are_the_models(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # not for a rollout server
    monkeypatch.setenv("NO_PROXY", "")
    engine = rollout(server)
    answers = engine.generate(PROMPTS, max_new_tokens=6, seed=3)
    monkeypatch.undo()
    assert {a.finished for a in answers} == {True, False}
    assert_drawn_by(tiny_model(), PROMPTS, answers)
    asked = [entry[1] for entry in completions(server, -len(PROMPTS))]
    assert sorted(body["prompt"] for body in asked) == sorted(PROMPTS)
    assert len({body["seed"] for body in asked}) == len(PROMPTS)
    # What a server would otherwise take from the model's generation_config.
    neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    assert {**neutral, "frequency_penalty": 0, "max_tokens": 6}.items() <= asked[0].items()


def test_a_password_is_sent_and_not_shown(server):
    engine = rollout(SimpleNamespace(url=server.url.replace("//", "//me:secret@") + "/v1"))
    assert engine.generate(PROMPTS[:1], max_new_tokens=1)
    assert server.url.removeprefix("http://") in engine.explain() and "secret" not in engine.explain()
    server.faults("400")
    with pytest.raises(InputError) as error:
        engine.generate(PROMPTS[:1], max_new_tokens=1)
    assert "secret" not in str(error.value)


def test_the_seed_decides(server):
    engine = rollout(server, concurrency=3)
    first = engine.generate(PROMPTS, max_new_tokens=4, seed=1)
    assert rollout(server, concurrency=1).generate(PROMPTS, max_new_tokens=4, seed=1) == first
    assert engine.generate(PROMPTS, max_new_tokens=4, seed=2) != first
    same = engine.generate([PROMPTS[0]] * 6, max_new_tokens=4, seed=1)
    assert len({a.token_ids for a in same}) > 1, "answers to one prompt are drawn independently"


@pytest.mark.parametrize(
    ("logprobs_are", "sampling", "known"),
    [
        ("raw", {"logprobs": False}, False), ("raw", {"temperature": 0.7}, False), ("raw", {"top_p": 0.9}, False),
        ("raw", {"temperature": 0.0}, True), ("processed", {"temperature": 0.7}, True),
    ],
)  # fmt: skip
def test_logprobs_are_passed_on_only_where_they_are_the_samplers(server, logprobs_are, sampling, known):
    engine = rollout(server, logprobs_are=logprobs_are)
    (answer,) = engine.generate(PROMPTS[:1], max_new_tokens=3, **sampling)
    assert (answer.logprobs is not None) == known
    assert logprobs_are in engine.explain() and server.url in engine.explain()


@pytest.mark.parametrize("fault", ["500", "429", "cut", "reset", "garbage"])
def test_what_passes_is_tried_again_and_changes_nothing(server, fault):
    engine = rollout(server, concurrency=2)
    wanted = engine.generate(PROMPTS, max_new_tokens=4, seed=5)
    since = len(server.log())
    server.faults(fault, fault, fault)
    assert engine.generate(PROMPTS, max_new_tokens=4, seed=5) == wanted
    asked = completions(server, since)
    assert len(asked) == len(PROMPTS) + 3, "only what failed is asked for again"
    assert sum(entry[2] == fault for entry in asked) == 3
    good = [entry[1]["prompt"] for entry in asked if entry[2] is None]
    assert sorted(good) == sorted(PROMPTS), "each prompt was answered once"


def test_a_server_that_is_starting_is_waited_for_whatever_the_tries(server):
    wanted = rollout(server).generate(PROMPTS[:1], max_new_tokens=4, seed=5)
    since = len(server.log())
    server.faults(*["503"] * 5)
    assert rollout(server, tries=1).generate(PROMPTS[:1], max_new_tokens=4, seed=5) == wanted
    assert len(completions(server, since)) == 6
    server.faults(*["503"] * 50)
    with pytest.raises(ServerGone, match="HTTP 503: starting"):
        rollout(server, tries=100, patience=0.05).generate(PROMPTS[:1], max_new_tokens=4)
    server.faults()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "HTTP 500: engine died of something"), ("cut", "Protocol"), ("garbage", "no JSON"),
        ("slow", "no whole answer within 0.5 s"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_said(server, fault, message):
    server.faults(fault, fault)
    since = len(server.log())
    with pytest.raises(ServerGone, match=f"{server.url}.*{message}.*2 tries.*rollout_url") as error:
        rollout(server, tries=2, timeout=0.5 if fault == "slow" else 20).generate(PROMPTS[:1], max_new_tokens=4)
    assert "\n" not in str(error.value) and len(completions(server, since)) == 2


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_slow_answer_is_given_up_and_asked_again(server, fault):
    wanted = rollout(server).generate(PROMPTS[:2], max_new_tokens=4, seed=5)
    engine = rollout(server, timeout=1.5)
    server.faults(fault)
    started = time.monotonic()
    assert engine.generate(PROMPTS[:2], max_new_tokens=4, seed=5) == wanted
    assert 1.4 < time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("400", "refused a prompt .HTTP 400.: maximum context length is 8 tokens$"),
        ("422", "prompt must be a string.; a rollout server must take a prompt of token ids"),
        ("302", "redirects to http://elsewhere/; give that address as rollout_url"),
        ("text", "no token ids"),
        ("text tokens", "no token ids"),
        ("text ids", "token_ids must be token ids"),
        ("no choices", "not a completion"),
        ("no logprobs", "no log-probability"),
        ("bos", "the server read 4 prompt tokens, 3 were sent"),
        ("abort", "finish_reason is 'abort'"),
        ("no stop token", "stop token 256 is missing"),
        ("other stop", "ends at token 6, .* stop_tokens"),
        ("past stop", "goes on after the stop token 256"),
        ("short", "cut after 1 tokens, 4 were asked for"),
        ("empty", "empty"),
        ("foreign", "drew token 100000"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_errors(server, fault, message):
    since = len(server.log())
    server.faults(fault)
    with pytest.raises(InputError, match=message) as error:
        rollout(server, vocab_size=261, stop_token_ids=[256], concurrency=1).generate(PROMPTS[:1], max_new_tokens=4)
    assert "\n" not in str(error.value) and len(completions(server, since)) == 1, "asking again would not help"


def test_ids_in_the_form_of_older_servers(server):
    engine = rollout(server)
    wanted = engine.generate(PROMPTS[:1], max_new_tokens=4, seed=2)
    server.faults("old")
    assert engine.generate(PROMPTS[:1], max_new_tokens=4, seed=2) == wanted


def test_an_error_ends_the_batch_without_waiting_for_the_rest(server):
    server.faults("slow", "400")
    started = time.monotonic()
    with pytest.raises(InputError, match="maximum context"):
        rollout(server, timeout=25, concurrency=2).generate(PROMPTS[:2], max_new_tokens=2)
    assert time.monotonic() - started < 10


def test_weights_come_first_and_an_unknown_model_is_asked_for_once_more(server):
    engine = rollout(server, FixedWeights("nobody"))
    with pytest.raises(InputError, match=r"call sync\(model\)"):
        engine.generate(PROMPTS, max_new_tokens=1)
    engine.sync(None)
    with pytest.raises(InputError, match="nobody is not served"):
        engine.generate(PROMPTS[:1], max_new_tokens=1)


def test_death_in_the_middle_and_a_restart(server, tmp_path):
    """The new process knows no adapter: it is given again, and only the missing answers are asked for."""
    engine = rollout(server, LoRAWeights(tmp_path / "adapters"), concurrency=2, tries=2, patience=60)
    engine.sync(lora_model())
    wanted = engine.generate(PROMPTS * 2, max_new_tokens=5, seed=9)
    server.faults(None, None, None, None, "die")
    result = []
    caller = threading.Thread(
        target=lambda: result.append(engine.generate(PROMPTS * 2, max_new_tokens=5, seed=9)), daemon=True
    )
    caller.start()
    server.wait_for_death()
    server.start()
    caller.join(timeout=60)
    assert result == [wanted]
    log = [entry[0] for entry in server.log()]  # of the new process alone
    assert log.count("load") == 1
    again = log[log.index("load") :].count("completion")
    assert 6 <= again <= 9, "three or four were answered before, and are not asked for again"


def test_death_for_good_is_one_line_after_a_line_in_the_log(server, caplog):
    engine = rollout(server, tries=1000, patience=1.5)
    server.faults("die")
    started = time.monotonic()
    with pytest.raises(ServerGone, match=f"{server.url}: .*Connection refused .*tries.*start it again") as error:
        engine.generate(PROMPTS, max_new_tokens=3)
    assert "\n" not in str(error.value) and 1.5 < time.monotonic() - started < 15
    (said,) = [record.getMessage() for record in caplog.records if record.name == "opcd_fast"]
    assert "Connection refused" in said and "up to 1.5 s" in said and server.url in said
    server.start()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rollout_url", "127.0.0.1:8000"), ("rollout_url", "http://a:b"), ("timeout", 0), ("tries", 0),
        ("patience", -1), ("concurrency", 0), ("logprobs_are", "cooked"), ("stop_token_ids", []),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(setting, value):
    settings = {"rollout_url": "http://127.0.0.1:1", "stop_token_ids": [1], "weights": None, setting: value}
    with pytest.raises(InputError, match=setting):
        ServerRollout(settings.pop("rollout_url"), **settings)


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError, match=r"httpx: pip install .*\[train\]'"):
        ServerRollout("http://127.0.0.1:1", stop_token_ids=[1], weights=None)
