"""The server engine against real server processes: right answers, and every way in which a server can fail."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from tiny import logprobs_by_hand, lora_model, tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.rollout.http import JsonServer, Refused, ServerGone
from opcd_fast.rollout.server import ServerRollout
from opcd_fast.rollout.weights import CommandWeights, LoRAWeights

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
        httpx.post(f"{self.url}/test/faults", json=list(names))

    def log(self, since=0):
        return httpx.get(f"{self.url}/test/log").json()[since:]

    def stop(self):
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def running(folder):
    server = Process(folder)
    yield server
    server.stop()


@pytest.fixture
def server(running):
    running.faults()
    return running


def rollout(server, weights=None, **options):
    options = {"stop_token_ids": [256, *range(0, 250, 7)], "first_pause": 0.01, "tries": 4, "timeout": 20, **options}
    engine = ServerRollout(server.url, weights=weights or FixedWeights("base"), **options)
    if weights is None:
        engine.sync(None)
    return engine


def completions(server, since):
    return [entry for entry in server.log(since) if entry[0] == "completion"]


def test_answers_are_the_models(server):
    since = len(server.log())
    answers = rollout(server).generate(PROMPTS, max_new_tokens=6, seed=3)
    assert {a.finished for a in answers} == {True, False}
    for prompt, answer in zip(PROMPTS, answers):
        wanted = logprobs_by_hand(tiny_model(), prompt, list(answer.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=1e-4)
    asked = [entry[1] for entry in completions(server, since)]
    assert sorted(body["prompt"] for body in asked) == sorted(PROMPTS)
    assert len({body["seed"] for body in asked}) == len(PROMPTS)
    body = asked[0]
    # What a server would otherwise take from the model's generation_config.
    neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    assert neutral.items() <= body.items() and body["frequency_penalty"] == 0 and body["max_tokens"] == 6


def test_the_seed_decides(server):
    engine = rollout(server, concurrency=3)
    first = engine.generate(PROMPTS, max_new_tokens=4, seed=1)
    assert rollout(server, concurrency=1).generate(PROMPTS, max_new_tokens=4, seed=1) == first
    assert engine.generate(PROMPTS, max_new_tokens=4, seed=2) != first
    same = engine.generate([PROMPTS[0]] * 6, max_new_tokens=4, seed=1)
    assert len({a.token_ids for a in same}) > 1, "answers to one prompt are drawn independently"


def test_logprobs_are_passed_on_only_where_they_are_the_samplers(server):
    engine = rollout(server)
    assert engine.generate(PROMPTS[:1], max_new_tokens=3, logprobs=False)[0].logprobs is None
    assert engine.generate(PROMPTS[:1], max_new_tokens=3, temperature=0.7)[0].logprobs is None
    assert engine.generate(PROMPTS[:1], max_new_tokens=3, top_p=0.9)[0].logprobs is None
    assert engine.generate(PROMPTS[:1], max_new_tokens=3, temperature=0.0)[0].logprobs is not None
    processed = rollout(server, logprobs_are="processed")
    assert processed.generate(PROMPTS[:1], max_new_tokens=3, temperature=0.7)[0].logprobs is not None
    assert "raw" in engine.explain() and server.url in engine.explain()


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


@pytest.mark.parametrize(
    ("fault", "message"),
    [("500", "HTTP 500: engine died of something"), ("cut", "RemoteProtocolError"), ("garbage", "is no JSON")],
)
def test_what_does_not_pass_is_said(server, fault, message):
    server.faults(fault, fault)
    with pytest.raises(ServerGone, match=f"{message}.*2 tries") as error:
        rollout(server, tries=2).generate(PROMPTS[:1], max_new_tokens=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_slow_answer_is_given_up_and_asked_again(server, fault):
    engine = rollout(server)
    wanted = engine.generate(PROMPTS[:2], max_new_tokens=4, seed=5)
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
        ("text", "no token ids; a rollout server must .* return token ids"),
        ("text tokens", "no token ids; a rollout server must .* return token ids"),
        ("text ids", "are not whole numbers"),
        ("no choices", "not a completion"),
        ("no logprobs", "no log-probability for every token"),
        ("bos", "the server read 4 prompt tokens, 3 were sent"),
        ("abort", "finish_reason is 'abort'"),
        ("no stop token", "stop token 256 is missing"),
        ("other stop", "ends at token 6, which is no stop token"),
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


def test_an_unknown_model_is_named(server):
    with pytest.raises(InputError, match="nobody is not served"):
        engine = rollout(server, FixedWeights("nobody"))
        engine.sync(None)
        engine.generate(PROMPTS[:1], max_new_tokens=1)


def test_generate_needs_weights_first(server):
    with pytest.raises(InputError, match=r"call sync\(model\)"):
        rollout(server, FixedWeights("base")).generate(PROMPTS, max_new_tokens=1)


def move(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


def test_the_adapter_follows(server, tmp_path):
    model = lora_model()
    engine = rollout(server, LoRAWeights(tmp_path / "adapters"))
    since = len(server.log())
    for _ in range(2):
        engine.sync(model)
        engine.sync(model)  # nothing moved: nothing is sent
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=5)):
            wanted = logprobs_by_hand(model, prompt, list(answer.token_ids), 1.0)
            torch.testing.assert_close(torch.tensor(answer.logprobs).double(), wanted, atol=1e-4, rtol=1e-4)
        move(model, -3)
    moves = [entry for entry in server.log(since) if entry[0] != "completion"]
    assert [kind for kind, _ in moves] == ["load", "load", "unload"]
    first, second, gone = (name for _, name in moves)
    assert first != second and gone == first
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [second]
    with pytest.raises(InputError, match="set lora_rank, or use .* rollout_command"):
        engine.sync(tiny_model())


def test_death_in_the_middle_and_a_restart(server, tmp_path):
    """The new process knows no adapter: it is given again, and only the missing answers are asked for."""
    model = lora_model()
    engine = rollout(server, LoRAWeights(tmp_path / "adapters"), concurrency=2, tries=12, first_pause=0.2)
    engine.sync(model)
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
    log = server.log()  # of the new process alone
    assert [entry[0] for entry in log].count("load") == 1
    loaded = [entry[0] for entry in log].index("load")
    again = [entry for entry in log[loaded:] if entry[0] == "completion"]
    assert 6 <= len(again) <= 9, "three or four were answered before, and are not asked for again"


def test_death_for_good_is_one_line(server):
    engine = rollout(server, tries=3)
    server.faults("die")
    with pytest.raises(ServerGone, match=r"Connection refused \(POST /v1/completions, 3 tries in") as error:
        engine.generate(PROMPTS, max_new_tokens=3)
    assert "\n" not in str(error.value) and "start it again or correct rollout_url" in str(error.value)
    server.start()


def test_a_port_that_accepts_and_says_nothing():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ServerGone, match=r"no whole answer within 0.3 s .*2 tries"):
            JsonServer(url, timeout=0.3, tries=2, first_pause=0.01).post("/v1/completions", {})
        assert 0.5 < time.monotonic() - started < 5


def test_other_servers_get_the_weights_by_a_command(server, tmp_path):
    model = lora_model()
    note = tmp_path / "seen"
    code = f"import sys, os; open({str(note)!r}, 'a').write(' '.join(sorted(os.listdir(sys.argv[1]))) + '\\n')"
    script = tmp_path / "reload.py"
    script.write_text(code)
    engine = rollout(server, CommandWeights(tmp_path / "w", "base", f"{sys.executable} {script}"))
    engine.sync(model)
    engine.sync(model)
    assert note.read_text().count("adapter_model.safetensors") == 1
    move(model, 2)
    engine.sync(model)
    assert note.read_text().count("adapter_model.safetensors") == 2
    assert len(engine.generate(PROMPTS, max_new_tokens=2)) == len(PROMPTS)
    found = lambda path: "other" if (path / "config.json").exists() else None  # noqa: E731
    whole = CommandWeights(tmp_path / "whole", "base", found)
    assert whole.push(engine.server, tiny_model()) == "other"
    for command, message in [
        (f"{sys.executable} -c 'import sys; sys.exit(\"no such gpu\")'", "status 1: no such gpu"),
        ("/nowhere/reload", "cannot be run: No such file"),
    ]:
        with pytest.raises(InputError, match=message):
            CommandWeights(tmp_path / "x", "base", command).push(engine.server, model)
    with pytest.raises(InputError, match="did not end within 0.1 s"):
        slow = f"{sys.executable} -c 'import time; time.sleep(5)'"
        CommandWeights(tmp_path / "x", "base", slow, timeout=0.1).push(engine.server, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "rollout_url='127.0.0.1:8000' must look like"),
        ({"timeout": 0}, "rollout_timeout=0"),
        ({"tries": 0}, "rollout_tries=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"logprobs_are": "cooked"}, "logprobs_are='cooked'"),
        ({"stop_token_ids": []}, "stop_token_ids is empty"),
    ],
)
def test_settings_that_cannot_work(options, message):
    settings = {"url": "http://127.0.0.1:1", "stop_token_ids": [1], "weights": FixedWeights("m"), **options}
    with pytest.raises(InputError, match=message):
        ServerRollout(settings.pop("url"), **settings)


def test_a_server_without_lora_endpoints(tmp_path):
    class Bare:
        url = "http://bare"

        def post(self, path, body, stop=None):
            raise Refused(404, "Not Found")

    with pytest.raises(InputError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or give rollout_command"):
        LoRAWeights(tmp_path).push(Bare(), lora_model())


@pytest.mark.slow
def test_transformers_serve_is_refused_because_it_knows_text_only(tmp_path):
    """The real server of the transformers package: it takes text and gives text, so it must not be trained on."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        JsonServer(url, tries=60).post("/health", {})
        said = JsonServer(url).post("/v1/completions", {"model": str(tmp_path), "prompt": "abc", "max_tokens": 4})
        assert "token_ids" not in said["choices"][0], "it has learned to; support it"
        engine = ServerRollout(url, stop_token_ids=[256], weights=FixedWeights(str(tmp_path)))
        engine.sync(None)
        with pytest.raises(InputError, match="refused a prompt .* must take a prompt of token ids"):
            engine.generate([[1, 2, 3]], max_new_tokens=4)
    finally:
        process.kill()
        process.wait()
