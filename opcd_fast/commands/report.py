"""`opcd report`: did it work, and what did it cost?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from opcd_fast.commands.arguments import check_at_least, parse, quiet_libraries
from opcd_fast.training.settings import Within


@dataclass(frozen=True)
class ReportCommand:
    """Measure a finished run on held-out prompts against its base, with and without the context.

    Writes opcd_card.json (every number), README.md (a model card) and report.html (one page, no network) into the run's
    folder; card and README also into final/, which is what gets published.
    """

    run: Positional[str]
    """Output folder of `opcd train`."""
    prompts: str | None = None
    """Held-out prompts, a file as for `opcd train`; default: the run's own."""
    general: str | None = None
    """Unrelated prompts on which the distance to the base is measured; default: a list that comes with opcd."""
    regex: tuple[str, ...] = ()
    """Patterns to be found in a good answer (Python's re.search; ^ and $ for the whole)."""
    scorer: tuple[str, ...] = ()
    """Functions as module:function, of the messages, the answer and the prompt's row, as in training; from 0 to 1."""
    task: tuple[str, ...] = ()
    """Tasks of opcd, scored on their test split: instructions, math:FILE, frozen-lake, ..."""
    abilities: tuple[str, ...] = ()
    """Tasks of opcd, played greedily on their test split: arithmetic (nothing to install), ifbench ..."""
    ability_problems: int = 64
    """Problems of each ability."""
    ability_tokens: int = 64
    """Longest answer to them, in tokens; ifbench needs 256 or so."""
    model: str | None = None
    """Where the base model is now; default: where the run found it."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Without it such a model is refused."""
    max_prompts: int = 32
    """Prompts measured on, from the beginning of each file."""
    samples: int = 1
    """Answers of each arm to each prompt."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; default: the run's."""
    temperature: float | None = None
    """Of the answers and the compared distributions; default: the run's."""
    examples: int = 20
    """Answers worse than those of base + context that are kept, for each score."""
    seed: int = 0
    """Fixes the answers."""


def run(arguments: list[str]) -> int:
    command = parse(ReportCommand, "report", arguments)
    for name, least in (("max_prompts", 2), ("samples", 1), ("max_new_tokens", 1), ("examples", 0),
                        ("ability_problems", 2), ("ability_tokens", 1)):  # fmt: skip
        check_at_least(least, command, name)
    if command.temperature is not None:
        Within(0, 100, open_low=True)("temperature", command.temperature)
    folder = Path(command.run)
    from rich.console import Console
    from rich.markdown import Markdown

    from opcd_fast.data import read_prompts
    from opcd_fast.data.tasks import load_task
    from opcd_fast.evaluation import Abilities
    from opcd_fast.evaluation.report import ReportOptions, by_function, by_pattern, measure, readme, write_report
    from opcd_fast.training.run import read_record, run_settings

    settings = run_settings(folder)
    columns = {name: settings[name] for name in ("prompt_column", "drop_last_answer") if name in settings}
    passed = ("model", "trust_remote_code", "max_prompts", "samples", "max_new_tokens", "temperature", "examples",
              "seed")  # fmt: skip
    options = ReportOptions(
        prompts=None if command.prompts is None else read_prompts(command.prompts, **columns),
        general=None if command.general is None else read_prompts(command.general, "general"),
        behaviours=[*map(by_pattern, command.regex), *map(by_function, command.scorer)],
        tasks=command.task,
        abilities=Abilities(command.abilities, command.ability_problems, command.ability_tokens),
        **{name: getattr(command, name) for name in passed},
    )
    options.abilities.check()
    for name in command.task:
        load_task(name)  # a missing package or file must not cost the loading of a model
    quiet_libraries()
    card = measure(folder, options, told=lambda line: print(f"{line} ...", flush=True))
    written = write_report(folder, card, (read_record(folder) or {}).get("context"))
    Console().print(Markdown("".join(f"\n## {part}" for part in readme(card).split("\n## ")[1:-1])))  # not the hashes
    print(f"saved: {', '.join(map(str, written))} ({card['seconds']:.0f} s)")
    return 0
