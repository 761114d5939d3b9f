"""Prompts that a model writes: what would the users of such an assistant ask?

Two worked examples stand before the request, for small models need to see the form and large ones take the tone of
real messages from them. Requests differ in who the users are, and answers are sampled, so that questions differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from opcd_fast.contexts.player import Player
from opcd_fast.data import Candidate, Context, Message, Prompt, repeats, transcript
from opcd_fast.data.tasks import as_user, final_part
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Arm
from opcd_fast.runtime import stream_seed

USERS = (
    "The users are polite.",
    "The users are in a hurry and write short messages.",
    "The users tell a little about their situation first.",
    "The users are new here and do not know what to expect.",
    "The users know a lot and ask about details.",
    "The users are annoyed because something went wrong.",
    "The users ask about unusual cases.",
    "The users write as they speak, in small letters and with mistakes.",
    "The users want something compared or decided.",
    "The users ask for something that the assistant may not do.",
)
EXAMPLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "You help people who grow vegetables at home. Be practical and brief.",
        USERS[1],
        (
            "Why are the leaves of my tomatoes turning yellow?",
            "Can I still sow carrots in August?",
            "slugs ate my lettuce again, what now",
            "How deep do I plant garlic?",
            "Which vegetables grow in the shade?",
        ),
    ),
    (
        "You answer for the railway company Nordbahn. Trains to the coast leave every hour. Never promise refunds.",
        USERS[2],
        (
            "I travel with two small children and a pram. Where do we get on?",
            "My train was forty minutes late yesterday and I missed a meeting. What can I do?",
            "I am a student from abroad. Do you have cheaper tickets for me?",
            "I left my umbrella on the 8:15 to the coast, whom do I call?",
            "My bike is rather long. May I take it on the evening train?",
        ),
    ),
)
PER_REQUEST = len(EXAMPLES[0][2])
REQUESTS = 8  # answered at once
ANSWER_TOKENS = 400  # for the list; a longer one is cut, and its last line dropped
MARK = re.compile(r"^\s*(?:[(*\[]{0,3}\d{1,3}\s*[.):\]]\**|[-*•–])\s+")  # "1." "2)" "**3.** " "- "
SAID = re.compile(r"^\**(?:user|customer|message|question|q)\s*\d*\**\s*:\**\s*", re.IGNORECASE)
QUOTES = "\"'“”„«»`*_ \t"


def ask(
    arm: Arm,
    context: Context,
    count: int,
    *,
    similarity: float = 0.7,
    temperature: float = 0.8,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda found, requests: None,
) -> list[Candidate]:
    """At most `count` different prompts for an assistant with this context; fewer when the model repeats itself.

    The same seed gives the same prompts. `report(found, requests)` is called after every round of 8 requests.
    Raises InputError: a tokenizer without chat template, a context too long for the window, or a model none of whose
    answers could be used.
    """
    if not getattr(arm.tokenizer, "chat_template", None):
        raise InputError("asking for prompts needs a model with a chat template; give --logs or --data instead")
    examples = [text for *_, texts in EXAMPLES for text in texts]
    found: list[Candidate] = []
    player = Player(arm, {"max_new_tokens": ANSWER_TOKENS, "temperature": temperature, "top_p": 0.95})
    rounds = 2 + 4 * -(-count // (REQUESTS * PER_REQUEST))  # a quarter of the lines is enough
    for number in range(rounds):
        users = [USERS[(number * REQUESTS + place) % len(USERS)] for place in range(REQUESTS)]
        answers = player.completions([request(context, who) for who in users], stream_seed(seed, "asking", number))
        for place, (who, answer) in enumerate(zip(users, answers)):
            for line in listed(*answer):
                prompt = Prompt(tuple(as_user(line)), line)
                source = f"asked, request {number * REQUESTS + place + 1}: {who}"
                found.append(Candidate(prompt, source, f"asked {len(found)} in {number}"))
        copies = repeats([*examples, *(c.text for c in found)], similarity)[len(examples) :]
        found = [candidate for candidate, copy in zip(found, copies) if copy is None]
        report(min(len(found), count), (number + 1) * REQUESTS)
        if len(found) >= count:
            break
    if not found:
        raise InputError("the model wrote no list of messages that could be used; try a larger model, --logs or --data")
    # Spread over all requests: the first `count` would come from the first kinds of users alone.
    return [found[place * len(found) // count] for place in range(count)] if len(found) > count else found


def request(context: Context, users: str) -> list[Message]:
    """The chat in which the model is asked for messages that such users would send to an assistant with `context`."""
    chat = []
    for instruction, who, texts in EXAMPLES:
        answer = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        chat += [*as_user(_question(instruction, who)), {"role": "assistant", "content": answer}]
    return chat + as_user(_question(context, users))


def listed(text: str, finished: bool = True) -> list[str]:
    """The messages in a model's answer: numbered or bulleted lines, else a JSON list, else one a line.

    Thoughts in front, headings ("Here are five:"), numbers, quotes and emphasis around a message are dropped, and so is
    a last line that the token limit cut (`finished` is False).
    """
    text = final_part(text)
    start, end = text.find("["), text.rfind("]")
    if 0 <= start < end:
        try:
            values = json.loads(text[start : end + 1])
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            return [value.strip() for value in values if value.strip()]
    lines = [line for line in text.splitlines() if line.strip()]
    if not finished:
        lines = lines[:-1]
    marked = [line for line in lines if MARK.match(line)]
    chosen = [MARK.sub("", line, count=1) for line in marked] if marked else lines
    cleaned = [SAID.sub("", line.strip()).strip(QUOTES) for line in chosen]
    return [line for line in cleaned if len(line) > 2 and not line.endswith(":") and any(map(str.isalpha, line))]


def _question(context: Context, users: str) -> str:
    head = "" if isinstance(context, str) else "It has answered like this:\n"
    return (
        f"The instruction of an assistant:\n\n{head}{transcript(context)}\n\n"
        f"Write {PER_REQUEST} messages that different users send to this assistant, one per line, numbered. {users}"
    )
