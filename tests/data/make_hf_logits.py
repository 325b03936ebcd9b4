"""Makes ``hf_logits.npz`` in this folder with Transformers and PEFT.

Run as README.md says; the tests only read the result.
"""

import sys
import tempfile
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from hf_folders import ADAPTED, TEXT, VARIANTS, write_adapter  # noqa: E402 - beside the tests that read the result


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """After each token of the text, computed in f32 throughout."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU, bitsandbytes multiplies packed weights in bf16; unpacked they are multiplied in f32.
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            model.set_submodule(name, linear)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # beside packed weights, the others stay as they are stored
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0].float().numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = {name: logits(variant.write(folder / name)) for name, variant in VARIANTS.items()}
        for name in ADAPTED:
            adapter = write_adapter(folder / f"{name}+adapter", VARIANTS[name])
            made[adapter.name] = logits(folder / name, adapter)
    np.savez_compressed(HERE / "hf_logits.npz", **made)
