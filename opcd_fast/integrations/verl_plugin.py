"""What verl loads from the entry point group `verl.plugins`, in every process that imports it.

verl calls nothing in a plugin, so importing this module acts; it does so only where OPCD_VERL_CONTEXT names a context
(text, or a file as for `opcd train --context`). OPCD_VERL_DIVERGENCE is reverse_kl (the default) or gated_kl. verl
hides what a plugin raises; here it is logged as an error first.
"""

from __future__ import annotations

import logging
import os

_context = os.environ.get("OPCD_VERL_CONTEXT", "")
if _context:
    try:
        from opcd_fast.integrations.verl import register, teach_with_context

        register()
        teach_with_context(_context, which=os.environ.get("OPCD_VERL_DIVERGENCE", "reverse_kl"))
    except Exception:
        logging.getLogger("opcd_fast").exception("the verl plugin did not load (OPCD_VERL_CONTEXT is set)")
        raise
