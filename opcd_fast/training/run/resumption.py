"""What a continued run must share with its beginning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opcd_fast.training.settings import OPCDConfig, settings_with


def identity(config: OPCDConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not free, and `facts` about data and weights, as JSON values."""
    settings = {name: getattr(config, name) for name in settings_with(belongs="result")}
    return json.loads(json.dumps({**settings, **facts}))


def completed(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint, with the settings that its version had not yet: their defaults are what it did."""
    return {**identity(OPCDConfig(), {}), **kept}
