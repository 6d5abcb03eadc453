"""Compiles every kernel for a GPU that need not be there; prints how large each is, and whether it uses local memory.

TRITON_INTERPRET=0 python triton_compile.py COMPUTE_CAPABILITY DTYPE (all|none)
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plot_align.head import block_triton, triton_kernels

KERNELS = ("statistics", "column_sums", "potential", "gradient", "line_values", "line_gradient")
OPTIONAL = {
    "HAS_BIAS": ("bias_ptr",), "HAS_TOKENS": ("tokens_ptr",), "ENTROPY": ("entropy_ptr", "of_entropy_ptr"),
    "SUM_SQ": ("sum_sq_ptr",), "MEAN": ("mean_ptr",), "TOP1": ("top1_ptr",), "HAS_SOFTCAP": (),
    "PLOT": ("weights_ptr", "segments_ptr", "potential_ptr"),
}  # fmt: skip
TYPES = {
    "targets_ptr": "*i64", "segments_ptr": "*i64", "tokens_ptr": "*i64", "top1_ptr": "*i1", "stride": "i32",
    "vocab": "i32", "rows": "i32",
}  # fmt: skip


def source(name: str, dtype: str, flag: bool) -> ASTSource:
    """The kernel with every flag on, or every flag off and its pointers ``None``."""
    kernel = getattr(triton_kernels, name)
    names = [parameter.name for parameter in kernel.params]
    block = block_triton._BLOCK if name == "gradient" else block_triton._ROW_BLOCK
    constants = {"BLOCK": block}
    if name == "column_sums":
        constants = {
            "BLOCK": block_triton._SUM_COLUMNS, "ROWS": block_triton._SUM_ROWS, "STEP": block_triton._SUM_STEP,
        }  # fmt: skip
    for option, pointers in OPTIONAL.items():
        if option in names:
            constants |= {option: flag} | ({} if flag else {p: None for p in pointers if p in names})
    signature = {}
    for parameter in names:
        default = "*fp32" if parameter.endswith("_ptr") else "fp32"
        kind = f"*{dtype}" if parameter == "raw_ptr" else TYPES.get(parameter, default)
        signature[parameter] = "constexpr" if parameter in constants else kind
    places = {(names.index(parameter),): value for parameter, value in constants.items()}
    return ASTSource(kernel, signature, places)


if __name__ == "__main__":
    capability, dtype, flags = sys.argv[1:]
    target = GPUTarget("cuda", int(capability), 32)
    sizes = {}
    for kernel in KERNELS:
        compiled = triton.compile(source(kernel, dtype, flags == "all"), target=target, options={"num_warps": 8})
        sizes[kernel] = {"cubin": len(compiled.asm["cubin"]), "local": ".local" in compiled.asm["ptx"]}
    print(json.dumps(sizes))
