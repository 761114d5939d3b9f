"""What the package does with the families of models that people train today: `python scripts/families.py`.

Builds a tiny random model of each (`tests/support/architectures.py`), asks the package which ways it takes, compares
each with transformers' own forward pass, and writes the tables of docs/models.md under the marker; what stands above
was written by hand. Needs the checkout. A family that the installed transformers does not have is left out, and said.

    python scripts/families.py                 # writes docs/models.md
    python scripts/families.py --check         # writes nothing; status 1 where the page is not what comes out
    python scripts/families.py qwen3.5 lfm2    # prints what is found of some families
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import architectures  # noqa: E402
import tiny_models  # noqa: E402
import transformers  # noqa: E402

from benchmarks.schema import read  # noqa: E402
from opcd_fast import ContextTeacher, InputError, OPCDConfig, TransformersRollout  # noqa: E402
from opcd_fast.loss import LMHead  # noqa: E402
from opcd_fast.models import packed_hidden_states, refuses_packing, refuses_sharing, seam  # noqa: E402
from opcd_fast.rollout import refuses_holding_once  # noqa: E402
from opcd_fast.rollout.check import scored  # noqa: E402
from opcd_fast.training.engines.model_pair import with_adapter  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
MARKER = "<!-- Written by scripts/families.py from here on. -->"
TOLERANCE = 1e-4
APART = "steps as in `generate`"

# The name that people know, the tiny model of tests/support/architectures.py, and what it is built with.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3-moe", {}),
    "Qwen3.5": ("qwen3.5", {}),
    "Qwen3.5-MoE": ("qwen3.5-moe", {}),
    "Qwen3-Next": ("qwen3-next", {}),
    "LFM2": ("lfm2", {}),
    "LFM2-MoE": ("lfm2-moe", {}),
    "Granite-4 hybrid": ("granite-hybrid", {"logits_scaling": 8.0}),
    "Granite-4 hybrid, experts": ("granite-hybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Falcon-H1": ("falcon-h1", {"lm_head_multiplier": 0.5}),
    "Nemotron-H": ("nemotron-h", {}),
    "Nemotron-H, experts": ("nemotron-h-moe", {}),
    "Gemma-3": ("gemma3", {}),
    "Gemma-4": ("gemma4", {"final_logit_softcapping": 3.0}),
    "Gemma-4, experts": ("gemma4-moe", {}),
    "Gemma-4, shared keys": ("gemma4-shared-kv", {}),
    "gpt-oss": ("gpt-oss", {}),
}


@dataclass
class Found:
    """Of one family: what is done (the same on every machine), and by how much it differs from a plain forward."""

    ways: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def look(self, column: str, at: Callable[[], tuple[str, float | None]]) -> None:
        try:
            self.ways[column], difference = at()
        except (ValueError, InputError) as error:
            self.ways[column], difference = f"refused: {' '.join(str(error).split())}", None
        if difference is not None:
            self.differences[column] = difference


def look_at(family: str) -> Found | None:
    """None where the installed transformers has no such class."""
    name, options = FAMILIES[family]
    try:
        model: Any = architectures.build(name, **options)
    except AttributeError:
        return None
    found = Found({"class": f"`{type(model).__name__}`"})
    found.look("teacher", lambda: teacher(model))
    found.look("student", lambda: student(model))
    found.look("sampler", lambda: sampler(model))
    found.look("loss head", lambda: loss_head(model))
    run = "every run" if name in architectures.MECHANISMS else "`-m slow`"
    found.ways["longer tests"] = f"`{name}`, {run}"
    found.look("adapters on", lambda: adapters(model))
    found.ways["none on"] = without_adapter(model)
    return found


# --- the ways, each asked of the package and compared with a plain forward -----------------------------------------

CONTEXT, *ANSWERS = tiny_models.random_ids(20, 5, 1, 17, 4, 9, seed=2)  # windows are of 8 tokens


def teacher(model: Any) -> tuple[str, float]:
    """Hidden states of answers behind a context."""
    chosen = ContextTeacher(model, CONTEXT)
    ids, bounds = tiny_models.pack(ANSWERS)
    plain = torch.cat([tiny_models.plain_after_context(model, CONTEXT, answer) for answer in ANSWERS])
    difference = largest(chosen.hidden_states_packed(ids, bounds), plain)
    read = "" if chosen.path == "concat" else ", states copied" if any(chosen.prefixes[0].states) else ""
    return f"`{chosen.path}`{read}", difference


@torch.no_grad()
def student(model: Any) -> tuple[str, float]:
    """Hidden states of sequences on their own."""
    body = seam.body_of(model)
    way = "packed row" if refuses_packing(body) is None else "padded batch"
    way += ", prompts shared" if refuses_sharing(body, training=True) is None else ", nothing shared"
    sequences = [torch.cat([CONTEXT, answer]) for answer in ANSWERS]
    plain = torch.cat([tiny_models.plain_hidden(model, sequence) for sequence in sequences])
    return way, largest(packed_hidden_states(model, *tiny_models.pack(sequences)), plain)


def sampler(model: Any) -> tuple[str, float]:
    """Log-probabilities of answers drawn behind a context."""
    prompts = [[*CONTEXT.tolist(), *answer.tolist()] for answer in ANSWERS]
    rollout = TransformersRollout(model, stop_token_ids=[2])
    answers = rollout.generate(prompts, max_new_tokens=8, seed=1)
    with torch.no_grad(), seam.scoring_mode(model):
        exact, _ = scored(model, prompts, [(answer.token_ids, answer.logprobs or ()) for answer in answers])
    (engine,) = (line for line in rollout.explain().splitlines() if line.startswith("engine: "))
    way = "`generate`"
    if engine.startswith("engine: decode"):
        way = "own loop, context held once" if refuses_holding_once(model) is None else "own loop, caches copied"
    if "agrees with generate" in engine:
        way += f", {APART}"
    return way, largest(torch.tensor([x for a in answers for x in a.logprobs or ()], dtype=torch.float64), exact)


@torch.no_grad()
def loss_head(model: Any) -> tuple[str, float]:
    """Logits of the head, from the body's hidden states."""
    head, ids = LMHead.from_model(model), CONTEXT[None]
    hidden = seam.run_body(seam.body_of(model), ids)
    parts = ["tied" if head.weight is model.get_input_embeddings().weight else "own weight"]
    parts += ["bias"] if head.bias is not None else []
    parts += [f"scale {head.scale:.4g}"] if head.scale != 1.0 else []
    parts += [f"cap {head.softcap:.4g}"] if head.softcap is not None else []
    logits = model(input_ids=ids, use_cache=False).logits
    return ", ".join(parts), largest(head.logits(hidden), logits)


def adapters(model: Any) -> tuple[str, float]:
    """Modules that get an adapter with the default of `lora_targets`; hidden states of the student that has it."""
    wrapped = _with_adapter(model)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0.0, 0.1)
    return listed(_adapted(wrapped)), student(wrapped)[1]


def without_adapter(model: Any) -> str:
    """Matrices between embeddings and head that get none."""
    try:
        adapted = set(_adapted(_with_adapter(model)))
    except InputError:
        return "all"
    outside = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [name for name, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in outside]
    names = [name.removesuffix(".weight") for name in matrices]
    return listed([name for name in names if name not in adapted]) or "none"


def _with_adapter(model: Any) -> Any:
    settings = OPCDConfig(lora_rank=4, output_dir=tempfile.gettempdir())
    return with_adapter(copy.deepcopy(model), settings, torch.device("cpu")).eval()


def _adapted(wrapped: Any) -> list[str]:
    names = []
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            own = getattr(module, "parameter_name", "weight")  # of experts, whose matrices one module holds
            names.append(name if own == "weight" else f"{name.replace('.base_layer', '')}.{own}")
    return names


def listed(names: Sequence[str]) -> str:
    """Their last parts, each once, in order; with "experts." in front where they belong to experts."""
    short = [f"{'experts.' * ('.experts.' in name)}{name.rpartition('.')[2]}" for name in names]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(short))


def largest(found: torch.Tensor, plain: torch.Tensor) -> float:
    return float((found.double() - plain.double()).abs().max())


# --- the page ------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Found]) -> str:
    """Markdown of all tables."""
    columns = list(next(iter(found.values())).ways)
    split = columns.index("adapters on")
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"

    def ways(names: Sequence[str]) -> str:
        return table(["family", *names], [[family, *map(one.ways.get, names)] for family, one in found.items()])

    numbers = [[family, *(power(one.differences.get(name)) for name in WHAT)] for family, one in found.items()]
    return "\n\n".join([
        "## What is done", ways(columns[:split]),
        "## LoRA", ways(columns[split:]),
        "## How exact it is",
        f"Differences from transformers are below these powers of ten (float32 on a CPU, {versions}):",
        table(["family", *WHAT.values()], numbers),
    ])  # fmt: skip


WHAT = {"teacher": "teacher: hidden states", "student": "student: hidden states",
        "adapters on": "with LoRA: hidden states", "sampler": "sampler: log-probabilities",
        "loss head": "loss head: logits"}  # fmt: skip


def costs(file: Path) -> str:
    """The newest run of `python -m benchmarks recurrent`: our time over that of transformers' forward."""
    rows = {(row.case, row.implementation): row for row in read(file).of("recurrent")}
    cells = []
    for case in dict.fromkeys(case for case, _ in rows):
        ours, ahead, inside = (rows[case, name] for name in ("opcd_fast-pad", "transformers", "transformers-copies"))
        family, sizes = case.split(", ")
        error = ours.get("max_error") or 0.0
        ratios = [f"{(ours.get('time') or 0.0) / (other.get('time') or 1.0):.2f}" for other in (ahead, inside)]
        cells.append([family, sizes.replace("x", " x "), f"{ours.get('time'):.1f} ms", *ratios, power(error)])
    head = ["family", "context x answer x answers", "`pad`", "of a forward", "of a forward with its copies", "error"]
    return "\n\n".join([
        "## What a shared state costs",
        f"Time of `pad` over that of transformers' forward from a cache that holds the context, "
        f"`benchmarks/results/{file.name}` (medians of calls in turns; tiny models of 4 layers, float32, a CPU; the "
        "teacher with `frozen_weights=True`, as a run makes it). Without the copies of the cache that each forward "
        "needs, and with them:",
        table(head, cells),
    ]) + "\n"  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def power(difference: float | None) -> str:
    if difference is None:
        return ""
    return next((f"1e-{digits}" for digits in range(7, 0, -1) if difference < 10.0**-digits), "0.1 or more")


def newest() -> Path:
    return max((ROOT / "benchmarks" / "results").glob("recurrent_cpu_*.jsonl"))


def written() -> str:
    """The part of the page above the marker."""
    return PAGE.read_text(encoding="utf-8").split(MARKER)[0]


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in (*FAMILIES, "--check")]
    if unknown:
        print(f"families.py: no family {unknown[0]!r}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    some = [name for name in arguments if name != "--check"] or list(FAMILIES)
    looked = {family: look_at(family) for family in some}
    found = {family: one for family, one in looked.items() if one is not None}
    for family in looked.keys() - found.keys():
        print(f"families.py: transformers {transformers.__version__} has no {family}", file=sys.stderr)
    text = tables(found)
    if some != list(FAMILIES):
        print(text)
        return 0
    page = f"{written()}{MARKER}\n\n{text}\n\n{costs(newest())}"
    if "--check" in arguments:
        return int(page != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what falls back says so, and stands in the table
    sys.exit(main(sys.argv[1:]))
