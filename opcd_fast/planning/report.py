"""A plan in words: a table for people, an object for programs."""

from __future__ import annotations

from typing import Any

from opcd_fast.errors import pip_install
from opcd_fast.planning.plan import Plan, changes

NAMES = {
    "teacher weights": "teacher's weights",
    "teacher average": "teacher's average",
    "teacher": "teacher forward",
    "student": "student activations",
    "loss": "loss results",
    "scratch": "loss workspace",
    "backward": "backward temporaries",
    "rollout": "rollout KV, logits",
    "context": "reading contexts",
}
"""Parts whose label in a rehearsal is not what they are called."""

NEEDS = {
    "optimizer": f"needs bitsandbytes ({pip_install('quant')}); not with FSDP",
    "quantization": f"needs bitsandbytes ({pip_install('quant')}); not with FSDP",
    "teacher_offload": "not with FSDP",
}
"""What settings that were found need besides, by name."""


def as_json(plan: Plan) -> dict[str, Any]:
    seen = plan.found.rehearsal
    return {
        "fits": plan.found.fits,
        "gpu_bytes": plan.gpu,
        "limit_bytes": plan.limit,
        "peak_bytes": seen.nbytes,
        "peak_phase": seen.worst,
        "phases": {name: {"bytes": p.nbytes, "parts": dict(p.parts)} for name, p in seen.peaks.items()},
        "settings": changes(plan.asked, plan.found.config),
        "rollout_batch": seen.rollout_batch,
        "micro_batch_tokens": seen.tokens,
        "teacher_path": seen.path,
        "notes": list(seen.notes),
    }


def show(plan: Plan) -> None:
    """Prints the table, what is not known exactly, and the settings to use, or what is left to give up."""
    from rich.console import Console
    from rich.table import Table

    found, limit, seen = plan.found, plan.limit, plan.found.rehearsal
    console = Console(soft_wrap=True, width=max(110, Console().width))
    table = Table("part", title="predicted memory at the worst moment of each phase, GiB", box=None)
    for phase in seen.peaks:
        table.add_column(phase, justify="right", no_wrap=True)
    parts = dict.fromkeys(part for peak in seen.peaks.values() for part, size in peak.parts.items() if size > 2**20)
    for part in parts:
        table.add_row(NAMES.get(part, part), *(_gib(peak.parts.get(part, 0)) for peak in seen.peaks.values()))
    table.add_section()
    table.add_row("all", *(_gib(peak.nbytes) for peak in seen.peaks.values()))
    console.print(table)
    for note in seen.notes:
        console.print(note)
    verdict = "fits" if found.fits else f"does not fit: {_gib(seen.nbytes - limit)} GiB too much"
    console.print(f"peak {_gib(seen.nbytes)} GiB in phase {seen.worst!r}, {_gib(limit)} GiB for tensors: {verdict}")
    options = changes(plan.asked, found.config)
    if seen.rollout_batch and found.config.rollout_batch is None:
        options["rollout_batch"] = seen.rollout_batch
    if options and found.fits:
        words = (f"--{n.replace('_', '-')}" + ("" if v is True else f" {v}") for n, v in options.items())
        console.print("settings to use: " + " ".join(words))
        for name, needs in NEEDS.items():
            if name in options:
                console.print(f"{name}: {needs}")
    if not found.fits:
        advice = [] if found.config.makes_adapter else ["train an adapter (lora_rank=16) in place of all weights"]
        if seen.worst in ("rollout", "evaluation rollout", "student", "backward", "teacher"):
            advice.append(f"shorter answers (max_new_tokens={found.config.max_new_tokens // 2})")
        console.print("left to give up: " + "; ".join([*advice, "a smaller model"]))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"
