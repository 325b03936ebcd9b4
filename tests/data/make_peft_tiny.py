"""Makes ``peft_tiny/`` in this folder: a tiny Llama, adapters that PEFT saved, and the logits that PEFT gets with them.

``base/`` is a random model in f32, ``nf4/`` and ``fp4/`` are the same one as Transformers saves it after quantising it
with bitsandbytes (``nf4`` with double quantisation). The other folders are adapters for it. Run as README.md says; the
tests only read the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "peft_tiny"
TEXT = [1, *np.random.RandomState(0).randint(3, 128, 23).tolist()]

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        # A name, an end of a name, and a regular expression, in one layer and in all.
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "down_proj": 6, r"layers\.1\..*\.v_proj": 3},
        "alpha_pattern": {"k_proj": 2, "model.layers.1.mlp.up_proj": 12, r"layers\.1\..*\.v_proj": 5},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True},
    # PEFT stores the embedding's own weights beside its adapter.
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "saved": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
}


def main() -> None:
    """Write every folder and ``logits.npz``."""
    torch.set_num_threads(1)
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(0)
    write(random_base(), HERE / "base")
    made = {"base": logits(read("base"))}
    for seed, (name, settings) in enumerate(ADAPTERS.items(), start=1):
        torch.manual_seed(seed)
        tuned = get_peft_model(read("base"), LoraConfig(task_type="CAUSAL_LM", **settings))
        randomise(tuned)
        write(tuned, HERE / name)
        # What the files say, not what they were made from.
        tuned = PeftModel.from_pretrained(read("base"), HERE / name)
        made[name] = logits(tuned)
        if name in ("plain", "rslora"):
            made[f"{name}-half"] = logits(scaled(tuned, 0.5))
    for kind in ("nf4", "fp4"):
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=kind == "nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
        write(read("base", quantization_config=quantised, device_map="cpu"), HERE / kind)
        made[kind] = logits(unpacked(read(kind)))
        made[f"{kind}-plain"] = logits(PeftModel.from_pretrained(unpacked(read(kind)), HERE / "plain"))
    np.savez_compressed(HERE / "logits.npz", ids=np.array(TEXT, np.int32), **made)


def random_base() -> LlamaForCausalLM:
    """A model whose activations stay near 1, with norms that differ from 1."""
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 1 + 0.2 * noise
    return model


def randomise(model: PeftModel) -> None:
    """Values that change the logits: PEFT starts with b = 0, DoRA's own magnitudes, and a copy of saved modules."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 0.8 + 0.4 * torch.rand_like(parameter)
        elif "lora_B" in name or "lora_embedding_B" in name:
            # Not more than the weights that they are added to: rounding errors stay small.
            parameter.data = 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
        elif parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5


def scaled(model: PeftModel, scale: float) -> PeftModel:
    """The model with its adapter's whole effect times ``scale``."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
    return model


def unpacked(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with its 4-bit weights as f32: on a CPU, bitsandbytes multiplies packed ones in bf16."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            model.set_submodule(name, linear)
    # PEFT must not take the plain layers for packed ones.
    del model.config.quantization_config, model.hf_quantizer
    model.is_loaded_in_4bit = model.is_quantized = False
    return model.float()


def read(folder: str, **settings: Any) -> LlamaForCausalLM:
    """A model of ``peft_tiny``."""
    return AutoModelForCausalLM.from_pretrained(
        HERE / folder, dtype=torch.float32, attn_implementation="eager", **settings
    )


def write(model: LlamaForCausalLM | PeftModel, folder: Path) -> None:
    """Save what Transformers or PEFT saves, without model cards and without traces of this machine."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    if config.exists():
        settings = json.loads(config.read_text())
        settings["base_model_name_or_path"] = "base"
        settings["target_modules"].sort()  # a set: its order changes from run to run
        config.write_text(json.dumps(settings, indent=2) + "\n")
    else:
        tokenizer().save(str(folder / "tokenizer.json"))


def tokenizer() -> Tokenizer:
    """Two special tokens and 125 of the 256 bytes; id 0 is never made from text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda text: (text not in "ĠĊ", text))
    vocab = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *alphabet[:125]])}
    made = Tokenizer(models.BPE(vocab, []))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def logits(model: Callable[..., Any]) -> np.ndarray:
    """After each token of the text, computed in f32 throughout: ``f32 [tokens, vocab]``."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([TEXT])).logits[0].numpy()


if __name__ == "__main__":
    main()
