"""What is known of one setting, as the metadata of its field: no list elsewhere repeats its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opcd_fast.errors import InputError

# What a setting may belong to, besides its group.
BELONGINGS = {
    "result": "decides what is computed: a run that goes on must have what it began with",
    "resume": "may change where a run goes on: the steps already made would have been the same",
    "divergence": "a keyword of the loss",
    "system": "tells the systems of a comparison from each other",
    "comparison": "a comparison sets it for each of its runs",
    "machine": "a folder, file, address or command that only one machine knows",
    "place": "where and how a run is made, not what comes out: two runs do not differ by it",
}


class Rule:
    """What values there are. Called with a name and a value, raises InputError for a wrong one."""

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def __call__(self, name: str, value: Any) -> None:
        if not self.allows(value):
            raise InputError(f"{name}={value!r} {self}")


@dataclass(frozen=True)
class AtLeast(Rule):
    least: int

    def allows(self, value: Any) -> bool:
        return value >= self.least

    def __str__(self) -> str:
        return f"must be a whole number of at least {self.least}"


class OneOf(Rule):
    def __init__(self, *values: Any) -> None:
        self.values = values

    def allows(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"is not available; use {' or '.join(map(repr, self.values))}"


class SomeOf(OneOf):
    """Of a setting that is a list."""

    def allows(self, value: Any) -> bool:
        return all(one in self.values for one in value)


@dataclass(frozen=True)
class Within(Rule):
    low: float
    high: float
    open_low: bool = False

    def allows(self, value: Any) -> bool:  # never NaN
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"must be a number {'above' if self.open_low else 'from'} {self.low} up to {self.high}"


@dataclass(frozen=True)
class Unsharded:
    """Where weights are sharded, only `values` do, for the reason that error messages give."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Setting:
    """help: what it means, in one line. group: the heading it stands under in a config file. rule: of values but None.
    needs: what it goes with where it is not the default, by the name of the other setting. sharded: None where every
    value goes with sharded weights. read: makes what is kept of what Python or YAML may give."""

    help: str
    group: str
    rule: Rule | None = None
    belongs: frozenset[str] = frozenset({"result"})
    needs: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    sharded: Unsharded | None = None
    read: Callable[[str, Any], Any] | None = None


def group_of(title: str) -> Callable[..., Any]:
    """Makes the fields of one group: `field(default, help, rule, belongs=…, …)`, see `Setting`; belongs: one of
    `BELONGINGS` or several. What does not belong to "resume" belongs to "result"."""

    def field(
        default: Any, help: str, rule: Rule | None = None, belongs: str | tuple[str, ...] = (), **more: Any
    ) -> Any:
        named = frozenset((belongs,) if isinstance(belongs, str) else belongs)
        if not named <= BELONGINGS.keys():
            raise ValueError(f"belongs={belongs!r} must be some of {', '.join(BELONGINGS)}")
        named |= set() if "resume" in named else {"result"}
        known = Setting(" ".join(help.split()), title, rule, named, **more)
        return dataclasses.field(default=default, metadata={"setting": known})

    return field


def settings_of(kind: type) -> Iterator[tuple[dataclasses.Field[Any], Setting]]:
    """The fields of a dataclass that `group_of` made, in order, with what is known of each."""
    for field in dataclasses.fields(kind):
        if "setting" in field.metadata:
            yield field, field.metadata["setting"]
