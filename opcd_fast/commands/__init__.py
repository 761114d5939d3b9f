"""The commands of `opcd`, one module each; `run(arguments)` of a module returns the exit status.

A module is imported when its command runs: `opcd --help` needs nothing but Python.
"""

COMMANDS = {
    "demo": "watch it happen on a small real model, on this machine, in a few minutes",
    "plan": "predict a run's memory and find settings that fit your GPU",
    "preview": "see what the context changes in this model's answers, before you train",
    "train": "do it with your model, context and prompts",
    "init": "write a config to start from, with an example that trains at once",
    "prompts": "make training prompts for a context, from a model, logs or a data set",
    "generate": "answer a prompt with a trained (or any) model",
    "chat": "talk to a trained model, and to the base with the context beside it",
    "report": "did it work, and what did it cost? A card, a README and a page",
    "check": "has the context, template, tokenizer or base changed since?",
    "diff": "two runs compared by their cards",
    "export": "write a finished run as an adapter or one model that other programs load",
    "extract": "let a model play problems and write down what it learned",
    "accumulate": "put lessons together as notes of a bounded length",
    "select": "find the notes that help most on held-out problems",
    "compress": "look for a shorter text that does what the context does",
    "compare": "train several systems with several seeds and put their numbers into one table",
    "info": "what is installed here and what is missing",
    "completion": "make bash, zsh or fish complete commands and options",
}
"""Name (also of the module) and what a command is for, in the order of `opcd --help`."""
