"""Users, passwords, queries and commands that a run is given reach the server, and no file, log, tracker or message."""

import base64
import json
import logging
import re
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_rollout_run import trainer
from test_rollout_server import Process
from tiny import tiny_model

from opcd_fast.errors import InputError
from opcd_fast.rollout import CommandWeights, ServerRollout
from opcd_fast.rollout.http import JsonServer, ServerGone
from opcd_fast.training import OPCDConfig

SECRETS = ("uSer17", "pa55word", "q0uery", "c0mmand")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    process = Process(folder)
    yield process
    process.stop()


def secret_url(url):
    return url.replace("://", f"://{SECRETS[0]}:{SECRETS[1]}@") + f"?key={SECRETS[2]}"


def check_clean(text):
    assert not [secret for secret in SECRETS if secret in text], text


def test_a_run_leaves_no_secret_and_goes_on_when_they_are_given_again(tmp_path, server, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    told = []
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, *given, **more: told.append((given, more)))
    command = shlex.join([sys.executable, "-c", "pass", SECRETS[3]])
    settings = {
        "rollout": "server", "rollout_url": secret_url(server.url), "rollout_command": command, "rollout_model": "base",
        "trackers": ("tensorboard",), "save_every": 1, "eval_every": 0, "plots": True,
    }  # fmt: skip
    run = trainer(tmp_path / "run", **settings)
    check_clean(run.rollout.explain())
    run.train()
    assert re.search(r"http://\*+@127", run.rollout.explain())
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["rollout_url"].startswith("http://***@127.0.0.1:") and kept["rollout_command"] == "***"
    with pytest.raises(InputError, match="rollout_url is not kept .* give it again, --rollout-url"):
        OPCDConfig(**{**kept, "trackers": tuple(kept["trackers"]), "stop_tokens": ()})
    with pytest.raises(InputError, match="rollout_command is not kept .* give it again, --rollout-command"):
        OPCDConfig(**{**kept, "rollout_url": "http://x", "stop_tokens": ()})
    again = trainer(tmp_path / "run", **{**settings, "resume": True, "steps": 4, "rollout_command": command + " x"})
    assert again.train().steps == 4
    assert len(told) == 2 and "***" in str(told)
    check_clean(str(told) + caplog.text)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            check_clean(path.read_bytes().decode(errors="replace"))


class Handler(BaseHTTPRequestHandler):
    seen: list = []

    def do_POST(self):
        self.seen.append((self.path, self.headers.get("Authorization")))
        self.rfile.read(int(self.headers["Content-Length"]))
        redirects = self.path.startswith("/moved")
        body = b"" if redirects else b"{}"
        self.send_response(302 if redirects else 200)
        if redirects:
            self.send_header("Location", f"http://{SECRETS[0]}:{SECRETS[1]}@elsewhere/?key={SECRETS[2]}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_what_a_url_holds_is_sent(echo, caplog):
    caplog.set_level(logging.DEBUG)
    ServerRollout(secret_url(echo + "/v1/"), stop_token_ids=[1], weights=None).server.post("/v1/completions", {})
    words = base64.b64encode(f"{SECRETS[0]}:{SECRETS[1]}".encode()).decode()
    assert Handler.seen[-1] == (f"/v1/completions?key={SECRETS[2]}", f"Basic {words}")
    JsonServer(echo, api_key="k").post("/x", {})
    assert Handler.seen[-1] == ("/x", "Bearer k")
    check_clean(caplog.text)


def test_no_message_repeats_a_secret(echo, tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit(' '.join(sys.argv))", f"--key={SECRETS[3]}"]
    slow = [sys.executable, "-c", "import time; time.sleep(9)", SECRETS[3]]

    def command(words, limit=60.0):
        return lambda: CommandWeights(tmp_path, "m", shlex.join(words), timeout=limit).push(None, tiny_model())

    for wrong in (
        lambda: JsonServer(secret_url("http://127.0.0.1:1"), tries=1).post("/x", {}),
        lambda: JsonServer(secret_url("htp://127.0.0.1:1")),
        lambda: JsonServer(secret_url("://")[3:] + "host:1"),
        lambda: JsonServer(f"http://{SECRETS[0]}:{SECRETS[1]}/x@h:1"),
        lambda: JsonServer(secret_url(echo)).post("/moved", {}),
        command(failing), command(slow, 0.1), command(["/nowhere/" + SECRETS[3]]),
    ):  # fmt: skip
        with pytest.raises(Exception) as error:
            wrong()
        assert isinstance(error.value, (InputError, ServerGone)) or type(error.value).__name__ == "Refused"
        check_clean(str(error.value))


def test_a_trackers_key_is_in_no_message(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[1])

    def fail(*_, **__):
        raise RuntimeError(f"key {SECRETS[1]} refused by https://{SECRETS[0]}@api/?token={SECRETS[2]}")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(InputError, match="trackers cannot start.*refused") as error:
        trainer(tmp_path / "run", trackers=("tensorboard",)).train()
    check_clean(str(error.value))
