"""Decoding on a CPU by how products of few rows are made: SmolLM2-135M-Instruct, 16 tokens after prompts of 37.

- as loaded: weights stored row by row, x Wᵀ;
- turned: the same weights, (W xᵀ)ᵀ, which is what `opcd_fast.thin_products` does for 8 to 48 rows;
- input-major: a copy whose weights are stored the other way, as `opcd_fast.merged` makes it.

    python -m benchmarks.thin_products --out benchmarks/results/decoding     # cpu_<date>.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.measure import Failure, time_interleaved
from opcd_fast import decoding
from opcd_fast.thin_products import thin_products

ROWS = (4, 8, 16, 32, 48, 64)
PROMPT, TOKENS = 37, 16
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each number of rows")
    options = parser.parse_args()
    from opcd_fast.models import load_model

    loaded = load_model("smollm2", dtype="float32", device="cpu").eval()
    turned_copy = input_major(loaded)
    report = environment.start_report("decoding", "python -m benchmarks.thin_products", CPU, [])
    found: dict[str, Any] = {
        "benchmark": report.benchmark,
        "command": report.command,
        "commit": report.git_commit,
        "device": dataclasses.asdict(report.device),
        "versions": report.versions,
        "date": report.date,
        "rows": [],
    }
    for rows in ROWS:
        calls = {
            "as loaded": partial(answer, loaded, rows, left_alone),
            "turned": partial(answer, loaded, rows, thin_products),
            "input-major": partial(answer, turned_copy, rows, left_alone),
        }
        times = time_interleaved(calls, CPU, seconds=options.seconds)
        failed = [time for time in times.values() if isinstance(time, Failure)]
        if failed:
            raise SystemExit(f"benchmarks.thin_products: {failed[0].note}")
        row = {name: dataclasses.asdict(time) for name, time in times.items()}  # type: ignore[call-overload]
        found["rows"].append({"rows": rows, "ms": row})
        medians = {name: time["median"] for name, time in row.items()}
        print(rows, ", ".join(f"{name} {ms / medians['as loaded']:.2f}" for name, ms in medians.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cpu_{report.date[:10]}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


def answer(model: Any, rows: int, products: Callable[[Any], Any]) -> None:
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(1000, (rows, PROMPT), generator=generator).tolist()
    uniform = torch.rand(rows, TOKENS, dtype=torch.float64, generator=generator)
    kept = decoding.thin_products
    decoding.thin_products = products
    try:
        decoding.decode(model, prompts, uniform, stop_token_ids=[-1], temperature=1.0, top_p=1.0)
    finally:
        decoding.thin_products = kept


@contextlib.contextmanager
def left_alone(model: Any) -> Iterator[None]:
    yield


def input_major(model: Any) -> Any:
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
    return copied


if __name__ == "__main__":
    main()
