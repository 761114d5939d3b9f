"""Is what a run moved into the weights still what would be moved in today? Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.data import Context
from opcd_fast.errors import InputError
from opcd_fast.models import Place, place_of
from opcd_fast.runtime import misfit, read_object
from opcd_fast.training.run import (
    FILES_SHAPE,
    HASHES_SHAPE,
    RECORD,
    FileHashes,
    Files,
    differing,
    hash_of,
    read_record,
    template_hash,
    template_in,
    tokenizer_files,
    weight_files,
)

CARD = "opcd_card.json"
ESTIMATE: dict[str, Any] = {"value": float, "low": float, "high": float}
KL = {**ESTIMATE, "p50": float, "p90": float, "p99": float}
GAP, AFTER = {"before": KL, "after": KL, "gap_closed": ESTIMATE}, {"after": ESTIMATE}
ARMS = {str: (ESTIMATE, None)}
GREEDY = {"identical": ESTIMATE}
SCALAR = (str, bool, float, None)
CARD_SHAPE = {  # what is read of a card; see `misfit`
    "run": str, "base_model": str, "adapter": bool, "warning": str, "ran": {"device": str, "dtype?": str},
    "measured_with": dict.fromkeys(("held_out_prompts", "samples_per_prompt", "max_new_tokens", "temperature"), float),
    "kl": {"own": GAP, "fixed": GAP},
    "agreement": {"top1": {"own": AFTER, "fixed": AFTER}, "greedy": {"before": GREEDY, "after": GREEDY}},
    "arms": {str: {"length": ESTIMATE, "truncated": ESTIMATE}},
    "scores": [{"name": str, "arms": {str: ESTIMATE}, "regressions": {"count": float, "of": float}}],
    "forgetting": (None, {"kl": KL, "context_kl?": KL, "context_kl_before?": KL, "yardstick?": KL, "prompts": float,
                          "top1_agreement": ESTIMATE}),
    "abilities?": [{"name": str, "arms": ARMS}], "other_context?": ARMS, "second_turn?": [{"name": str, "arms": ARMS}],
    "saved": {"tokens": float, "tokens_with_context": float, "prefill_seconds": float, "virtual_tokens?": float,
              "default_system_tokens?": float, "prefill_seconds_with_context": float},
    "settings": {str: (*SCALAR, [SCALAR])}, "exported?": FILES_SHAPE,
    "hashes": {**HASHES_SHAPE, "weights": FILES_SHAPE},
}  # fmt: skip
WEIGHTS = ("config.json", "adapter_config.json")  # a folder with one of them holds weights


@dataclass(frozen=True)
class Finding:
    """One part of a run, compared with what there is now."""

    part: str
    state: str  # "same", "changed", or "unknown": nothing to compare with
    detail: str
    remedy: str = ""


def read_card(path: Path) -> dict[str, Any] | None:
    """opcd_card.json in a folder (or that file itself), or None. Raises InputError for a damaged or foreign one."""
    file = path / CARD if path.is_dir() else path
    if not file.is_file():
        return None
    card = read_object(file, "; write it again with `opcd report`")
    if card.get("schema") != 1:
        raise InputError(f"{str(file)!r} is no card of schema 1; write it with `opcd report`")
    if why := misfit(card, CARD_SHAPE):
        raise InputError(f"{str(file)!r} is damaged: {why}; write it again with `opcd report`")
    return card


def check_run(run: Path, context: Context, model: str | None = None, again: bool = False) -> list[Finding]:
    """Compare a run with `context` and with the model's files as they are now.

    run: a run's folder, or any folder that holds its card. model: where base and tokenizer are now; None: where the
    run found them. again: read every file, even those whose size and times are those of the last time.
    Raises InputError: no run there, or a model that is not on this machine.
    """
    if not run.is_dir():
        raise InputError(f"run {str(run)!r} is not a folder; give the output_dir of `opcd train`")
    card, record = read_card(run), read_record(run)
    made = card["hashes"] if card is not None else record
    if made is None:
        raise InputError(f"{str(run)!r} has neither {CARD} nor {RECORD}; write the card with `opcd report`")
    hashes = FileHashes(again=again)
    findings = [_context(made, context)]
    base, tokenizer = made["base"], made["tokenizer"]
    named = record or made  # a card does not tell where on the machine the folders were
    base_name = model or named["base"]["name"]
    place_of_tokenizer = _place(model or named["tokenizer"]["name"] or base_name)
    findings.append(_template(tokenizer["template_sha256"], place_of_tokenizer))
    findings.append(
        _files("tokenizer", tokenizer["files"], place_of_tokenizer, lambda place: tokenizer_files(place.folder, hashes))
    )
    findings.append(_files("base", base["files"], _place(base_name), lambda p: weight_files(p, hashes)))
    if card is not None:
        findings += _weights(card, record, run, hashes)
    return findings


def _place(name: str | None) -> Place | None:
    if name is None:
        return None
    try:
        return place_of(name)
    except InputError as error:
        raise InputError(f"{error}, with --model") from error


def _context(made: Mapping[str, Any], context: Context) -> Finding:
    before = made["context_sha256"]
    if before is None:
        raise InputError("this run has no context of its own: its prompts brought theirs (privileged_context)")
    texts = [context, context + "\n"] if isinstance(context, str) else [context]  # a file's last newline counted once
    if before in map(hash_of, texts):
        return Finding("context", "same", "the text that was moved in")
    remedy = "move it in: `opcd train --init RUN --context FILE`, then `opcd report`"
    return Finding("context", "changed", "another text than the one that was moved in", remedy)


def _template(before: str | None, place: Place | None) -> Finding:
    if place is None:
        return Finding("chat template", "unknown", "the run's tokenizer was made in memory; name its folder by --model")
    if template_hash(template_in(place.folder)) == before:
        return Finding("chat template", "same", f"that of {place.folder}")
    remedy = "render prompts with the template in the run's final/, or train again with the new one"
    return Finding("chat template", "changed", f"{place.folder} has another one than the run used", remedy)


def _files(part: str, before: Files, place: Place | None, read: Callable[[Place], Files]) -> Finding:
    if place is None or not before:
        return Finding(part, "unknown", "the run kept no files of it: it was made in memory")
    changes = differing(before, read(place))
    if not changes:
        return Finding(part, "same", str(place.folder))
    listed = ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    remedy = {
        "tokenizer": "use the tokenizer in the run's final/, or train again with the new one",
        "base": "put the base back that the run started from, or train again on the new one: an adapter fits one base",
    }[part]
    return Finding(part, "changed", f"{place.folder}: {listed}", remedy)


def _weights(card: Mapping[str, Any], record: Mapping[str, Any] | None, run: Path, hashes: FileHashes) -> list[Finding]:
    """The card measured one set of weights; these may have been trained since."""
    folder = next((f for f in (run / "final", run) if any((f / name).is_file() for name in WEIGHTS)), None)
    if folder is None:
        return []
    changes = differing(card["hashes"]["weights"], weight_files(Place(folder), hashes))
    if changes or (record is not None and record["started"] != card["hashes"]["started"]):
        remedy = "measure again: `opcd report RUN`"
        return [Finding("weights", "changed", f"the card is about others: {', '.join(changes) or 'a new run'}", remedy)]
    return [Finding("weights", "same", "those that the card measured")]
