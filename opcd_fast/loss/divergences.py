"""The divergences by name, with their parameters as callers give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opcd_fast.kernels.reference import DIVERGENCES, PARAMETERS

# What a caller gets who names no parameter.
BETA, ALPHA, K, TAIL, GATE = (PARAMETERS[name].default for name in ("beta", "alpha", "k", "tail", "gate"))


class Chosen(NamedTuple):
    """A divergence as the row operations take it."""

    divergence: str
    parameter: float = 0.0  # the number among its parameters
    option: str = ""  # the word among them


def check_divergence(divergence: str, parameters: Mapping[str, Any]) -> Chosen:
    """The divergence with its own of these parameters, their end points mapped to the plain divergences.

    parameters: values of some of PARAMETERS; the others have their defaults. One that the divergence does not have is
    checked and then not used.

    Raises ValueError for what no divergence could mean.
    """
    if not isinstance(divergence, str) or divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(map(repr, DIVERGENCES))}")
    for name, value in parameters.items():
        PARAMETERS[name].check(value)
    row = DIVERGENCES[divergence]
    own = [parameters.get(name, PARAMETERS[name].default) for name in row.parameters]
    number = next((float(value) for value in own if not isinstance(value, str)), 0.0)
    if number in row.ends:
        return Chosen(row.ends[number])
    return Chosen(divergence, number, next((value for value in own if isinstance(value, str)), ""))


def unused_parameter(divergence: str, parameters: Mapping[str, Any]) -> str | None:
    """The name of a parameter that was set although the divergence does not have it."""
    others = (name for name in parameters if name not in DIVERGENCES[divergence].parameters)
    return next((name for name in others if parameters[name] != PARAMETERS[name].default), None)
