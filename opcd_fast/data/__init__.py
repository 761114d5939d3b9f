"""Messages, tables, prompts, chat templates, packing."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.data.batch import Batch, Sample, count_tokens, micro_batches, pack, prompt_runs, total_weight
    from opcd_fast.data.duplicates import repeats
    from opcd_fast.data.messages import SYSTEM_ROLES, Context, Message, Prompt, checked_messages, transcript
    from opcd_fast.data.prompt_order import prompts_of_step
    from opcd_fast.data.prompt_set import Selection, check_folder, hold_out, select, summary, write
    from opcd_fast.data.prompt_sources import GENERAL, Candidate, from_data, from_logs, general_prompts
    from opcd_fast.data.prompts import read_context, read_prompts
    from opcd_fast.data.rendering import (
        RenderedPrompt, adapt_to_tokenizer, common_prefix_length, default_system_tokens, render, student_ids,
        teacher_ids, whole_prompt,
    )  # fmt: skip
    from opcd_fast.data.tables import read_rows, read_text, require
    from opcd_fast.data.tasks import load_task

__getattr__, __dir__, __all__ = door(__name__)
