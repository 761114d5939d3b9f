"""`opcd train` in a process of its own: killed at random moments it loses nothing, and what it makes is the same bits.
A full disk or a folder that cannot be written ends it with one line and its checkpoints as they were."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from rank_runs import environment
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_runs import lines_of

from opcd_fast.cli import main
from opcd_fast.training.run import checkpoints as checkpoint


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Files of a job, and the arguments that train on them."""
    folder = tmp_path_factory.mktemp("job")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "context.txt").write_text("always answer with zzz")
    for name, count in (("prompts", 6), ("held_out", 2)):
        rows = [json.dumps({"prompt": f"{name} number {i}"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return [
        "train", "--model", str(folder / "model"), "--context", str(folder / "context.txt"),
        "--prompts", str(folder / "prompts.jsonl"), "--eval-prompts", str(folder / "held_out.jsonl"),
        "--batch-size", "4", "--max-new-tokens", "6", "--lora-rank", "4", "--learning-rate", "1e-2",
        "--eval-every", "3", "--save-every", "2", "--device", "cpu", "--dtype", "float32", "--save-best",
        "--early-stop-patience", "50", "--teacher-mode", "ema", "--teacher-ema-decay", "0.9",
    ]  # fmt: skip


def start(arguments, **options):
    """The command in an interpreter of its own."""
    command = [sys.executable, "-m", "opcd_fast.cli", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**environment(), "CUDA_VISIBLE_DEVICES": ""}, **pipes, **options)


class Fork:
    """The command in a copy of a process that has imported everything: a second instead of ten."""

    def __init__(self, arguments):
        self._process = CONTEXT.Process(target=run_forked, args=(arguments,))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self._process.exitcode


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "accelerate", "peft", "transformers.models.llama.modeling_llama", "tyro", "opcd_fast.training.trainer"]
)


def run_forked(arguments):
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.exit(main(arguments))


def state_of(folder):
    """Everything that a run leaves, but for times."""
    records = lines_of(folder)
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    optimizer = torch.load(newest / checkpoint.OPTIMIZER, weights_only=True)["state"]
    weights = {
        f"{file.relative_to(folder)} {name}": value.numpy().tobytes()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
        if file.parent.name in ("final", "best", newest.name)
    }
    moments = {f"{i} {n}": v.numpy().tobytes() for i, values in optimizer.items() for n, v in values.items()}
    best = json.loads((folder / "best" / "best.json").read_text())
    left = sorted(path.name for path in folder.iterdir())
    return {"records": records, "weights": weights, "moments": moments, "best": best["step"], "left": left}


def run_until_done(launch, job, folder, steps, rng, kills, patience):
    """Start, kill within `patience` seconds of the first sign of work, and start again; how often it was killed."""
    killed = 0
    while True:
        resume = ["--resume"] if checkpoint.list_checkpoints(folder / "checkpoints") else []
        before = signs(folder)
        process = launch([*job, "--output-dir", str(folder), "--steps", str(steps), *resume])
        if killed < kills:
            until_it_works(process, folder, before)
            time.sleep(rng.uniform(0, patience))
        if killed < kills and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert process.wait() == 0
        return killed


def signs(folder):
    return [(path.name, path.stat().st_mtime_ns) for path in (folder, folder / "config.json") if path.exists()]


def until_it_works(process, folder, before):
    while process.poll() is None and signs(folder) == before:
        time.sleep(0.005)


def check_kills(launch, job, tmp_path, steps, kills):
    process = launch([*job, "--output-dir", str(tmp_path / "whole"), "--steps", str(steps)])
    until_it_works(process, tmp_path / "whole", [])
    start = time.monotonic()
    assert process.wait() == 0
    patience = time.monotonic() - start  # kills fall anywhere in a run, however loaded the machine is
    whole = state_of(tmp_path / "whole")
    assert len([r for r in whole["records"] if r["kind"] == "step"]) == steps and whole["weights"]
    rng, left, runs = random.Random(time.time_ns()), kills, 0
    while left:
        folder = tmp_path / f"killed-{runs}"
        killed = run_until_done(launch, job, folder, steps, rng, left, patience)
        assert state_of(folder) == whole
        left, runs = left - killed, runs + 1
        assert runs < 4 * kills, "the run is over before it can be killed"


def test_three_kills_change_no_bit(job, tmp_path):
    check_kills(Fork, [*job, "--no-plots"], tmp_path, steps=14, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twenty interpreters and more
def test_twenty_kills_change_no_bit(job, tmp_path):
    check_kills(start, job, tmp_path, steps=40, kills=20)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_says_how_to_go_on(job, tmp_path, number, status):
    process = start([*job, "--output-dir", str(tmp_path / "run"), "--steps", "100000", "--no-plots"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == status
    step = int(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.removeprefix("step-"))
    assert f"opcd: stopped; step {step} is saved, go on with --resume" in said and "Traceback" not in said


def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(job, tmp_path):
    """No file may grow beyond what a checkpoint's need: from there on every write of more fails, as on a full disk."""
    arguments = [*job, "--output-dir", str(tmp_path / "run"), "--no-plots"]
    assert Fork([*arguments, "--steps", "2"]).wait() == 0
    kept = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    limit = max(len(content) for content in before.values()) // 2

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start([*arguments, "--steps", "4", "--resume"], preexec_fn=small)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "opcd: cannot write" in said and "Traceback" not in said
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest == kept and {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert not [path for path in kept.parent.iterdir() if path != kept], "nothing half written stays"
    assert Fork([*arguments, "--steps", "4", "--resume"]).wait() == 0


def test_what_cannot_start_says_why(job, tmp_path, capsys):
    (tmp_path / "occupied").write_text("mine")
    for arguments, words in (
        (["--output-dir", str(tmp_path / "occupied" / "run")], "occupied"),
        (["--output-dir", str(tmp_path / "occupied")], "is a file; choose another"),
        (["--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main([*job, *arguments, "--steps", "2", "--no-plots"]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("opcd: ") and words in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"] and (tmp_path / "occupied").read_text() == "mine"
