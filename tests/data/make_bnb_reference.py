"""What bitsandbytes makes of a small matrix: NF4 and FP4, with plain and with nested absmax.

Run it once, with torch and bitsandbytes (0.50.2, on a CPU) and no rlxc: ``python tests/data/make_bnb_reference.py``.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

SHAPE = (100, 192)
"""300 blocks: two blocks of nested absmax, the second not full."""


def main() -> None:
    """Write ``bnb_reference.npz`` next to this file."""
    rng = np.random.default_rng(4)
    # Rows of different sizes, so that scales differ; a block of zeros; f16, to take less space.
    weight = (
        (rng.standard_normal(SHAPE) * rng.uniform(0.01, 0.1, (SHAPE[0], 1)))
        .astype(np.float16)
        .astype(np.float32)
    )
    weight[3, 64:128] = 0
    arrays = {"weight": weight.astype(np.float16)}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(
                torch.from_numpy(weight), blocksize=64, quant_type=kind, compress_statistics=nested
            )
            name = f"{kind}_nested" if nested else kind
            arrays[f"{name}_packed"] = packed.numpy().reshape(-1, 32)
            arrays[f"{name}_absmax"] = state.absmax.numpy()
            if nested:
                arrays[f"{name}_decoded"] = bnb.dequantize_4bit(packed, state).numpy()
                arrays[f"{name}_scales"] = state.state2.absmax.numpy()
                arrays[f"{name}_map"] = state.state2.code.numpy()
                arrays[f"{name}_offset"] = state.offset.numpy()
        arrays[f"{kind}_codebook"] = state.code.numpy()
    np.savez_compressed(Path(__file__).with_name("bnb_reference.npz"), **arrays)


if __name__ == "__main__":
    main()
