"""What is compared: the paper's system and its relatives, each a few settings away from the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, check_names, option_names, settings_with, typed_values

SYSTEMS: dict[str, dict[str, Any]] = {
    "opcd": {},
    "off-policy": {"answers": "teacher", "divergence": "forward_kl"},
    "seq-kd": {"answers": "teacher", "objective": "nll"},
    "sft": {"answers": "teacher", "objective": "nll", "kept_answers": 1},
    "live": {"teacher_mode": "live"},
    "ema": {"teacher_mode": "ema"},
    "periodic": {"teacher_mode": "periodic"},
}


@dataclass(frozen=True)
class System:
    """A row of the table. `changes` are settings of OPCDConfig; `context` replaces the comparison's, a file."""

    label: str
    changes: Mapping[str, Any]
    context: str | None = None

    def config(self, common: OPCDConfig, seed: int, output_dir: str, resume: bool) -> OPCDConfig:
        return dataclasses.replace(common, **self.changes, seed=seed, output_dir=output_dir, resume=resume)


def parse_systems(given: Sequence[str]) -> list[System]:
    """Systems from words: "opcd,live", or one with settings of its own, "[LABEL=]NAME:setting=value,setting=value".

    `context=FILE` is a setting here. Raises InputError: an unknown name or setting, a label given twice.
    """
    systems = []
    for word in given:
        systems += [_with_settings(word)] if ":" in word else [_named(name) for name in word.split(",") if name]
    if not systems:
        raise InputError(f"systems is empty; name some of {', '.join(SYSTEMS)}")
    for index, system in enumerate(systems):
        if system.label in [other.label for other in systems[:index]]:
            raise InputError(f"systems: {system.label!r} is there twice; label one of them: LABEL=NAME:setting=value")
    return systems


def check_common(config: OPCDConfig) -> None:
    """Raises InputError for a setting that belongs to the systems, or that leaves nothing to measure with."""
    if config.resume:
        raise InputError("resume: a comparison goes on by itself where it was stopped; drop resume")
    plain = OPCDConfig()
    for name in settings_with(belongs="system"):
        if getattr(config, name) != getattr(plain, name):
            raise InputError(
                f"{name} tells systems from each other; give it to one of them: --systems LABEL=NAME:{name}=..."
            )
    if not config.eval_every:
        raise InputError("eval_every=0 keeps no first weights to measure against; set it to the number of steps")


def _named(name: str, label: str | None = None) -> System:
    if name not in SYSTEMS:
        raise InputError(f"systems: {name!r} is unknown; use some of {', '.join(SYSTEMS)}")
    return System(label or name, SYSTEMS[name])


def _with_settings(word: str) -> System:
    import yaml

    head, _, tail = word.partition(":")
    label, equals, name = head.rpartition("=")
    system = _named(name, label if equals else None)
    if not system.label.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"systems: the label {system.label!r} becomes a folder; use letters, digits, - and _")
    changes: dict[str, Any] = {}
    for setting in tail.split(","):
        key, equals, value = setting.partition("=")
        if not equals or not value:
            raise InputError(f"systems: {setting!r} in {word!r} must be setting=value")
        try:
            changes[key.replace("-", "_")] = value if key == "context" else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
            raise InputError(
                f"systems: {setting!r} in {word!r} cannot be read; a list has commas, which end a setting here: give "
                "it to all systems, as an option of its own"
            ) from error
    context = changes.pop("context", None)
    names = [name for name in option_names(OPCDConfig) if name not in settings_with(belongs="comparison")]
    check_names(changes, names, f"systems: {word!r}")
    return System(system.label, {**system.changes, **typed_values(OPCDConfig, changes, numbers_as_text=True)}, context)
