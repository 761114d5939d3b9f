"""What a teacher's call costs in two checkouts: processor time and peak bytes, in turns, on one thread of a CPU.

    python benchmarks/prefix_copies.py before=/path/to/one after=/path/to/other rounds=3 out=results.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONTEXTS, BATCH, RESPONSE, LAYERS = (512, 2048, 8192), 16, 40, 6


def work() -> None:
    """In one checkout: {context: [[seconds of each call], peak bytes]} as JSON."""
    import torch
    from memory_record import peak_bytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from opcd_fast.teacher import ContextTeacher

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=1000, max_position_embeddings=16384)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (BATCH * RESPONSE,))
    bounds = torch.arange(BATCH + 1) * RESPONSE
    found = {}
    for context in CONTEXTS:
        teacher = ContextTeacher(model, torch.randint(1000, (context,)), path="merge")
        teacher.hidden_states_packed(ids, bounds)
        seconds = []
        for _ in range(4):
            start = time.process_time()
            teacher.hidden_states_packed(ids, bounds)
            seconds.append(time.process_time() - start)
        found[context] = seconds, peak_bytes(lambda: teacher.hidden_states_packed(ids, bounds))  # noqa: B023
    print(json.dumps(found))


def main(trees: dict[str, str], rounds: int, out: str) -> None:
    import torch

    from benchmarks.environment import start_report
    from benchmarks.schema import TeacherRow, Time

    seconds: dict[tuple[int, str], list[float]] = {(c, name): [] for c in CONTEXTS for name in trees}
    peaks: dict[tuple[int, str], int] = {}
    for _ in range(rounds):
        for name, tree in trees.items():
            path = {"PYTHONPATH": f"{tree}{os.pathsep}{tree}/tests/support", "OMP_NUM_THREADS": "1"}
            told = subprocess.check_output([sys.executable, __file__], env={**os.environ, **path}, cwd=tree)
            for context, (times, peak) in json.loads(told.splitlines()[-1]).items():
                seconds[int(context), name] += times
                peaks[int(context), name] = peak
    notes = ["Times are of the processor, one thread. Shape of SmolLM2-135M with 6 of its 30 layers, random weights."]
    command = f"python benchmarks/prefix_copies.py before=… after=… rounds={rounds} out=…"
    report = start_report("prefix", command, torch.device("cpu"), notes)
    for (context, name), times in seconds.items():
        ms = Time(*(1e3 * f(times) for f in (statistics.median, min, max)), len(times))
        case = f"{context}x{RESPONSE}x{BATCH}", name, "SmolLM2-135M", LAYERS, context, RESPONSE, BATCH, "float32"
        note = "its numbers are compared by the tests"
        report.teacher.append(TeacherRow(*case, time_ms=ms, peak_bytes=peaks[context, name], note=note))
    report.complete = True
    report.write(Path(out))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        work()
    else:
        given = dict(argument.split("=") for argument in sys.argv[1:])
        out, rounds = given.pop("out"), int(given.pop("rounds", 4))
        main(given, rounds, out)
