"""Compile the merge of attention for chips that are not here and print what came out, one JSON object per line.

Run by test_compile_merge.py in a process without TRITON_INTERPRET. Arguments: compute capabilities; with `--all`, every
variant and head size, otherwise what a teacher's call uses.
"""

import itertools
import json
import re
import sys
import tempfile

import triton
from compile_kernels import tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_fast.kernels.triton import attention as merge

PLAIN = {"HAS_B": True, "HAS_SINK": False, "HAS_FLAG_A": False, "HAS_FLAG_B": False, "WRITE_LSE": False}
VARIANTS = {
    "plain": PLAIN,
    "sink": {**PLAIN, "HAS_SINK": True},
    "sink_alone": {**PLAIN, "HAS_SINK": True, "HAS_B": False},
    "everything": dict.fromkeys(PLAIN, True),
}
TYPES = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16", "has_a_ptr": "*i8", "has_b_ptr": "*i8"}
# Of outputs as kernels make them: whole heads of a multiple of 16 elements. Logsumexps may lie any way.
ALIGNED = ("stride_a_n", "stride_a_h", "stride_b_n", "stride_b_h", "stride_out_n", "stride_out_h")


def source(constants: dict) -> ASTSource:
    function = merge._merge_attention_kernel
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else TYPES.get(name, default)
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def report(capability: int, variant: str, width: int) -> dict:
    pairs, block, warps = merge.launch_shape(width)
    constants = {"HEADS": 32, "WIDTH": width, "PAIRS": pairs, "BLOCK": block, **VARIANTS[variant]}
    compiled = triton.compile(
        source(constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "capability": capability, "variant": variant, "width": width, "warps": warps, **numbers,
        "sass": bool(sass), "sets": 2 if constants["HAS_B"] else 1,
        "elements": pairs * block // (32 * warps),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.(?:128|256)", sass)),
        "wide_stores": len(re.findall(r"STG\.E\S*\.(?:128|256)", sass)),
        "narrow_stores": len(re.findall(r"STG\.E\b(?!\S*\.(?:128|256))", sass)),
        "half_loads": len(re.findall(r"LDG\.E\S*\.U16", sass)),
        "ptx_half_loads": len(re.findall(r"ld\.global\S*\.b16", ptx)),
    }  # fmt: skip


if __name__ == "__main__":
    everything = "--all" in sys.argv
    for capability in (int(argument) for argument in sys.argv[1:] if argument != "--all"):
        chosen = itertools.product(VARIANTS, (64, 80, 128, 256)) if everything else (("plain", 128), ("everything", 64))
        for variant, width in chosen:
            print(json.dumps(report(capability, variant, width)), flush=True)
