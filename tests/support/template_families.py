"""Chat templates by family, each with a tokenizer that has its special tokens and puts a BOS in front of plain text.

The texts in GOLDEN follow the families' documented token formats; they are what a chat of a system message "S" (where
there is such a role), a question "hi", an answer "yo" and a question "ü?" becomes.
"""

from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"

SPECIAL = {  # the first is BOS, the second EOS
    "chatml": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "chatml_thinking": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "llama2": ["<s>", "</s>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "gemma": ["<bos>", "<end_of_turn>", "<start_of_turn>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi3_early": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": ["<s>", "</s>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>",
                 "</think>"],
    "cohere": ["<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
               "<|CHATBOT_TOKEN|>"],
    "granite": ["<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
    "olmo2": ["<|endoftext|>", "<|endoftext|>"],
}  # fmt: skip
FAMILIES = tuple(SPECIAL)
WITHOUT_SYSTEM_ROLE = ("gemma", "phi3_early")

GOLDEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    "<|im_start|>user\nü?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nü?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nhi [/INST] yo </s><s>[INST] ü? [/INST]",
    "mistral": "<s>[INST] hi[/INST] yo</s>[INST] S\n\nü?[/INST]",
    "gemma": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
    "<start_of_turn>user\nü?<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n<|user|>\nü?<|end|>\n<|assistant|>\n",
    "phi3_early": "<s><|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n<|user|>\nü?<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nhi</s>\n<|assistant|>\nyo</s>\n<|user|>\nü?</s>\n<|assistant|>\n",
    "deepseek": "<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜>yo<｜end▁of▁sentence｜>"
    "<｜User｜>ü?<｜Assistant｜><think>\n",
    "cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>yo<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>ü?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "granite": "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>yo<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>ü?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "olmo2": "<|endoftext|><|system|>\nS\n<|user|>\nhi\n<|assistant|>\nyo<|endoftext|>\n<|user|>\nü?\n<|assistant|>\n",
}
GOLDEN["chatml_thinking"] = GOLDEN["chatml"]

CORPUS = (
    "You are a helpful assistant. Answer in one short sentence, please.\n\n",
    "What is the capital of the country in the north? Who was it, and where are they now?\n",
    "system user assistant model Given the following functions [INST] [/INST] <<SYS>> thoughts über größe 日本語\n\n",
)


@lru_cache
def family_tokenizer(name):
    """A small BPE tokenizer (merges cross what templates write between messages) that adds BOS to plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(SPECIAL[name]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    bos, eos = SPECIAL[name][:2]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer
