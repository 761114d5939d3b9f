"""A teacher's call in two checkouts, in turns, on one thread of a CPU: processor time and peak bytes.

    python benchmarks/prefix_copies.py before=/path/to/one after=/path/to/other results.jsonl
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

CONTEXTS, BATCH, RESPONSE, LAYERS, ROUNDS = (512, 2048, 8192), 16, 40, 6, 3
NOTE = f"Times are of the processor. Shape of SmolLM2-135M with {LAYERS} of its 30 layers, random weights."


def measure():
    """In one checkout: {context: [seconds of each call, peak bytes]}."""
    import torch
    from memory_record import peak_bytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from opcd_fast.teacher import ContextTeacher

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=1000, max_position_embeddings=16384)
    model, found = LlamaForCausalLM(config).eval(), {}
    ids, bounds = torch.randint(1000, (BATCH * RESPONSE,)), torch.arange(BATCH + 1) * RESPONSE
    for context in CONTEXTS:
        teacher, seconds = ContextTeacher(model, torch.randint(1000, (context,)), path="merge"), []
        for _ in range(5):
            start = time.process_time()
            teacher.hidden_states_packed(ids, bounds)
            seconds.append(time.process_time() - start)
        found[context] = seconds[1:], peak_bytes(lambda: teacher.hidden_states_packed(ids, bounds))  # noqa: B023
    return found


def compare(trees, out):
    import torch

    from benchmarks.environment import describe, git_state, versions
    from benchmarks.schema import Head, Row, Value, append, end

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = replace(describe(torch.device("cpu")), count_of_processors=1)
    append(out, Head("prefix", now, " ".join(["python", *sys.argv]), *git_state(), device, versions(), notes=[NOTE]))
    runs = {name: [] for name in trees}
    for name, tree in [*trees.items()] * ROUNDS:
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree}/tests/support", "OMP_NUM_THREADS": "1"}
        told = subprocess.check_output([sys.executable, __file__], env=environment, cwd=tree)
        runs[name].append(json.loads(told.splitlines()[-1]))
    rows = []
    for context, name in [(c, name) for c in CONTEXTS for name in trees]:
        times = [1e3 * seconds for run in runs[name] for seconds in run[str(context)][0]]
        values = {
            "time": Value(statistics.median(times), "ms", min(times), max(times), len(times)),
            "peak": Value(runs[name][-1][str(context)][1], "bytes"),
        }
        shape = {"context": context, "response": RESPONSE, "batch": BATCH, "layers": LAYERS}
        settings = {"model": "SmolLM2-135M", "dtype": "float32"}
        case = f"{context}x{RESPONSE}x{BATCH}"
        rows.append(Row("prefix", case, name, group="main", shape=shape, settings=settings, values=values))
        append(out, rows[-1])
    append(out, end("prefix", rows))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(measure()))
    else:
        compare(dict(argument.split("=") for argument in sys.argv[1:-1]), Path(sys.argv[-1]))
