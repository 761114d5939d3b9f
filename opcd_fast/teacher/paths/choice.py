"""Which path a teacher takes, and why: what is known of the architecture first, then the check at first use."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from opcd_fast.models import refuses_merge, refuses_pad, rope_switch
from opcd_fast.teacher.paths.verification import verify

logger = logging.getLogger("opcd_fast")

PATHS = ("merge", "pad", "concat")


class PathChoice:
    """The path of one teacher.

    asked: "auto" or one of PATHS. prefix_device: where prefixes will be kept, so that the check covers the way from
    there; None for the model's device. Raises ValueError for other names and for a path that cannot be exact.
    """

    def __init__(self, body: nn.Module, asked: str, prefix_device: torch.device | None = None) -> None:
        if asked not in ("auto", *PATHS):
            raise ValueError(f"path: expected 'auto', 'merge', 'pad' or 'concat', got {asked!r}")
        self._body, self._asked, self._prefix_device = body, asked, prefix_device
        self._refused = {"merge": refuses_merge(body), "pad": refuses_pad(body)}
        refused = self._refused.get(asked)
        if refused is not None:
            raise ValueError(f"path={asked!r}: {refused}; use path='concat'")
        self._chosen: tuple[str, str] | None = ("concat", "asked for") if asked == "concat" else None
        self._alone: bool | None = None  # whether concat runs one sequence at a time; None until it was checked
        self.rope_switch = rope_switch(body)
        self._told_of_switch = False

    @property
    def path(self) -> str:
        """The path in use; the first time, after its check. Raises ValueError when a path asked for fails it."""
        return self._decided()[0]

    def _decided(self) -> tuple[str, str]:
        if self._chosen is None:
            if self._asked != "auto":
                self._chosen = self._asked, self._check_asked()
            else:
                self._chosen = self._first_that_agrees()
                path, reason = self._chosen
                if path != "merge":
                    costs = ", which reads the context again for every sequence" if path == "concat" else ""
                    logger.warning("teacher: path %r%s, because %s", path, costs, reason)
        return self._chosen

    def _check_asked(self) -> str:
        measured, passed = verify(self._body, self._asked, self._prefix_device)
        if passed:
            return f"asked for; it matches concat on a tiny model of this kind ({measured})"
        if passed is None:
            logger.warning("teacher: path %r could not be checked: %s", self._asked, measured)
            return f"asked for; it could not be checked: {measured}"
        raise ValueError(
            f"path={self._asked!r}: it failed its check against concat on a tiny model of this kind ({measured}); "
            "use path='auto', which takes one that agrees"
        )

    def _first_that_agrees(self) -> tuple[str, str]:
        """The first path that agrees with concat on a tiny model of this kind, and why not those before it."""
        against = []
        for path, refused in self._refused.items():
            if refused is not None:
                against.append(f"not {path}: {refused}")
                continue
            measured, passed = verify(self._body, path, self._prefix_device)
            if passed:
                return path, "; ".join([*against, f"{path} matches concat on a tiny model of this kind ({measured})"])
            against.append(f"not {path}: it failed its check against concat ({measured})")
        return "concat", "; ".join(against)

    def runs_alone(self) -> bool:
        """Whether this model's padded batches are not to be trusted: then concat runs one sequence at a time."""
        if self._alone is None:
            measured, passed = verify(self._body, "concat")
            self._alone = not passed
            if self._alone:
                logger.warning("teacher: one sequence at a time, as a padded batch failed its check (%s)", measured)
        return self._alone

    def for_call(self, lengths: Sequence[int], context_lengths: Sequence[int]) -> str:
        """The path for sequences of `lengths` after contexts of `context_lengths` tokens.

        concat, where these lie on both sides of the length at which longrope switches.
        """
        if self.rope_switch is None or self.path == "concat":
            return self.path
        ends = [context + tokens for context, tokens in zip(context_lengths, lengths, strict=True) if tokens]
        sides = {length > self.rope_switch for length in (*context_lengths, *ends) if length}
        if len(sides) <= 1:
            return self.path
        if not self._told_of_switch:
            self._told_of_switch = True
            logger.warning(
                "teacher: path 'concat' for calls that cross %d tokens, where longrope moves all positions",
                self.rope_switch,
            )
        return "concat"

    def explain(self) -> list[str]:
        """The first line names the path; what else there is to know about it follows."""
        path, reason = self._decided()
        lines = [f"path: {path} ({reason})"]
        if path == "concat":
            one = ", one at a time: a padded batch failed its check" if self._alone else ""
            lines.append(f"the context is read again for every sequence{one}")
        if path == "pad":
            lines.append("a batch of sequences copies the context for one layer at a time")
        if path != "concat" and self.rope_switch is not None:
            lines.append(f"calls that cross {self.rope_switch} tokens, where longrope moves positions, run on concat")
        return lines
