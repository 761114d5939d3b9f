"""Numbers as people read them, the same in README and page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opcd_fast.evaluation.report.models import BASE, BOTH, SHOWN, STUDENT

MOSTLY = 0.5  # from this share of the gap on a context has moved in, more or less


def percent(value: float) -> str:
    """One decimal where a whole number would claim too much or too little."""
    text = f"{value * 100:.0f}"
    return f"{value * 100:.1f}%" if text in ("0", "100", "99", "-0") and value not in (0.0, 1.0) else f"{text}%"


def nats(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.4f}"


def rate(estimate: Mapping[str, Any] | None) -> str:
    """A share with its 95 % interval."""
    if estimate is None:
        return "not measured"
    return f"{percent(estimate['value'])} ({percent(estimate['low'])} to {percent(estimate['high'])})"


def kl(estimate: Mapping[str, Any]) -> str:
    """A KL with its 95 % interval."""
    return f"{nats(estimate['value'])} ({nats(estimate['low'])} to {nats(estimate['high'])})"


def tokens(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:.1f} ({estimate['low']:.1f} to {estimate['high']:.1f})"


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"


def rounding(ran: Mapping[str, Any]) -> str:
    """What the type of the models did to the numbers, a sentence; nothing where they ran in float32."""
    dtype = ran.get("dtype")  # older comparisons have no such key
    if dtype not in ("bfloat16", "float16"):
        return ""
    return (
        f"Computed in {dtype}: rounding is in all these numbers, a percent or so of a KL and some hundredths of a nat "
        "of a single token; dtype=float32 has none of it."
    )


def verdict(card: Mapping[str, Any]) -> str:
    """Whether it worked, for somebody who reads nothing else."""
    gap, said = card["kl"]["own"]["gap_closed"], ""
    closed = f"{percent(gap['value'])} of the distance to base + context on its own answers"
    if gap["value"] <= 0:
        said = "It did not work: the student is no nearer to base + context than the base was."
    elif gap["low"] <= 0:
        said = f"It may not have worked: the student closed {closed}, which may be chance."
    elif gap["value"] < MOSTLY:
        said = f"It worked in part: the student closed {closed}."
    else:
        said = f"The student closed {closed}."
    for score in card["scores"]:
        arms = {arm: percent(score["arms"][arm]["value"]) for arm in (STUDENT, SHOWN, BASE)}
        said += f" {score['name']}: {', '.join(f'{arm} {share}' for arm, share in arms.items())}."
    return said


def title(card: Mapping[str, Any], context: str | None) -> str:
    """Context and model."""
    begins = " ".join((context or "contexts of single prompts").split())
    begins = begins if len(begins) <= 60 else begins[:59] + "…"
    return f"{begins} → {card['base_model']}"


def uncounted(saved: Mapping[str, Any]) -> str:
    """What the card's "saved" leaves out, and what stays, in sentences, or nothing."""
    count, own = (saved.get(name, 0) for name in ("virtual_tokens", "default_system_tokens"))  # not in older cards
    said = f" The trained prefix of {count} virtual tokens, kept as keys and values, is not counted." if count else ""
    if own:
        said += f" Without the context {own} tokens are the system prompt that the chat template puts in by itself."
    return said


def distances_of(card: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Distances on unrelated prompts, in words, in the order in which they are read; older cards have one."""
    names = {
        "context_kl": "KL(student || base + context)", "context_kl_before": "KL(base || base + context), before",
        "kl": "KL(student || base)", "yardstick": "KL(base + context || base), the yardstick",
    }  # fmt: skip
    found = card["forgetting"] or {}
    return [(words, found[name]) for name, words in names.items() if found.get(name)]


def beyond(card: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Scores of the arms beyond the held-out prompts: what is asked, and each arm's; older cards have none."""
    rows = [(f"ability: {one['name']}", one["arms"]) for one in card.get("abilities", [])]
    if card.get("other_context"):
        rows.append(("obeys another context", card["other_context"]))
    return rows + [(f"second turn: {one['name']}", one["arms"]) for one in card.get("second_turn", [])]


def missing_arms(card: Mapping[str, Any]) -> str | None:
    """Why an arm is not in the card, a sentence; None where all are."""
    if BOTH in card["arms"]:
        return None
    return f"Without {BOTH}: the context does not fit the student's own window; the teacher's is longer."


def short(sha256: str | None) -> str:
    return sha256[:16] if sha256 else "not recorded"


def hashes(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made of: part, and hash or version."""
    found, rows = card["hashes"], []
    rows.append(("context", short(found["context_sha256"])))
    rows.append(("chat template", short(found["tokenizer"]["template_sha256"])))
    rows += [(f"tokenizer: {name}", short(file["sha256"])) for name, file in found["tokenizer"]["files"].items()]
    base = found["base"]
    rows += [(f"base: {name}", short(file["sha256"])) for name, file in base["files"].items()]
    if base["commit"]:
        rows.append(("base: commit on the hub", base["commit"]))
    if not base["files"]:
        rows.append(("base: fingerprint of the weights", short(base["fingerprint"])))
    kind = "adapter" if card["adapter"] else "weights"
    rows += [(f"{kind}: {name}", short(file["sha256"])) for name, file in found["weights"].items()]
    code = found["code"]
    changed = ", with uncommitted changes" if code["changed"] else ""
    rows.append(("opcd-fast", code["version"] + (f" at {code['commit'][:12]}{changed}" if code["commit"] else "")))
    rows.append(("prompts", short(found["prompts_sha256"])))
    rows.append(("held-out prompts", short(found["held_out_sha256"])))
    return rows
