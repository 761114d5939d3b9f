"""Every setting of a run, in one frozen dataclass. Python, YAML and the command line spell them the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.loss import ALPHA, BETA, GATE, TAIL, K
from opcd_fast.runtime import HIDDEN, redacted
from opcd_fast.training.settings.checks import AUTO, DEFAULT, SECRET, check
from opcd_fast.training.settings.options import comma_separated, json_object, typed_values
from opcd_fast.training.settings.setting import (
    BELONGINGS,
    AtLeast,
    OneOf,
    SomeOf,
    Unsharded,
    Within,
    group_of,
    settings_of,
)

LORA_LEARNING_RATE = 1e-3  # the demo's, measured on SmolLM2-135M; lower it for larger models
PREFIX_LEARNING_RATE = 2e-2  # in the README of Cartridges' authors (HazyResearch/cartridges), with Qwen3-4B
EMA_DECAY, SYNC_EVERY = 0.99, 10
IMPORTANCE_CLIP = 2.0
FULL_LEARNING_RATE = 5e-6  # the paper's (arXiv 2602.12275, searched 1e-6 ... 5e-6)

BOTH_WRITE = {  # where student and teacher share a step's answers
    "answers": OneOf("student"), "objective": OneOf("divergence"), "importance_correction": OneOf("none"),
    "rollout": OneOf("transformers", "generate"),
}  # fmt: skip

run = group_of("The run")
answer = group_of("Answers")
prompt = group_of("Prompts and the chat template")
optimizing = group_of("Optimizer")
loss = group_of("Loss")
model = group_of("Teacher and adapter")
machine = group_of("Memory and device")
record = group_of("Evaluation and checkpoints")
repeating = group_of("Repeating and resuming")


@dataclass(frozen=True)
class OPCDConfig:
    """Settings of a run; the defaults are the paper's (arXiv 2602.12275) where it has one."""

    # fmt: off
    output_dir: str = run("runs/opcd", "Folder for metrics, checkpoints and the trained weights.",
        belongs=("resume", "comparison", "machine", "place"))
    steps: int = run(50, "Optimizer steps; each draws one batch of fresh answers.", AtLeast(1), belongs="resume")
    batch_size: int = run(128, "Prompts per step.", AtLeast(1))
    rollouts_per_prompt: int = run(1, "Answers drawn for each prompt.", AtLeast(1))
    max_new_tokens: int = answer(512, "Longest answer, in tokens; longer ones are cut there.", AtLeast(1))
    answer_growth: float = answer(0.0, """Share of the run over which the bound on training answers grows in a line to
        max_new_tokens; 0: it is there at once.""", Within(0, 1), needs={"kept_answers": OneOf(0)})
    temperature: float = answer(1.0, """Sampling temperature of the answers; it also divides both models' logits in the
        loss.""", Within(0, 100, open_low=True))
    top_p: float = answer(1.0, "Nucleus sampling of the answers; the paper trains with 1.", Within(0, 1, open_low=True))
    answers: str = answer("student", """Who writes the answers that are learned from: "student" (on-policy, without the
        context) or "teacher" (off-policy, with the context in front). Those of a file: rollout="replay".""",
        OneOf("student", "teacher"), belongs="system")
    kept_answers: int = answer(0, """Of answers="teacher": so many answers to each prompt are drawn before the first
        step, kept in answers.jsonl and used again and again. 0: fresh ones at every step.""", AtLeast(0),
        belongs="system", needs={"answers": OneOf("teacher")})
    off_policy_share: float = answer(0.0, """Share of a step's answers that the teacher writes, with the context in
        front; who writes which is drawn by the seed. 1 is answers="teacher".""", Within(0, 1), belongs="system",
        needs=BOTH_WRITE)
    task_episodes: int = answer(16, """Where prompts come from a task: episodes of its split "selection" that the
        student plays at each evaluation; 0: none.""", AtLeast(0))
    stop_tokens: tuple[str, ...] = answer((), """Tokens that end an answer besides the tokenizer's and the model's end
        tokens.""")
    prompt_column: str | None = prompt(None, "Column that holds the prompts; None: `prompt`, or `messages`.")
    drop_last_answer: bool = prompt(False, """Leave an assistant's answer at the end of a prompt's messages out; without
        it such a prompt is refused.""")
    chat_template_kwargs: str | None = prompt(None, """Variables of the chat template, as a JSON object:
        '{"enable_thinking": false}'. A row's own win.""", read=json_object)
    learning_rate: float | None = optimizing(None, """The highest rate. None: 5e-6 for full fine-tuning (the paper's),
        1e-3 for LoRA (the demo's), 2e-2 for a trained prefix (of Cartridges' authors).""", Within(0, 1, open_low=True))
    lr_scheduler_type: str = optimizing("constant", """The rate after the warm-up: "constant", or falling to zero over
        the run as a "linear" or "cosine" function of the step (transformers' schedules).""",
        OneOf("constant", "linear", "cosine"))
    warmup_steps: int = optimizing(0, "Steps over which the rate rises from 0 in a line.", AtLeast(0))
    optimizer: str = optimizing("adamw_torch", """"adamw_torch", "adamw_8bit" (state in 8 bits), "paged_adamw_8bit" (and
        on the host when the GPU is full; both need bitsandbytes), or "adafactor" (hardly any state).""",
        OneOf("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"),
        sharded=Unsharded(("adamw_torch",), "it does not know them"))
    weight_decay: float = optimizing(0.01, "Decoupled weight decay.", Within(0, 1))
    max_grad_norm: float = optimizing(1.0, """Gradients with a larger norm are scaled down to it; 0 switches clipping
        off.""", Within(0, 1e9))
    objective: str = loss("divergence", """"divergence" (between student and teacher at every token, see `divergence`),
        or "nll" (negative log-likelihood of the answers' tokens, which takes no teacher: supervised fine-tuning).""",
        OneOf("divergence", "nll"), belongs="system")
    divergence: str = loss(AUTO, """"gated_kl" (the reverse KL, and the forward one where the student is far from the
        teacher), "reverse_kl" (KL(student || teacher), the paper's), "forward_kl", "jsd", "skew_reverse_kl",
        "skew_forward_kl", or "topk_reverse_kl" (the truncated sum of the paper's code). "auto": gated_kl, and in a
        resumed run that of its beginning. Evaluations always report the reverse KL.""",
        belongs=("divergence", "system"))
    beta: float = loss(BETA, """Of "jsd": weight of the teacher's half; 0 is the forward, 1 the reverse KL.""",
        belongs=("divergence", "system"))
    alpha: float = loss(ALPHA, "Of the skewed divergences: share of the first model in the mixture.",
        belongs=("divergence", "system"))
    k: int = loss(K, """Of "topk_reverse_kl": how many of the student's most likely tokens count.""",
        belongs=("divergence", "system"))
    tail: str = loss(TAIL, """Of "topk_reverse_kl": what becomes of the other tokens: "none" (left out), "renormalize"
        or "bucket".""", belongs=("divergence", "system"))
    gate: str = loss(GATE, """Of "gated_kl": what opens it to the forward KL, "kl" (1 - exp(-reverse KL)) or "tv" (the
        total variation, a pass more over the logits).""", belongs=("divergence", "system"))
    normalize: str = loss("sequence", """"sequence": mean over answers of the mean over their tokens (the paper's Eq.
        1); "token": mean over tokens.""", OneOf("sequence", "token"))
    teacher_mode: str = model("frozen", """"frozen": the teacher keeps the weights it starts with. "live": it has the
        student's. "ema": a moving average of the student's. "periodic": a copy of the student's, made anew every
        `teacher_sync_every` steps.""", OneOf("frozen", "live", "ema", "periodic"), belongs="system",
        sharded=Unsharded(("frozen", "live"), "the teacher is a second copy that must follow"))
    teacher_ema_decay: float = model(EMA_DECAY, """Of "ema": share of the average kept at each step; it looks back over
        about 1 / (1 - decay) steps.""", Within(0, 1), belongs="system", needs={"teacher_mode": OneOf("ema")})
    teacher_sync_every: int = model(SYNC_EVERY, 'Of "periodic": optimizer steps from one copy to the next.',
        AtLeast(1), belongs="system", needs={"teacher_mode": OneOf("periodic")})
    teacher_device: str = model("auto", """Where the teacher's body runs: "auto" (with the student) | "cpu" | "cuda" |
        "cuda:N".""", belongs="resume", sharded=Unsharded(("auto",), "the teacher is sharded with the student"))
    teacher_offload: bool = model(False, """Keep a frozen teacher with weights of its own (teacher_model, or the copy of
        full fine-tuning) in the host's memory; it is on the GPU only while it scores.""", belongs="resume",
        needs={"teacher_mode": OneOf("frozen"), "teacher_device": OneOf("auto"), "teacher_quantization": OneOf("none")},
        sharded=Unsharded((False,), "the teacher is sharded with the student"))
    teacher_quantization: str = model("none", """"none", or "4bit": pack a teacher with weights of its own to NF4 (needs
        bitsandbytes).""", OneOf("none", "4bit"))
    quantization: str = model("none", """"none", or "4bit": pack the base under the adapter to NF4 for both models
        (QLoRA; needs bitsandbytes).""", OneOf("none", "4bit"))
    lora_rank: int = model(0, """0: full fine-tuning with fp32 master weights; above: LoRA, and the base with the
        adapter off is the teacher.""", AtLeast(0))
    lora_alpha: int | None = model(None, "LoRA scale numerator; None: twice the rank.", AtLeast(1),
        needs={"lora_rank": AtLeast(1)})
    lora_targets: str = model("all-linear", """Modules that get an adapter: "all-linear", or names separated by commas
        (q_proj,v_proj).""", read=comma_separated)
    use_dora: bool = model(False, """With lora_rank: DoRA (arXiv 2402.09353), which trains the norm of each row of the
        adapted weights as well.""", needs={"lora_rank": AtLeast(1)})
    num_virtual_tokens: int = model(0, """In place of lora_rank, above 0: PEFT's prefix tuning. Keys and values of so
        many tokens in front of every prompt are trained, begun as those of the context's first tokens; the base without
        them is the teacher.""", AtLeast(0),
        sharded=Unsharded((0,), "the prefix is made outside of the modules that gather weights"))
    gradient_checkpointing: bool = machine(False, """Recompute the student's activations in backward: less memory, about
        a third more time.""", belongs="resume")
    dtype: str = machine("auto", """Compute type: "auto" | "float32" | "bfloat16". Auto is bfloat16 on GPUs and on CPUs
        with bf16 arithmetic.""", OneOf("auto", "float32", "bfloat16"), belongs="resume")
    device: str = machine("auto", '"auto" | "cpu" | "cuda" | "cuda:N".', belongs=("resume", "place"))
    micro_batch_tokens: int | None = machine(None, """Student plus teacher tokens run through the models at once; None:
        the whole batch.""", AtLeast(1), belongs="resume")
    share_prompts: bool | None = machine(None, """The student reads once what the step's prompts have in common: a
        prompt with several answers, or the beginning of all prompts (a system prompt). None: where its model can.""",
        belongs="resume")
    rollout: str = machine("transformers", """Where answers come from: "transformers" (this process, the fastest way
        that is exact), "generate" (transformers' own way), "server" (OpenAI's protocol with token ids), "vllm" (in this
        process), "replay" (a file). See docs/rollouts.md.""",
        OneOf("transformers", "generate", "server", "vllm", "replay"))
    rollout_batch: int | None = machine(None, """Sequences generated at once; None: what memory holds at the first call,
        256 at most.""", AtLeast(1))
    merge_for_rollout: bool | None = machine(None, """Generate with a copy: LoRA folded in, or all weights that train in
        float32 in dtype. None: LoRA on CPUs, all weights where dtype is fast, if memory holds it. False: no copy.""",
        needs={"rollout": OneOf("transformers", "generate", "replay")},  # replay: its evaluations
        sharded=Unsharded((None, False), "the copy would be a whole model on every rank"))
    rollout_url: str | None = machine(None, 'Of "server": http://host:port, what stands in front of /v1.',
        belongs=("resume", "machine"), needs={"rollout": OneOf("server")})
    rollout_model: str | None = machine(None, """Of "server" and "vllm": the name there of the model, or of the base
        under the adapter; None: the name it was loaded by.""", needs={"rollout": OneOf("server", "vllm")})
    rollout_command: str | None = machine(None, """Of "server": a command that loads the weights from the folder it gets
        as its last argument. None: vLLM's endpoints for LoRA adapters.""", belongs=("resume", "machine"),
        needs={"rollout": OneOf("server")})
    rollout_timeout: float = machine(600.0, 'Of "server": seconds for one answer.',
        Within(0, 86400, open_low=True), belongs="resume", needs={"rollout": OneOf("server")})
    rollout_tries: int = machine(8, 'Of "server": how often an answer may fail before the run ends.',
        AtLeast(1), belongs="resume", needs={"rollout": OneOf("server")})
    rollout_patience: float = machine(300.0, """Of "server": seconds that it may be away (connections refused, HTTP 502
        to 504), as while it is started again; such tries do not count.""",
        Within(0, 86400), belongs="resume", needs={"rollout": OneOf("server")})
    rollout_concurrency: int = machine(64, 'Of "server": answers asked for at the same time.',
        AtLeast(1), belongs="resume", needs={"rollout": OneOf("server")})
    rollout_logprobs: str = machine("raw", """Of "server": its log-probabilities are "raw" (the model's) or "processed"
        (of the sampling distribution).""", OneOf("raw", "processed"), needs={"rollout": OneOf("server")})
    rollout_gpu_share: float = machine(0.5, """Of "vllm": share of the GPU's memory it may take while it generates.""",
        Within(0, 1, open_low=True), belongs="resume", needs={"rollout": OneOf("vllm")})
    rollout_file: str | None = machine(None, 'Of "replay": JSONL of prompts and answers.',
        belongs="machine", needs={"rollout": OneOf("replay")})
    trust_remote_code: bool = machine(False, """Run Python code that comes with a model; without it such a model is
        refused. Taken from the command line alone, never from a file. In Python: `load_model`'s.""",
        belongs=("resume", "place"))
    loss_backend: str = machine("auto", '"auto" | "triton" | "native" | "torch".',
        OneOf("auto", "triton", "native", "torch"), belongs="resume")
    workspace_bytes: int | None = machine(None, "Bound for the loss's scratch memory; None: the loss's own default.",
        AtLeast(1), belongs="resume")
    teacher_path: str = machine("auto", 'How the teacher reads the context: "auto" | "merge" | "pad" | "concat".',
        OneOf("auto", "merge", "pad", "concat"),
        sharded=Unsharded(("auto", "merge"), "it runs once per context or sequence, which differ between ranks"))
    max_prefix_bytes: int | None = machine(None, """Bound for the contexts' caches in memory; the ones used longest ago
        are dropped. None: no bound.""", AtLeast(1), belongs="resume",
        sharded=Unsharded((None,), "ranks would run the teacher at different times"))
    prefix_device: str | None = machine(None, """Where contexts' caches are kept; "cpu" brings them to a GPU layer by
        layer. None: where the teacher is.""", belongs="resume",
        needs={"teacher_path": OneOf("auto", "merge", "pad")})
    teacher_batch_bytes: int | None = machine(None, """Bound for what the teacher holds besides weights and caches;
        larger batches run in parts. None: a quarter of its weights, at least 1 GiB.""", AtLeast(1), belongs="resume",
        sharded=Unsharded((None,), "ranks would run the teacher at different times"))
    eval_every: int = record(10, """Held-out evaluation every so many steps, and before the first and after the last; 0:
        never.""", AtLeast(0), belongs="resume")
    eval_batch: int = record(32, """Held-out prompts used for evaluation during training (the first ones); all when
        there are fewer.""", AtLeast(1))
    save_every: int = record(10, "Checkpoint every so many steps, and after the last; 0: only after the last.",
        AtLeast(0), belongs="resume")
    keep_checkpoints: int = record(2, "Older checkpoints are removed.", AtLeast(1), belongs="resume")
    save_best: bool = record(False, "Keep the weights of the best evaluation in best/, ready to load.",
        belongs="resume")
    best_by: str = record("kl", """What is best, for save_best and early stopping: "kl" (held-out, on the student's own
        answers, lowest), "fixed_kl" (on the teacher's) or "score" (of the scorer, highest).""",
        OneOf("kl", "fixed_kl", "score"))
    early_stop_patience: int = record(0, """Stop after so many evaluations in a row without an improvement larger than
        early_stop_delta; 0: never.""", AtLeast(0), belongs="resume")
    early_stop_delta: float | None = record(None, """What counts as an improvement, in units of best_by. None: the
        standard error of the evaluation.""", Within(0, 1e9), belongs="resume",
        needs={"early_stop_patience": AtLeast(1)})
    preview: int = record(3, """Prompts whose answers with and without the context are shown before the first step; 0:
        none.""", AtLeast(0), belongs=("resume", "place"))
    scorer: str | None = record(None, """Your own measure of held-out answers, "module:function": (messages, answer,
        row) -> number, higher is better.""")
    importance_correction: str = record("none", """Where the sampler's probabilities differ from the trainer's: "none",
        or weigh tokens by the ratio of what comes before them ("token"), or answers by their whole ratio ("sequence").
        See docs/training.md.""", OneOf("none", "token", "sequence"))
    importance_clip: float = record(IMPORTANCE_CLIP, "Upper bound of importance_correction's weights.",
        Within(0, 1e9, open_low=True), needs={"importance_correction": OneOf("token", "sequence")})
    trackers: tuple[str, ...] = record((), """Where numbers are sent besides metrics.jsonl: "tensorboard", "wandb",
        "trackio".""", SomeOf("tensorboard", "wandb", "trackio"), belongs="resume")
    plots: bool = record(True, "Draw kl.png, seconds.png and answers.png at each evaluation and at the end.",
        belongs="resume")
    seed: int = repeating(0, "Fixes prompt order, answers and initial adapter.", AtLeast(0), belongs="comparison")
    resume: bool = repeating(False, "Go on from the newest checkpoint in output_dir.",
        belongs=("resume", "comparison", "place"))
    # fmt: on

    def __post_init__(self) -> None:
        for name, value in typed_values(OPCDConfig, vars(self)).items():
            object.__setattr__(self, name, value)  # frozen for everyone else
        if self.divergence == AUTO and not self.resume:
            object.__setattr__(self, "divergence", DEFAULT)
        check(self)

    def public(self) -> dict[str, Any]:
        """All of them as they may be written down: without secrets."""
        url, command = (getattr(self, name) for name in SECRET)
        hidden = {"rollout_url": url and redacted(url), "rollout_command": command and HIDDEN}
        return {**asdict(self), **hidden}

    def columns(self) -> dict[str, Any]:
        """How `read_prompts` reads the rows."""
        return {"prompt_column": self.prompt_column, "drop_last_answer": self.drop_last_answer}

    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs` as Python values."""
        return json.loads(self.chat_template_kwargs or "{}")

    @property
    def makes_adapter(self) -> bool:
        """Whether a run puts an adapter on the model; without, all weights are trained (or a PEFT model's own)."""
        return bool(self.lora_rank or self.num_virtual_tokens)

    @property
    def sends_adapter(self) -> bool:
        """Whether answers come from a program that is sent the adapter alone."""
        return self.rollout == "vllm" or (self.rollout == "server" and self.rollout_command is None)

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes answers in training, or parts of them."""
        return self.answers == "teacher" or self.off_policy_share > 0

    @property
    def plans_steps(self) -> bool:
        """Whether what a step does depends on how many there will be."""
        return self.lr_scheduler_type != "constant" or self.answer_growth > 0

    def learning_rate_for(self, adapter: bool, prefix: bool = False) -> float:
        """The rate of a run that trains an adapter (a new one, or a PEFT model's; `prefix`: a trained one), or all."""
        if self.learning_rate is not None:
            return self.learning_rate
        if prefix or self.num_virtual_tokens:
            return PREFIX_LEARNING_RATE
        return LORA_LEARNING_RATE if adapter else FULL_LEARNING_RATE


def check_values(values: Mapping[str, Any]) -> None:
    """Raises InputError for a value that its setting cannot have, whatever the others are."""
    rules = {field.name: known.rule for field, known in settings_of(OPCDConfig)}
    for name, value in typed_values(OPCDConfig, values).items():
        rule = rules[name]
        if rule is not None and value is not None:
            rule(name, value)


def known_settings(values: Mapping[str, Any], where: str, remedy: str) -> dict[str, Any]:
    """The settings of an earlier run without those that this version does not have and that run did not use.

    Raises InputError where it used one: what was done then is not what would be done now.
    """
    names = {field.name for field, _ in settings_of(OPCDConfig)}
    for name, value in values.items():
        if name not in names and value:
            raise InputError(f"{where} has {name}={value!r:.80}, which this version does not know; {remedy}")
    return {name: value for name, value in values.items() if name in names}


def settings_with(belongs: str) -> tuple[str, ...]:
    """Names of the settings that belong to one of `BELONGINGS`, in order."""
    assert belongs in BELONGINGS, belongs
    return tuple(field.name for field, known in settings_of(OPCDConfig) if belongs in known.belongs)
