"""What any program needs: seeds, whole files, timing, intervals, ranks, CUDA graphs, derivatives, precision, doors."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.runtime.derivatives import first_order
    from opcd_fast.runtime.files import (
        check_replaceable, clear_unfinished, read_object, remove_folder, write_file, write_folder, write_text,
    )  # fmt: skip
    from opcd_fast.runtime.graphs import CapturedSteps, KeptSteps, release_steps
    from opcd_fast.runtime.ids import token_ids
    from opcd_fast.runtime.intervals import bootstrap, difference, mean_and_error, wilson
    from opcd_fast.runtime.launch import launched, launched_rank, local_rank
    from opcd_fast.runtime.precision import full_precision
    from opcd_fast.runtime.redaction import HIDDEN, printable, redacted
    from opcd_fast.runtime.seeds import digest, seeded, stream_seed
    from opcd_fast.runtime.shapes import is_name, misfit
    from opcd_fast.runtime.timing import Stopwatch

__getattr__, __dir__, __all__ = door(__name__)
