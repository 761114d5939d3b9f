"""How to export; also the options of `opcd export`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `export` writes, and how."""

    merged: bool = False
    """One model with the adapter folded into its weights, instead of the adapter."""
    dtype: str = "auto"
    """"auto" | "float32" | "bfloat16" | "float16"; auto: an adapter in float32, a model as it, or its base, is."""
    model: str | None = None
    """Where the base of the adapter is now; default: where the run found it."""
    base_name: str | None = None
    """Name of the base that an exported adapter carries, such as a hub id; default: the whole path of its folder."""
    dequantize: bool = False
    """Merge into a base of 4 bits, unpacked: needed for adapters that were trained on one."""
    max_shard_size: str = "5GB"
    """Largest file of a model's weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Without it such a model is refused."""
    device: str = "cpu"
    """Where to compute: "cpu" | "cuda" | "cuda:N". Needs room for the model in float32."""
