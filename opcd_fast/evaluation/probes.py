"""What every arm is asked besides the held-out prompts: abilities, another context in front, and a second turn.

Asked alike of the base and the student, with the context and without. Nobody trains for these: they tell what a context
in the weights costs, and whether it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.data import SYSTEM_ROLES, Context, Message, Prompt, adapt_to_tokenizer, teacher_ids
from opcd_fast.data.tasks import Episode, Played, Task, load_task, play_with
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import stream_seed
from opcd_fast.training.step import check_prompt_length

# Turns, because a small model follows them where it does not follow a sentence; capital letters, because they go with
# whatever else a context asks for.
OTHER_CONTEXT: tuple[Message, ...] = (
    {"role": "user", "content": "What is the capital of Peru?"},
    {"role": "assistant", "content": "THE CAPITAL OF PERU IS LIMA."},
    {"role": "user", "content": "What do cows eat?"},
    {"role": "assistant", "content": "COWS EAT GRASS."},
    {"role": "user", "content": "How many days are in a week?"},
    {"role": "assistant", "content": "A WEEK HAS SEVEN DAYS."},
)


@dataclass(frozen=True)
class Abilities:
    """Tasks that every arm plays greedily, with their number of problems and the longest answer in tokens."""

    names: Sequence[str] = ()
    problems: int = 64
    tokens: int = 64

    def check(self) -> None:
        """A missing package or file must not cost the loading of a model. Raises InputError."""
        for name in self.names:
            load_task(name)


@dataclass(frozen=True)
class Arm:
    """One of the four as it answers chats.

    generate: token ids, max_new_tokens=, temperature=, top_p=, seed= -> a completion for each. context: what it sees in
    front, where a prompt brings none of its own; None: it sees neither. variables: of the chat template. window: most
    tokens of prompt and answer; None: no limit.
    """

    tokenizer: Any
    generate: Callable[..., Sequence[Completion]]
    context: Context | None = None
    variables: Mapping[str, Any] | None = None
    window: int | None = None

    def answers(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """Raises InputError for a chat that the template refuses, or that leaves no room in the window."""
        rows = [self._ids(prompt) for prompt in adapt_to_tokenizer(self.tokenizer, prompts)]
        for row in rows:
            check_prompt_length(len(row), sampling["max_new_tokens"], self.window)
        return list(self.generate(rows, **sampling))

    def text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def _ids(self, prompt: Prompt) -> list[int]:
        own = None if self.context is None else prompt.context_or(self.context)
        return teacher_ids(self.tokenizer, prompt, own or "", self.variables)

    def play(self, task: Task, episodes: Sequence[Episode], *, seed: int = 0, **sampling: Any) -> list[Played]:
        """Episodes of `task` to their end; each turn is one batch of all that go on."""

        def answer(chats: Sequence[list[Message]], turn: int) -> list[Completion]:
            prompts = [Prompt(tuple(chat)) for chat in chats]
            return self.answers(prompts, **sampling, seed=stream_seed(seed, "turn", turn))

        return play_with(episodes, answer, self.tokenizer, task.max_turns)

    def plays(self, abilities: Abilities) -> dict[str, list[float]]:
        """Score of each problem, from 0 to 1, the same problems for every arm."""
        found = {}
        for name in abilities.names:
            task = load_task(name)
            problems = task.episodes("test", abilities.problems)
            played = self.play(task, problems, max_new_tokens=abilities.tokens, temperature=0.0)
            found[name] = [episode.score for episode in played]
        return found

    def obeys(self, prompts: Sequence[Prompt], seed: int, **sampling: Any) -> list[float]:
        """For each prompt after `OTHER_CONTEXT`: 1 where the answer is in capital letters."""
        given = self.answers([_behind(OTHER_CONTEXT, one) for one in prompts],
                             **sampling, seed=stream_seed(seed, "other context", 0))  # fmt: skip
        return [float(self.text(one.token_ids).isupper()) for one in given]

    def second_answers(
        self, prompts: Sequence[Prompt], firsts: Sequence[Sequence[int]], seed: int, **sampling: Any
    ) -> list[Completion]:
        """To each of `prompts` as the second question of a chat, which began with the prompt before it (the last one
        before the first) and the arm's own answer to that. firsts: its answers to `prompts`, as token ids; more, as
        of further rounds, are not looked at."""
        chats = []
        for index, prompt in enumerate(prompts):
            before = (index - 1) % len(prompts)
            said: Message = {"role": "assistant", "content": self.text(firsts[before])}
            chats.append(replace(prompts[before], messages=(*prompts[before].chat, said, *_asked(prompt))))
        return self.answers(chats, **sampling, seed=stream_seed(seed, "second turn", 0))


def tried(what: str, told: Callable[[str], None], ask: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What `ask` returns; None, and a line about it, where the template or the window has no place for the chat."""
    try:
        return ask(*given, **options)
    except InputError as error:
        told(f"{what} not measured: {error}")
        return None


def _asked(prompt: Prompt) -> list[Message]:
    return [message for message in prompt.chat if message["role"] not in SYSTEM_ROLES]


def _behind(turns: Sequence[Message], prompt: Prompt) -> Prompt:
    """The prompt with `turns` in front, after its own system message."""
    system = [message for message in prompt.chat if message["role"] in SYSTEM_ROLES]
    return replace(prompt, messages=(*system, *turns, *_asked(prompt)))
