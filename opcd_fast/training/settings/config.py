"""Every setting of a run, in one frozen dataclass. Python, YAML and the command line spell them the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opcd_fast.loss import ALPHA, BETA, TAIL, K
from opcd_fast.training.settings.checks import check
from opcd_fast.training.settings.gone import refuse_gone
from opcd_fast.training.settings.options import typed_values

LORA_LEARNING_RATE = 1e-3  # the demo's, measured on SmolLM2-135M; lower it for larger models
PREFIX_LEARNING_RATE = 2e-2  # in the README of Cartridges' authors (HazyResearch/cartridges), with Qwen3-4B
EMA_DECAY, SYNC_EVERY = 0.99, 10
IMPORTANCE_CLIP = 2.0
FULL_LEARNING_RATE = 5e-6  # the paper's (arXiv 2602.12275, searched 1e-6 ... 5e-6)


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
    """Where answers come from: "transformers" (this process, the fastest way that is exact), "generate"
    (transformers' own way), "server" (OpenAI's protocol with token ids), "vllm" (in this process), "replay" (a file).
    See docs/rollouts.md."""
    rollout_batch: int | None = None
    """Sequences generated at once; None: what memory holds at the first call, 256 at most."""
    merge_for_rollout: bool | None = None
    """Generate with a copy that has the adapter folded in. None: on a CPU where memory holds it, and
    not on a GPU."""
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
    """How the teacher reads the context: "auto" | "merge" | "pad" | "concat"."""
    max_prefix_bytes: int | None = None
    """Bound for the contexts' caches in memory; the ones used longest ago are dropped. None: no bound."""
    prefix_device: str | None = None
    """Where contexts' caches are kept; "cpu" brings them to a GPU layer by layer. None: where the teacher is."""
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

    def __new__(cls, *args: Any, **settings: Any) -> OPCDConfig:
        refuse_gone(settings)  # before Python calls them unexpected
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in typed_values(OPCDConfig, vars(self)).items():
            object.__setattr__(self, name, value)  # frozen for everyone else

        check(self)

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
