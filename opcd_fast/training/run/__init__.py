"""A run's folder: checkpoints, records, where it came from."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.run import best
    from opcd_fast.training.run.checkpoints import Saved, list_checkpoints
    from opcd_fast.training.run.continual import start_from
    from opcd_fast.training.run.curves import as_started, curve, run_settings
    from opcd_fast.training.run.folder import ANSWERS, RunFolder, identity
    from opcd_fast.training.run.provenance import (
        FileHashes, Files, differing, hash_of, template_hash, template_in, tokenizer_files, weight_files,
    )  # fmt: skip
    from opcd_fast.training.run.record import (
        FILES_SHAPE, HASHES_SHAPE, PROMPTS, RECORD, Origins, held_out_count, kept_held_out, question_hash,
        read_record, row_of, write_record,
    )  # fmt: skip

__getattr__, __dir__, __all__ = door(__name__)
