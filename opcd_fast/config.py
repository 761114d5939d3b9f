"""Every setting of a run, in one frozen dataclass. Python, YAML and the command line spell them the same."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from opcd_fast.divergences import ALPHA, BETA, TAIL, K, check_divergence, unused_parameter
from opcd_fast.errors import InputError

LORA_LEARNING_RATE = 1e-3  # the demo's, measured on SmolLM2-135M; lower it for larger models
PREFIX_LEARNING_RATE = 2e-2  # in the README of Cartridges' authors (HazyResearch/cartridges), with Qwen3-4B
EMA_DECAY, SYNC_EVERY = 0.99, 10
OFFLOAD_NEEDS = {"teacher_mode": "frozen", "teacher_device": "auto", "teacher_quantization": "none"}
IMPORTANCE_CLIP = 2.0
TRACKERS = ("tensorboard", "wandb", "trackio")  # each also the name of its package
FULL_LEARNING_RATE = 5e-6  # the paper's (arXiv 2602.12275, searched 1e-6 ... 5e-6)

# Which kinds of rollout use which settings; setting another one is an error.
ROLLOUT_SETTINGS = {
    ("transformers", "generate", "continuous", "replay"): ("merge_for_rollout",),  # replay: its evaluations
    ("server",): (
        "rollout_url", "rollout_command", "rollout_timeout", "rollout_tries", "rollout_concurrency",
        "rollout_logprobs",
    ),
    ("server", "vllm"): ("rollout_model",),
    ("vllm",): ("rollout_gpu_share",),
    ("replay",): ("rollout_file",),
}  # fmt: skip


@dataclass(frozen=True)
class OPCDConfig:
    """Settings of a run; the defaults are the paper's (arXiv 2602.12275) where it has one."""

    output_dir: str = "runs/opcd"
    """Folder for metrics, checkpoints and the trained weights."""
    steps: int = 50
    """Optimizer steps; each draws one batch of fresh answers."""
    batch_size: int = 128
    """Prompts per step."""
    rollouts_per_prompt: int = 1
    """Answers drawn for each prompt."""
    max_new_tokens: int = 512
    """Longest answer, in tokens; longer ones are cut there."""
    temperature: float = 1.0
    """Sampling temperature of the answers; it also divides both models' logits in the loss."""
    top_p: float = 1.0
    """Nucleus sampling of the answers; the paper trains with 1."""
    answers: str = "student"
    """Who writes the answers that are learned from: "student" (on-policy, without the context) or "teacher"
    (off-policy, with the context in front). Those of a file: rollout="replay"."""
    kept_answers: int = 0
    """Of answers="teacher": so many answers to each prompt are drawn before the first step, kept in answers.jsonl and
    used again and again. 0: fresh ones at every step."""
    task_episodes: int = 16
    """Where prompts come from a task: episodes of its split "selection" that the student plays at each evaluation; 0:
    none."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer besides the tokenizer's and the model's end tokens."""
    prompt_column: str | None = None
    """Column that holds the prompts; None: `prompt`, or `messages`."""
    drop_last_answer: bool = False
    """Leave an assistant's answer at the end of a prompt's messages out; without it such a prompt is refused."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template, as a JSON object: '{"enable_thinking": false}'. A row's own win."""
    learning_rate: float | None = None
    """Constant rate. None: 5e-6 for full fine-tuning (the paper's), 1e-3 for LoRA (the demo's), 2e-2 for a
    trained prefix (of Cartridges' authors)."""
    optimizer: str = "adamw_torch"
    """"adamw_torch", "adamw_8bit" (state in 8 bits), "paged_adamw_8bit" (and on the host when the GPU is full; both
    need bitsandbytes), or "adafactor" (hardly any state)."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 switches clipping off."""
    objective: str = "divergence"
    """"divergence" (between student and teacher at every token, see `divergence`), or "nll" (negative log-likelihood of
    the answers' tokens, which takes no teacher: supervised fine-tuning)."""
    divergence: str = "reverse_kl"
    """"reverse_kl" (KL(student || teacher), the paper's), "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", or
    "topk_reverse_kl" (the truncated sum of the paper's code). Evaluations always report the reverse KL."""
    beta: float = BETA
    """Of "jsd": weight of the teacher's half; 0 is the forward, 1 the reverse KL."""
    alpha: float = ALPHA
    """Of the skewed divergences: share of the first model in the mixture."""
    k: int = K
    """Of "topk_reverse_kl": how many of the student's most likely tokens count."""
    tail: str = TAIL
    """Of "topk_reverse_kl": what becomes of the other tokens: "none" (left out), "renormalize" or "bucket"."""
    normalize: str = "sequence"
    """"sequence": mean over answers of the mean over their tokens (the paper's Eq. 1); "token": mean over tokens."""
    teacher_mode: str = "frozen"
    """"frozen": the teacher keeps the weights it starts with. "live": it has the student's. "ema": a moving average of
    the student's. "periodic": a copy of the student's, made anew every `teacher_sync_every` steps."""
    teacher_ema_decay: float = EMA_DECAY
    """Of "ema": share of the average kept at each step; it looks back over about 1 / (1 - decay) steps."""
    teacher_sync_every: int = SYNC_EVERY
    """Of "periodic": optimizer steps from one copy to the next."""
    teacher_device: str = "auto"
    """Where the teacher's body runs: "auto" (with the student) | "cpu" | "cuda" | "cuda:N"."""
    teacher_offload: bool = False
    """Keep a frozen teacher with weights of its own (teacher_model, or the copy of full fine-tuning) in the host's
    memory; it is on the GPU only while it scores."""
    teacher_quantization: str = "none"
    """"none", or "4bit": pack a teacher with weights of its own to NF4 (needs bitsandbytes)."""
    quantization: str = "none"
    """"none", or "4bit": pack the base under the adapter to NF4 for both models (QLoRA; needs bitsandbytes)."""
    lora_rank: int = 0
    """0: full fine-tuning with fp32 master weights; above: LoRA, and the base with the adapter off is the teacher."""
    lora_alpha: int | None = None
    """LoRA scale numerator; None: twice the rank."""
    lora_targets: str = "all-linear"
    """Modules that get an adapter: "all-linear", or names separated by commas (q_proj,v_proj)."""
    use_dora: bool = False
    """With lora_rank: DoRA (arXiv 2402.09353), which trains the norm of each row of the adapted weights as well."""
    num_virtual_tokens: int = 0
    """In place of lora_rank, above 0: PEFT's prefix tuning. Keys and values of so many tokens in front of every prompt
    are trained, begun as those of the context's first tokens; the base without them is the teacher."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in backward: less memory, about a third more time."""
    dtype: str = "auto"
    """Compute type: "auto" | "float32" | "bfloat16". Auto is bfloat16 on GPUs and on CPUs with bf16 arithmetic."""
    device: str = "auto"
    """"auto" | "cpu" | "cuda" | "cuda:N"."""
    micro_batch_tokens: int | None = None
    """Student plus teacher tokens run through the models at once; None: the whole batch."""
    share_prompts: bool | None = None
    """The student reads once what the step's prompts have in common: a prompt with several answers, or the beginning of
    all prompts (a system prompt). None: where its model can."""
    rollout: str = "transformers"
    """Where answers come from: "transformers" (this process, the fastest way that is exact), "generate" or
    "continuous" (transformers' own ways), "server" (OpenAI's protocol with token ids), "vllm" (in this process),
    "replay" (a file). See docs/rollouts.md."""
    rollout_batch: int | None = None
    """Sequences generated at once; None: what memory holds at the first call, 256 at most."""
    merge_for_rollout: bool | None = None
    """Generate with a copy that has the adapter folded in. None: on the CPU; on a GPU what is faster at the first
    call, and exact (unmerged for models under 20 million parameters)."""
    rollout_url: str | None = None
    """Of "server": http://host:port, what stands in front of /v1."""
    rollout_model: str | None = None
    """Of "server" with rollout_command, and of "vllm": the model's name there; None: the name it was loaded by."""
    rollout_command: str | None = None
    """Of "server": a command that loads the weights from the folder it gets as its last argument. None: vLLM's
    endpoints for LoRA adapters."""
    rollout_timeout: float = 600.0
    """Of "server": seconds for one answer."""
    rollout_tries: int = 8
    """Of "server": how often an answer is asked for before the run ends."""
    rollout_concurrency: int = 64
    """Of "server": answers asked for at the same time."""
    rollout_logprobs: str = "raw"
    """Of "server": its log-probabilities are "raw" (the model's) or "processed" (of the sampling distribution)."""
    rollout_gpu_share: float = 0.5
    """Of "vllm": share of the GPU's memory it may take while it generates."""
    rollout_file: str | None = None
    """Of "replay": JSONL of prompts and answers."""
    loss_backend: str = "auto"
    """"auto" | "triton" | "native" | "torch"."""
    workspace_bytes: int | None = None
    """Bound for the loss's scratch memory; None: the loss's own default."""
    teacher_path: str = "auto"
    """How the teacher reads the context: "auto" | "merge" | "pad" | "mask" | "concat"."""
    prefix_store: str | None = None
    """Folder where contexts' caches are kept, so that a second run does not read them again; None: nowhere."""
    max_prefix_bytes: int | None = None
    """Bound for the contexts' caches in memory; the ones used longest ago are dropped. None: no bound."""
    prefix_device: str | None = None
    """Where contexts' caches are kept; "cpu" brings them to a GPU layer by layer. None: where the teacher is."""
    prefix_dtype: str | None = None
    """"float8_e4m3fn" keeps contexts' caches in eight bits, with the error that brings. None: the teacher's type."""
    teacher_batch_bytes: int | None = None
    """Bound for what the teacher holds besides weights and caches; larger batches run in parts. None: a quarter of
    its weights, at least 1 GiB."""
    eval_every: int = 10
    """Held-out evaluation every so many steps, and before the first and after the last; 0: never."""
    eval_batch: int = 32
    """Held-out prompts used for evaluation during training (the first ones); all when there are fewer."""
    save_every: int = 10
    """Checkpoint every so many steps, and after the last; 0: only after the last."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    save_best: bool = False
    """Keep the weights of the best evaluation in best/, ready to load."""
    best_by: str = "kl"
    """What is best, for save_best and early stopping: "kl" (held-out, on the student's own answers, lowest),
    "fixed_kl" (on the teacher's) or "score" (of the scorer, highest)."""
    early_stop_patience: int = 0
    """Stop after so many evaluations in a row without an improvement larger than early_stop_delta; 0: never."""
    early_stop_delta: float | None = None
    """What counts as an improvement, in units of best_by. None: the standard error of the evaluation."""
    scorer: str | None = None
    """Your own measure of held-out answers, "module:function": (messages, answer, row) -> number, higher is better."""
    importance_correction: str = "none"
    """Where the sampler's probabilities differ from the trainer's: "none", or weigh tokens by the ratio of what comes
    before them ("token"), or answers by their whole ratio ("sequence"). See docs/training.md."""
    importance_clip: float = IMPORTANCE_CLIP
    """Upper bound of importance_correction's weights."""
    trackers: tuple[str, ...] = ()
    """Where numbers are sent besides metrics.jsonl: "tensorboard", "wandb", "trackio"."""
    plots: bool = True
    """Draw kl.png, seconds.png and answers.png at each evaluation and at the end."""
    seed: int = 0
    """Fixes prompt order, answers and initial adapter."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""

    def __post_init__(self) -> None:
        for name, value in typed_values(OPCDConfig, vars(self)).items():
            object.__setattr__(self, name, value)  # frozen for everyone else

        def at_least(name: str, least: int) -> None:
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name}={value!r} must be a whole number of at least {least}")

        def one_of(name: str, *allowed: str) -> None:
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}={value!r} is not available; use {' or '.join(map(repr, allowed))}")

        def within(name: str, low: float, high: float, open_low: bool = False) -> None:
            value = getattr(self, name)
            if not ((low < value if open_low else low <= value) and value <= high):  # refuses NaN too
                start = "above" if open_low else "from"
                raise InputError(f"{name}={value!r} must be a number {start} {low} up to {high}")

        for name in ("steps", "batch_size", "rollouts_per_prompt", "max_new_tokens", "eval_batch"):
            at_least(name, 1)
        for name in ("lora_rank", "num_virtual_tokens", "eval_every", "save_every", "seed"):
            at_least(name, 0)
        for name in ("early_stop_patience", "kept_answers", "task_episodes"):
            at_least(name, 0)
        at_least("keep_checkpoints", 1)
        bounds = ("micro_batch_tokens", "workspace_bytes", "max_prefix_bytes", "teacher_batch_bytes", "rollout_batch")
        for name in (*bounds, "lora_alpha"):
            if getattr(self, name) is not None:
                at_least(name, 1)
        within("temperature", 0, 100, open_low=True)
        within("top_p", 0, 1, open_low=True)
        if self.learning_rate is not None:
            within("learning_rate", 0, 1, open_low=True)
        within("weight_decay", 0, 1)
        within("max_grad_norm", 0, 1e9)
        try:
            check_divergence(self.divergence, self.beta, self.alpha, self.k, self.tail)
        except ValueError as error:
            raise InputError(str(error)) from error
        unused = unused_parameter(self.divergence, self.beta, self.alpha, self.k, self.tail)
        if unused is not None:
            raise InputError(f"{unused} is set, but divergence={self.divergence!r} has no {unused}; drop one of them")
        one_of("teacher_mode", "frozen", "live", "ema", "periodic")
        self._check_system(one_of)
        within("teacher_ema_decay", 0, 1)
        at_least("teacher_sync_every", 1)
        for name, mode, default in (("ema_decay", "ema", EMA_DECAY), ("sync_every", "periodic", SYNC_EVERY)):
            if self.teacher_mode != mode and getattr(self, f"teacher_{name}") != default:
                raise InputError(
                    f"teacher_{name} is set, but teacher_mode={self.teacher_mode!r} has none; drop it, or set "
                    f"teacher_mode={mode!r}"
                )
        if self.teacher_offload:
            for name, only in OFFLOAD_NEEDS.items():
                if getattr(self, name) != only:
                    raise InputError(
                        f"teacher_offload needs {name}={only!r}, not {getattr(self, name)!r}; drop one of them"
                    )
        one_of("teacher_quantization", "none", "4bit")
        one_of("quantization", "none", "4bit")
        one_of("optimizer", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor")
        one_of("normalize", "sequence", "token")
        one_of("dtype", "auto", "float32", "bfloat16")
        one_of("loss_backend", "auto", "triton", "native", "torch")
        self._check_running(one_of, within)
        one_of("teacher_path", "auto", "merge", "pad", "mask", "concat")
        if self.prefix_dtype is not None:
            one_of("prefix_dtype", "float8_e4m3fn")
        for name in ("prefix_device", "prefix_dtype"):
            if self.teacher_path == "concat" and getattr(self, name) is not None:
                raise InputError(f"{name} is set, but teacher_path='concat' keeps no caches; drop one of them")
        if self.lora_alpha is not None and not self.lora_rank:
            raise InputError("lora_alpha is set but lora_rank is 0; set lora_rank or drop lora_alpha")
        if self.use_dora and not self.lora_rank:
            raise InputError("use_dora is set but lora_rank is 0; set lora_rank, or drop use_dora")
        if self.num_virtual_tokens:
            self._check_prefix()
        self._check_rollout(one_of, at_least, within)
        if self.merge_for_rollout and not self.lora_rank:
            raise InputError("merge_for_rollout=True needs an adapter; set lora_rank or drop merge_for_rollout")

    def _check_running(self, one_of: Any, within: Any) -> None:
        one_of("best_by", "kl", "fixed_kl", "score")
        one_of("importance_correction", "none", "token", "sequence")
        within("importance_clip", 0, 1e9, open_low=True)
        if self.early_stop_delta is not None:
            within("early_stop_delta", 0, 1e9)
            if not self.early_stop_patience:
                raise InputError("early_stop_delta is set, but early_stop_patience is 0; set it, or drop the delta")
        chooses = self.save_best or self.early_stop_patience
        if self.best_by != "kl" and not chooses:
            raise InputError(f"best_by={self.best_by!r} chooses nothing; set save_best or early_stop_patience")
        if chooses and not self.eval_every:
            raise InputError("save_best and early_stop_patience need held-out evaluations; set eval_every")
        if self.importance_correction == "none" and self.importance_clip != IMPORTANCE_CLIP:
            raise InputError("importance_clip is set, but importance_correction is 'none'; drop one of them")
        if self.importance_correction != "none" and self.top_p < 1:
            raise InputError(
                f"importance_correction={self.importance_correction!r} needs top_p=1: with top_p={self.top_p} answers "
                "come from a truncated distribution on purpose"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                raise InputError(f"trackers: {name!r} is not available; use {', '.join(map(repr, TRACKERS))}")

    def _check_system(self, one_of: Any) -> None:
        """Who writes, who scores, and what is minimised must make sense together."""
        one_of("answers", "student", "teacher")
        one_of("objective", "divergence", "nll")
        if self.objective == "nll":
            if self.answers == "student" and self.rollout != "replay":
                raise InputError(
                    "objective='nll' on the student's own answers teaches nothing: its gradient is zero on average; "
                    "set answers='teacher', or rollout='replay' for those of a file"
                )
            if self.divergence != "reverse_kl":
                raise InputError(f"divergence={self.divergence!r} is set, but objective='nll' has none; drop one")
            if self.answers != "teacher" and self.teacher_mode != "frozen":
                raise InputError(f"teacher_mode={self.teacher_mode!r}: with objective='nll' the teacher scores nothing")
        if self.answers == "teacher" and self.rollout == "replay":
            raise InputError("answers='teacher' and rollout='replay' both say who answers; drop one of them")
        if self.answers == "teacher" and self.rollout in ("server", "vllm") and self.teacher_mode != "live":
            raise InputError(
                f"rollout={self.rollout!r} samples the student, and answers='teacher' with teacher_mode="
                f"{self.teacher_mode!r} other weights; set rollout='transformers' or teacher_mode='live'"
            )
        off_policy = "objective='nll'" if self.objective == "nll" else "answers='teacher'"
        if self.importance_correction != "none" and (self.objective == "nll" or self.answers == "teacher"):
            raise InputError(
                f"importance_correction={self.importance_correction!r} weighs the student's own answers; {off_policy} "
                "has none: drop one of them"
            )
        if self.kept_answers and self.answers != "teacher":
            raise InputError("kept_answers is set, but the student's answers are always fresh; set answers='teacher'")
        if self.kept_answers and self.teacher_mode != "frozen":
            raise InputError(
                f"kept_answers are written before the first step, so teacher_mode={self.teacher_mode!r} would move a "
                "teacher that writes no more; set kept_answers=0 or teacher_mode='frozen'"
            )

    def _check_prefix(self) -> None:
        name = f"num_virtual_tokens={self.num_virtual_tokens}"
        if self.lora_rank:
            raise InputError(f"{name} and lora_rank={self.lora_rank} are two adapters; set one of them")
        if self.teacher_mode != "frozen":
            raise InputError(f"{name}: a teacher in mode {self.teacher_mode!r} would have the prefix in front of the "
                             "context as well; set teacher_mode='frozen', or use lora_rank")  # fmt: skip
        if self.share_prompts:
            raise InputError(f"{name}: prompts are not shared behind a trained prefix; drop share_prompts")
        sends_adapter = self.rollout == "vllm" or (self.rollout == "server" and self.rollout_command is None)
        if sends_adapter or self.rollout == "continuous":
            raise InputError(f"{name}: rollout={self.rollout!r} cannot run a trained prefix; use 'transformers', or "
                             "'server' with rollout_command")  # fmt: skip

    def _check_rollout(self, one_of: Any, at_least: Any, within: Any) -> None:
        one_of("rollout", "transformers", "generate", "continuous", "server", "vllm", "replay")
        one_of("rollout_logprobs", "raw", "processed")
        at_least("rollout_tries", 1)
        at_least("rollout_concurrency", 1)
        within("rollout_timeout", 0, 86400, open_low=True)
        within("rollout_gpu_share", 0, 1, open_low=True)
        for kind, name in (("server", "rollout_url"), ("replay", "rollout_file")):
            if self.rollout == kind and getattr(self, name) is None:
                raise InputError(f"rollout={kind!r} needs {name}")
        sends_adapter = self.rollout == "vllm" or (self.rollout == "server" and self.rollout_command is None)
        if self.use_dora and sends_adapter:
            raise InputError(
                f"use_dora: rollout={self.rollout!r} sends the adapter to vLLM, which refuses DoRA; drop use_dora, or "
                "use rollout='transformers', or 'server' with rollout_command"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for kinds, names in ROLLOUT_SETTINGS.items():
            for name in names:
                if self.rollout not in kinds and getattr(self, name) != defaults[name]:
                    raise InputError(f"{name} is set, but rollout={self.rollout!r} does not use it; drop one of them")

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

    def learning_rate_for(self, adapter: bool, prefix: bool = False) -> float:
        """The rate of a run that trains an adapter (a new one, or a PEFT model's; `prefix`: a trained one), or all."""
        if self.learning_rate is not None:
            return self.learning_rate
        if prefix or self.num_virtual_tokens:
            return PREFIX_LEARNING_RATE
        return LORA_LEARNING_RATE if adapter else FULL_LEARNING_RATE


def typed_values(cls: type, values: Mapping[str, Any], numbers_as_text: bool = False) -> dict[str, Any]:
    """Values of `cls`'s fields in the types that these declare: lists become tuples, paths become text.

    Raises InputError for every other type: `resume="false"` is true in Python, and a string is a tuple of letters.
    With `numbers_as_text` a float may be written out, as YAML reads 1e-4.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    return {name: _typed(name, kinds[name], value, numbers_as_text) for name, value in values.items()}


def _typed(name: str, declared: str, value: Any, numbers_as_text: bool) -> Any:
    kind, _, none = declared.partition(" | ")
    if value is None and none:
        return None
    if kind == "float" and numbers_as_text and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if name == "lora_targets":
        value = _comma_separated(value)
    if name == "chat_template_kwargs":
        value = _json_object(value)
    if kind == "str" and isinstance(value, PurePath):
        value = str(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    good, wanted = {
        "bool": (isinstance(value, bool), "True or False"),
        "int": (is_number and isinstance(value, int), "a whole number"),
        "float": (is_number, "a number"),
        "str": (isinstance(value, str) and value.strip() != "", "text, and not empty"),
        "tuple[str, ...]": (is_list and all(isinstance(v, str) and v for v in value), "a list of texts: ['<end>']"),
    }[kind]
    if not good:
        raise InputError(f"{name}={value!r:.80} must be {wanted}{' (or None)' if none else ''}")
    return tuple(value) if is_list else value


def _comma_separated(value: Any) -> Any:
    """["q_proj", "v_proj"] and "q_proj, v_proj" as "q_proj,v_proj"; anything else as it is."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return value
    return ",".join(name.strip() for name in names if name.strip())


def _json_object(value: Any) -> Any:
    """{"a": False} and '{"a": false}' as the second; text that is no object raises InputError, other types pass."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"chat_template_kwargs={value!r:.80} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"chat_template_kwargs={json.dumps(value)} must be an object: '{{\"name\": value}}'")
    try:
        return json.dumps(dict(value), sort_keys=True) if isinstance(value, Mapping) else value
    except TypeError as error:
        raise InputError(f"chat_template_kwargs={value!r:.80} must hold JSON values: {error}") from error


def check_names(values: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raises InputError for a name that is not an option, with the closest one that is."""
    for name in values:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; options: {', '.join(allowed)}"
            raise InputError(f"{where}: unknown option {name!r}{hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, names spelled as in Python (dashes allowed). Raises InputError."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise InputError(f"config file {str(path)!r} does not exist")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise InputError(f"config file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config file {str(path)!r} must hold `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def option_names(*classes: type) -> list[str]:
    return [field.name for cls in classes for field in dataclasses.fields(cls)]
