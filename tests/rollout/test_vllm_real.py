"""Runs with a real vLLM: `scripts/vllm_check.sh` makes its environment and names its Python in OPCD_VLLM_PYTHON.

Everything is float32 on the CPU, so that the server's numbers and the trainer's can be compared closely.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from tiny import logprobs_by_hand

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.models import load_model, load_tokenizer, resolve
from opcd_fast.rollout import ServerGone
from opcd_fast.training import OPCDConfig, OPCDTrainer

PYTHON = os.environ.get("OPCD_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm, pytest.mark.timeout(1500),
    pytest.mark.skipif(PYTHON is None, reason="OPCD_VLLM_PYTHON names no environment; see scripts/vllm_check.sh"),
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [f"What is {a} plus {b}?" for a, b in ((2, 3), (4, 1), (7, 2), (5, 5))]
CONTEXT = "Answer like a pirate, in one short sentence."
CLOSE = 1e-3  # nats between the server's log-probability of a token and ours
SAMPLER_KL = 1e-4  # of the same weights in float32; another base: 0.8
numbers: dict = {}


class Server:
    """vLLM's own server in a process group of its own, on a port that stays the same when it is started again."""

    def __init__(self, folder: Path, *options: str, model: str = "smollm2") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "vllm.log"
        self.command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve(model), "--host", "127.0.0.1",
            "--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
            "--enforce-eager", *options,
        ]  # fmt: skip

    def start(self) -> None:
        settings = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> float:
        """Seconds until it answered."""
        started = time.monotonic()
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                httpx.get(f"{self.url}/v1/models", trust_env=False).raise_for_status()
                return time.monotonic() - started
            except httpx.HTTPError:
                assert time.monotonic() - started < 600, self.log.read_text()[-3000:]
                time.sleep(0.5)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Server":
        self.start()
        self.seconds = self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(scope="module", autouse=True)
def result():
    import peft
    import transformers

    numbers.update(date=time.strftime("%Y-%m-%d"), model="SmolLM2-135M-Instruct, float32", device="CPU")
    numbers["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    yield
    if path := os.environ.get("OPCD_VLLM_RESULT"):
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), "--enable-lora", "--max-lora-rank", "8") as running:
        numbers["vllm"] = httpx.get(f"{running.url}/version").json()["version"]
        numbers["seconds until the server answered"] = round(running.seconds)
        yield running


def trainer(folder, server, name="smollm2", **settings):
    options = {
        "output_dir": str(folder), "steps": 3, "batch_size": 4, "max_new_tokens": 12, "lora_rank": 4, "plots": False,
        "dtype": "float32", "device": "cpu", "eval_every": 0, "save_every": 0, "learning_rate": 2e-3,
        "rollout": "server", "rollout_url": server.url, "rollout_patience": 600, **settings,
    }  # fmt: skip
    model, tokenizer = load_model(name, dtype="float32", device="cpu"), load_tokenizer(name)
    return OPCDTrainer(model, tokenizer, CONTEXT, PROMPTS, OPCDConfig(**options), quiet=True)


def watched(run):
    """`run`, and for each step the largest distance of its answers' log-probabilities from ours at that moment."""
    distances, inner = [], run.rollout.generate

    def spy(prompts, **sampling):
        answers = inner(prompts, **sampling)
        ours = [logprobs_by_hand(run.model, list(p), list(a.token_ids), 1.0) for p, a in zip(prompts, answers)]
        distances.append(max(float((o - o.new_tensor(a.logprobs)).abs().max()) for o, a in zip(ours, answers)))
        return answers

    run.rollout.generate = spy
    return distances


def test_three_steps_a_kill_and_a_restart(server, tmp_path):
    run = trainer(tmp_path / "run", server)
    distances = watched(run)

    def kill_after_the_first(record):
        if record["step"] == 1:
            server.kill()
            server.start()
        elif record["step"] == 2:  # for good
            server.kill()
            run.rollout.server.patience = 1.0

    run.callbacks += (kill_after_the_first,)
    with pytest.raises(ServerGone, match=r"Connection refused.*\(step 2 is saved\)"):
        run.train()
    server.start()
    numbers["seconds until a restarted server answered"] = round(server.wait())
    again = trainer(tmp_path / "run", server, resume=True)
    more = watched(again)
    history = again.train().history
    distances += more
    numbers["largest distance of a token's log-probability, by step"] = [float(f"{d:.2g}") for d in distances]
    numbers["sampler_kl, by step"] = [float(f"{record['sampler_kl']:.2g}") for record in history]
    assert len(distances) == len(history) == 3 and max(distances) < CLOSE
    assert max(abs(record["sampler_kl"]) for record in history) < SAMPLER_KL
    first, *later = (record["loss"] for record in history)
    assert all(loss != first for loss in later)

    # The same run again, in another folder, once the first one is gone.
    shutil.rmtree(tmp_path / "run")
    other = trainer(tmp_path / "other", server, steps=1)
    distances = watched(other)
    other.train()
    assert distances[0] < CLOSE and server.process.poll() is None
    served_again(server, tmp_path / "other", tmp_path)


def served_again(server, run, scratch):
    """Export, serve there, and compare greedy answers."""
    adapter = scratch / "adapter"
    assert main(["export", str(run), "--output-dir", str(adapter)]) == 0
    body = {"lora_name": "exported", "lora_path": str(adapter)}
    httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).raise_for_status()
    prompts, out = scratch / "prompts.jsonl", scratch / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    with open(out, "w") as file:
        command = ["generate", "--model", str(adapter), "--prompts", str(prompts), "--max-new-tokens", "24"]
        code = f"import sys; from opcd_fast.cli import main; sys.exit(main({[*command, '--dtype', 'float32']!r}))"
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, cwd=ROOT)
    ours = [json.loads(line)["answer"] for line in out.read_text().splitlines() if line.startswith("{")]
    theirs = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        asked = {"model": "exported", "messages": messages, "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=120).raise_for_status().json()
        theirs.append(reply["choices"][0]["message"]["content"])
    numbers["greedy answers of the exported adapter that agree, of 4"] = sum(map(str.__eq__, ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 16}, "rank 16 is greater than max_lora_rank 8.*start it with --max-lora-rank 16"),
        ({"rollout_model": "Qwen/Qwen3-8B"}, "and the run trains 'Qwen/Qwen3-8B'"),
        ({"max_new_tokens": 1024}, "has room for 1024 tokens.*start it with --max-model-len 1"),
    ],
)
def test_what_this_server_cannot_do_is_said_before_the_first_step(server, tmp_path, settings, message):
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        trainer(tmp_path / "run", server, **settings).train()
    assert time.monotonic() - started < 60 and server.process.poll() is None


def test_another_base_and_other_logprobs_are_told_of_at_the_first_step(server, tmp_path):
    changed = trainer(tmp_path / "base", server, steps=1)
    changed.model.get_base_model().model.norm.weight.data.mul_(2)
    other = trainer(tmp_path / "logprobs", server, steps=1, temperature=0.5, rollout_logprobs="processed")
    for run, name in ((changed, "another base"), (other, "raw for processed log-probabilities")):
        result = run.train()
        assert [warning["name"] for warning in result.warnings] == ["sampler_differs"], name
        numbers[f"sampler_kl of {name}"] = round(result.history[0]["sampler_kl"], 2)


def test_full_fine_tuning_reloads_the_weights(tmp_path):
    """With a head of its own: the CPU build of vLLM keeps a copy of one that is tied, which `reload_weights` leaves."""
    base, untied = load_model("smollm2", dtype="float32", device="cpu"), str(tmp_path / "untied")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    base.save_pretrained(untied)
    load_tokenizer("smollm2").save_pretrained(untied)
    with Server(tmp_path, "--block-size", "32", model=untied) as server:  # so that short prompts are kept
        command = f"{ROOT / 'scripts' / 'vllm_reload.sh'} {server.url}"
        run = trainer(
            tmp_path / "run", server, untied, lora_rank=0, rollout_command=command, learning_rate=1e-4, steps=2
        )
        distances = watched(run)
        result = run.train()
        name = "full fine-tuning: largest distance of a token's log-probability, by step"
        numbers[name] = [float(f"{d:.2g}") for d in distances]
        assert len(distances) == 2 and max(distances) < CLOSE and result.warnings == []


IN_PROCESS = """
import json, os, psutil, signal, threading
from opcd_fast.models import load_model, load_tokenizer
from opcd_fast.training import OPCDConfig, OPCDTrainer

def run(folder, prompts, context):
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu"), load_tokenizer("smollm2")
    config = OPCDConfig(
        output_dir=folder, steps=2, batch_size=4, max_new_tokens=12, lora_rank=4, plots=False, dtype="float32",
        device="cpu", eval_every=0, save_every=0, learning_rate=2e-3, rollout="vllm", rollout_gpu_share=0.1,
    )
    trainer = OPCDTrainer(model, tokenizer, context, prompts, config, quiet=True)
    print("KL", json.dumps([record["sampler_kl"] for record in trainer.train().history]), flush=True)
    for engine in psutil.Process().children(recursive=True):
        engine.kill()
    interrupt = threading.Timer(20, os.kill, (os.getpid(), signal.SIGINT))  # vLLM may wait for an engine that is gone
    interrupt.start()
    try:
        trainer.rollout.generate([[1, 2, 3]], max_new_tokens=4)
    except BaseException as error:
        print("ENDED BY", type(error).__name__, flush=True)
    interrupt.cancel()

"""


@pytest.mark.parametrize("guarded", [True, False])
def test_in_process(tmp_path, guarded):
    script = tmp_path / "script.py"
    call = f"run({str(tmp_path / 'run')!r}, {PROMPTS!r}, {CONTEXT!r})\n"
    script.write_text(IN_PROCESS + (f"if __name__ == '__main__':\n    {call}" if guarded else call))
    settings = {
        "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, str(script)], env={**os.environ, **settings}, capture_output=True, text=True, timeout=900
    )
    if guarded:
        found = re.search(r"^KL (.*)$", done.stdout, re.M)
        assert found, done.stdout[-2000:] + done.stderr[-4000:]
        numbers["in process: sampler_kl, by step"] = [float(f"{kl:.2g}") for kl in json.loads(found[1])]
        assert max(map(abs, json.loads(found[1]))) < SAMPLER_KL
        assert "ENDED BY" in done.stdout and done.returncode == 0, "Ctrl-C ends a run whose engine died"
    else:
        assert done.returncode and "if __name__ == '__main__'" in done.stderr
