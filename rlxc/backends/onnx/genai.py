"""What onnxruntime-genai needs beside the model, so that it loads the artifact's folder as it is.

Source: the ``genai_config.json`` that onnxruntime-genai 0.18 reads.
"""

from __future__ import annotations

import json

from rlxc.artifact import Manifest

_TYPE = "decoder"
"""onnxruntime-genai's type of any model that maps ids and caches to logits.

Types named after architectures do no more, or too much: ``phi3`` computes a sequence anew when it passes 4096 tokens,
for models that have two sets of rope factors.
"""


def companion_files(manifest: Manifest) -> dict[str, bytes]:
    """``genai_config.json``, and the ``tokenizer_config.json`` that it looks for beside ``tokenizer.json``."""
    layers = manifest.kv_cache.layers
    rings = [layer for layer in layers if layer.layout == "ring"]
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "head_size": layers[0].head_dim,
        "num_key_value_heads": layers[0].heads,
        "num_hidden_layers": len(layers),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    if rings:
        # The op slides by itself; this only sizes the buffers.
        decoder["sliding_window"] = {
            "window_size": rings[0].capacity,
            "layers": [layer.index for layer in rings],
            "slide_key_value_cache": False,
            "slide_inputs": False,
        }
    tokens = manifest.tokenizer
    eos = list(tokens.eos_ids)
    config = {
        "model": {
            "type": _TYPE,
            "bos_token_id": eos[0] if tokens.bos_id is None else tokens.bos_id,
            "eos_token_id": eos,
            "pad_token_id": eos[0],
            "vocab_size": manifest.model.vocab_size,
            "context_length": manifest.kv_cache.context,
            "decoder": decoder,
        },
        "search": {
            "max_length": manifest.kv_cache.context,
            "past_present_share_buffer": True,
            "do_sample": False,
        },
    }
    return {
        "genai_config.json": (json.dumps(config, indent=1) + "\n").encode(),
        "tokenizer_config.json": b"{}\n",
    }
