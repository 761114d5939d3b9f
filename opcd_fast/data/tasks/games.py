"""Frozen Lake and Sokoban as text games of several turns, on textarena's and gymnasium's environments.

Every turn is one question: the rules, what happened so far and the present board. An episode scores 1 when it is won
and 0 otherwise; environments that reward progress are not asked. The environments draw from global random streams;
those of the caller are left as they were.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opcd_fast.data import Message
from opcd_fast.data.tasks.episode import as_user, check_split, final_part, identity, split_of
from opcd_fast.errors import InputError

ASK_MOVE = "\n\nThink about the board, then choose one action. Write it in brackets, like [up]."
PATIENCE = 200  # boards drawn in vain, one after another, before boards repeat
SHARES = (0.25, 0.25, 0.25, 0.25)  # small boards are few: no split may be left with one or two
DIRECTIONS = {"left": 0, "down": 1, "right": 2, "up": 3}  # gymnasium's numbers
_MOVE = re.compile(r"\[\s*(up|down|left|right)\s*\]", re.IGNORECASE)


class FrozenLake:
    """textarena's FrozenLake, `size` x `size` with 1 to 3 holes. A board belongs to one split alone."""

    name = "frozen-lake"

    def __init__(self, size: int = 3, max_turns: int = 5) -> None:
        _textarena("FrozenLake-v0")  # now, not after an hour of sampling
        if size < 3:
            raise InputError(f"size={size} must be at least 3")
        self.size, self.max_turns = size, max_turns

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Any]:
        return _of_split(lambda index: self._game(seed, index), split, count)

    def _game(self, seed: int, index: int) -> TextarenaEpisode:
        holes = 1 + index % 3
        return TextarenaEpisode("FrozenLake-v0", _seed(seed, index), self.max_turns, size=self.size, num_holes=holes)


class Sokoban:
    """textarena's Sokoban, 6 x 6 with `boxes` boxes; boards split like FrozenLake's."""

    name = "sokoban"

    def __init__(self, boxes: int = 1, max_turns: int = 15) -> None:
        _textarena("Sokoban-v0")
        if boxes < 1:
            raise InputError(f"boxes={boxes} must be at least 1")
        self.boxes, self.max_turns = boxes, max_turns

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Any]:
        return _of_split(lambda index: self._game(seed, index), split, count)

    def _game(self, seed: int, index: int) -> TextarenaEpisode:
        return TextarenaEpisode("Sokoban-v0", _seed(seed, index), self.max_turns, num_boxes=self.boxes)


class GymnasiumFrozenLake:
    """gymnasium's FrozenLake-v1 without slipping, drawn as text; boards of `size` x `size`, split like FrozenLake's."""

    name = "frozen-lake-gymnasium"

    def __init__(self, size: int = 3, max_turns: int = 5) -> None:
        _package("gymnasium", "gymnasium's Frozen Lake")
        if size < 3:
            raise InputError(f"size={size} must be at least 3")
        self.size, self.max_turns = size, max_turns

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Any]:
        return _of_split(lambda index: GymnasiumEpisode(self.size, _seed(seed, index), self.max_turns), split, count)


class TextarenaEpisode:
    """A single-player game of textarena."""

    def __init__(self, game: str, seed: int, max_turns: int, **options: Any) -> None:
        self._game = _textarena(game, **options)
        with _own_random_streams():
            self._game.reset(num_players=1, seed=seed)
        self._seen = self._game.get_observation()[1].strip()
        self.board = self._seen
        self.id = identity(self.board)
        self.turns, self._max_turns = 0, max_turns
        self.score: float | None = None
        self.feedback = ""

    def messages(self) -> list[Message]:
        return as_user(self._seen + ASK_MOVE)

    def answer(self, text: str) -> None:
        """Take a move. Text around it is cut off: the board of the next turn shows what was done, not why."""
        text = final_part(text)
        moves = _MOVE.findall(text)
        self.turns += 1
        # The last one named: models weigh several moves before they choose.
        over, _ = self._game.step(f"[{moves[-1].lower()}]" if moves else text[-80:] or "nothing")
        if over:
            rewards, infos = self._game.close()
            self.score = float(rewards[0] == 1)
            self.feedback = _outcome(self.score, str(infos[0].get("reason", "") if infos else ""))
            return
        self._seen = self._game.get_observation()[1].strip()
        if self.turns >= self._max_turns:
            self.score, self.feedback = 0.0, _outcome(0.0, f"The limit of {self._max_turns} moves was reached.")


RULES = """\
You cross a frozen lake. P is where you stand, G the goal, H a hole in the ice and . safe ice.
Each turn you move one field: [up], [down], [left] or [right]. A hole ends the game, so does the goal.

"""


class GymnasiumEpisode:
    """A game of gymnasium's FrozenLake-v1."""

    def __init__(self, size: int, seed: int, max_turns: int) -> None:
        gymnasium = _package("gymnasium", "gymnasium's Frozen Lake")
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        with _own_random_streams():
            self._map = generate_random_map(size=size, p=0.7, seed=seed)
            self._game = gymnasium.make("FrozenLake-v1", desc=self._map, is_slippery=False)
            self._place, _ = self._game.reset(seed=seed)
        self.board = self._drawn()
        self.id = identity(self.board)
        self._told = ""
        self.turns, self._max_turns = 0, max_turns
        self.score: float | None = None
        self.feedback = ""

    def messages(self) -> list[Message]:
        return as_user(f"{RULES}{self._told}Current board:\n{self._drawn()}{ASK_MOVE}")

    def answer(self, text: str) -> None:
        self.turns += 1
        moves = _MOVE.findall(final_part(text))
        if not moves:
            self._told = "Your last answer named no move in brackets.\n"
        else:
            self._place, reward, fell_or_won, _, _ = self._game.step(DIRECTIONS[moves[-1].lower()])
            self._told = f"Your last move was [{moves[-1].lower()}].\n"
            if fell_or_won:
                self.score = float(reward == 1)
                self.feedback = _outcome(self.score, "" if reward == 1 else "You fell into a hole.")
        if self.score is None and self.turns >= self._max_turns:
            self.score, self.feedback = 0.0, _outcome(0.0, f"The limit of {self._max_turns} moves was reached.")

    def _drawn(self) -> str:
        rows = [list(row.replace("F", ".").replace("S", ".")) for row in self._map]
        rows[int(self._place) // len(rows)][int(self._place) % len(rows)] = "P"
        return "\n".join(" ".join(row) for row in rows)


def _outcome(score: float, reason: str) -> str:
    return f"{'You won.' if score == 1 else 'You lost.'} {reason}".strip()


def _of_split(game: Callable[[int], Any], split: str, count: int) -> list[Any]:
    """Games whose board belongs to `split`: different boards while there are any, then the same ones again."""
    check_split(split)
    games: list[Any] = []
    seen: set[str] = set()
    index = in_vain = 0
    while len(games) < count:
        drawn = game(index)
        index, in_vain = index + 1, in_vain + 1
        if split_of(drawn.id, SHARES) == split and (drawn.id not in seen or (seen and in_vain > PATIENCE)):
            seen.add(drawn.id)
            games.append(drawn)
            in_vain = in_vain if in_vain > PATIENCE else 0
        elif not seen and in_vain > 50 * PATIENCE:
            raise InputError(f"split={split!r}: no board of this size belongs to it; use a larger size")
    return games


def _seed(seed: int, index: int) -> int:
    """A seed below 2**31, which all environments take, that no other pair is likely to have."""
    return int(identity(f"game {seed} {index}"), 16) % (2**31 - 64)


def _textarena(game: str, **options: Any) -> Any:
    textarena = _package("textarena", "textarena's games")
    return textarena.make(game, **options)


def _package(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{what} need the package {error.name}: pip install 'opcd-fast[tasks]'") from error


@contextmanager
def _own_random_streams() -> Iterator[None]:
    import numpy

    kept = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
