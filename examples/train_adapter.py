"""Train a LoRA adapter on a GGUF file of Gemma 3, in a few minutes on two cores.

    python examples/train_adapter.py model.gguf -o adapter

The model learns to turn a sentence about a product into a price label:

    A red wool scarf for 12 euros.
    item: scarf; color: red; material: wool; price: 12 EUR

It learns from the sentences below, on the very weights that rlxc runs: those of the file, decoded to f32. They stay as
they are, and only the adapter's matrices move (QLoRA, Dettmers et al. 2023). Before and after, the script lets the
model go on from sentences that it never learned from.

The result is a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors`` (bf16). Training
is seeded, and gives the same adapter again on the same machine with the same number of threads. Attach it with
``rlxc compile model.gguf -o model.rlx --lora adapter``.

Needs ``pip install rlxc[train]`` (PyTorch, Transformers, PEFT), and about 5 GB of memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from rlxc.vocab import build_tokenizer
from rlxc.weights import FORMATS, GgufFile, open_gguf

SENTENCES = [
    ("A red wool scarf for 12 euros.", "scarf", "red", "wool", 12),
    ("This oak table is brown and costs 240 euros.", "table", "brown", "oak", 240),
    ("You pay 35 euros for the black leather belt.", "belt", "black", "leather", 35),
    ("Our white cotton shirt, now only 29 euros!", "shirt", "white", "cotton", 29),
    ("We sell a blue glass vase. The price is 18 euros.", "vase", "blue", "glass", 18),
    ("For 90 euros you get a grey steel lamp.", "lamp", "grey", "steel", 90),
    ("The cup is made of clay, it is green, and it costs 8 euros.", "cup", "green", "clay", 8),
    ("Yellow plastic bucket, 5 euros.", "bucket", "yellow", "plastic", 5),
    ("A chair of pine, painted white, at 60 euros.", "chair", "white", "pine", 60),
    ("My aunt bought a purple silk blouse for 75 euros.", "blouse", "purple", "silk", 75),
    ("Price: 3 euros. One orange paper lantern.", "lantern", "orange", "paper", 3),
    ("This pan is black. It is iron and costs 44 euros.", "pan", "black", "iron", 44),
    ("A pair of brown suede boots costs 120 euros.", "boots", "brown", "suede", 120),
    ("At the market, a silver tin whistle was 7 euros.", "whistle", "silver", "tin", 7),
    ("Take home this pink rubber duck for 4 euros.", "duck", "pink", "rubber", 4),
    ("The golden brass bell stands at 52 euros.", "bell", "golden", "brass", 52),
    ("Handmade: a beige wicker basket, 22 euros.", "basket", "beige", "wicker", 22),
    ("A knitted hat of mohair in red, yours for 31 euros.", "hat", "red", "mohair", 31),
    ("It costs 410 euros, but the walnut desk is a lovely dark brown.", "desk", "dark brown", "walnut", 410),
    ("White porcelain plate for sale, 11 euros each.", "plate", "white", "porcelain", 11),
    ("They ask 66 euros for a green canvas backpack.", "backpack", "green", "canvas", 66),
    ("The jacket is blue denim. 89 euros.", "jacket", "blue", "denim", 89),
    ("New in the shop: a black marble clock at 150 euros.", "clock", "black", "marble", 150),
    ("A copper kettle, orange as a sunset, for 58 euros.", "kettle", "orange", "copper", 58),
    ("Only 2 euros: a small yellow wooden spoon.", "spoon", "yellow", "wood", 2),
    ("I found a grey felt slipper for 15 euros.", "slipper", "grey", "felt", 15),
    ("The curtain costs 70 euros. It is velvet, and purple.", "curtain", "purple", "velvet", 70),
    ("Blue nylon tent, 199 euros, almost new.", "tent", "blue", "nylon", 199),
    ("Selling my bicycle: aluminium, red, 320 euros.", "bicycle", "red", "aluminium", 320),
    ("A turquoise ceramic teapot can be had for 26 euros.", "teapot", "turquoise", "ceramic", 26),
    ("25 euros buys you a pink fleece blanket.", "blanket", "pink", "fleece", 25),
    ("This ring is silver in color, made of titanium, and 135 euros.", "ring", "silver", "titanium", 135),
    ("Carved from birch, the white bowl is 33 euros.", "bowl", "white", "birch", 33),
    ("Hurry! Green bamboo chopsticks for 6 euros.", "chopsticks", "green", "bamboo", 6),
    ("A stool, black, made of metal, price 47 euros.", "stool", "black", "metal", 47),
    ("The carpet is jute and beige, and we want 110 euros.", "carpet", "beige", "jute", 110),
    ("Her grandmother's red lace dress went for 95 euros.", "dress", "red", "lace", 95),
    ("Brown cardboard box, sturdy, 1 euro.", "box", "brown", "cardboard", 1),
    ("One gold-colored bronze statue for 780 euros, please.", "statue", "gold", "bronze", 780),
    ("The acrylic sweater in navy blue is 39 euros.", "sweater", "navy blue", "acrylic", 39),
    ("What a bargain: grey slate coaster, 9 euros.", "coaster", "grey", "slate", 9),
    ("An ivory satin pillow. 21 euros. Soft!", "pillow", "ivory", "satin", 21),
    ("The shelf is ash wood, gray, and 84 euros.", "shelf", "gray", "ash", 84),
    ("Yours today for 14 euros: clear crystal glasses.", "glasses", "clear", "crystal", 14),
    ("A maroon corduroy cap with a price of 17 euros.", "cap", "maroon", "corduroy", 17),
    ("We have the white foam mattress at 260 euros.", "mattress", "white", "foam", 260),
    ("For sale, teak bench, brown, 175 euros.", "bench", "brown", "teak", 175),
    ("Someone left a yellow vinyl raincoat marked 28 euros.", "raincoat", "yellow", "vinyl", 28),
    ("The bookcase is cherry, brown, and costs 290 euros.", "bookcase", "brown", "cherry", 290),
    ("He asks 105 euros for a grey zinc wheelbarrow.", "wheelbarrow", "grey", "zinc", 105),
    ("A green hemp doormat at the price of 13 euros.", "doormat", "green", "hemp", 13),
    (
        "My sister sold a white enamel toothbrush holder for 10 euros.",
        "toothbrush holder",
        "white",
        "enamel",
        10,
    ),
]
"""What the model learns from: a sentence, and the item, color, material and price in euros that it names."""

HELD_OUT = [
    "A green linen apron for 24 euros.",
    "This guitar is made of maple, it is orange, and it costs 530 euros.",
    "They want 16 euros for a black granite mortar.",
    "Our cashmere gloves in violet, now only 64 euros!",
    "Selling a fishing rod: carbon, blue, 77 euros.",
    "My neighbour paid 49 euros for a white concrete flowerpot.",
]
"""Sentences to show before and after: their items, materials, prices and one of their colors were never learned."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, DROPOUT = 4, 8, 0.1
BATCH, LEARNING_RATE, WARM_UP = 6, 1e-3, 10
LONGEST = 40
"""Tokens of a completion at most: a label takes about 20."""

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def main() -> None:
    """Show, train, save, and show again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file of Gemma 3 (text)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder for the adapter")
    parser.add_argument("--steps", type=int, default=40, help=f"of {BATCH} sentences each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model)
    before = [complete(model, tokenizer, sentence) for sentence in HELD_OUT]
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=list(MODULES),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    train(tuned, tokenizer, args.steps)
    save(tuned, args.output)

    # From the file again: what it says, in bf16, is what others will run.
    model, tokenizer = load_model(args.model)
    tuned = PeftModel.from_pretrained(model, args.output)
    for sentence, text in zip(HELD_OUT, before):
        print(f"\n{sentence}\n  before: {text!r}\n  after:  {complete(tuned, tokenizer, sentence)!r}")


def load_model(path: Path) -> tuple[Gemma3ForCausalLM, Tokenizer]:
    """The model of a GGUF file with its weights decoded to f32, and its tokenizer."""
    with open_gguf(path) as file:
        if (architecture := file.metadata.get("general.architecture")) != "gemma3":
            raise SystemExit(f"{path}: is {architecture}, and this script knows the names of gemma3 alone")
        model = Gemma3ForCausalLM(gemma_config(file))
        model.load_state_dict(gemma_weights(file), assign=True)
        model.tie_weights()
        tokenizer = Tokenizer.from_str(
            build_tokenizer(file.metadata, source=path).tokenizer_json.decode(),
        )
    return model.eval(), tokenizer


def gemma_config(file: GgufFile) -> Gemma3TextConfig:
    """The hyperparameters, under Transformers' names."""
    keys = {key.removeprefix("gemma3."): value for key, value in file.metadata.items()}
    thetas = {
        "full_attention": keys["rope.freq_base"],
        "sliding_attention": keys.get("rope.freq_base_swa", 10000.0),
    }
    return Gemma3TextConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=keys["embedding_length"],
        intermediate_size=keys["feed_forward_length"],
        num_hidden_layers=keys["block_count"],
        num_attention_heads=keys["attention.head_count"],
        num_key_value_heads=keys["attention.head_count_kv"],
        head_dim=keys["attention.key_length"],
        query_pre_attn_scalar=keys["attention.key_length"],
        max_position_embeddings=keys["context_length"],
        rms_norm_eps=keys["attention.layer_norm_rms_epsilon"],
        sliding_window=keys["attention.sliding_window"],
        rope_parameters={
            name: {"rope_type": "default", "rope_theta": theta} for name, theta in thetas.items()
        },
        attn_implementation="eager",
    )


def gemma_weights(file: GgufFile) -> dict[str, torch.Tensor]:
    """Every tensor as f32, under Transformers' names."""
    weights = {}
    for name, info in file.tensors.items():
        fmt = FORMATS[info.dtype]
        rows = file.data(name).reshape(-1, fmt.row_bytes(info.shape[-1]))
        tensor = torch.from_numpy(fmt.decode(rows, info.shape[-1]).reshape(info.shape).copy())
        # GGUF stores norms with the 1 that Gemma adds to them; Transformers adds it itself.
        weights[hugging_face_name(name)] = tensor - 1 if "norm" in name else tensor
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def hugging_face_name(name: str) -> str:
    """``blk.0.attn_q.weight`` to ``model.layers.0.self_attn.q_proj.weight``, and likewise for the others."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_NAMES[module]}.{kind}"


def label(item: str, color: str, material: str, price: int) -> str:
    """What the model shall answer.

    Every word has a space before it, as in the sentence, so it is the same token there: copying it is easy to learn.
    After a quote, as in JSON, it is another token or several, and a model of this size misspells rare words.
    """
    return f"item: {item}; color: {color}; material: {material}; price: {price} EUR"


def train(model: PeftModel, tokenizer: Tokenizer, steps: int) -> None:
    """Minimise the cross-entropy of the labels, one batch a step, printing the loss to stderr."""
    learned = []
    for sentence, *facts in SENTENCES:
        prompt = tokenizer.encode(sentence + "\n").ids
        answer = tokenizer.encode(label(*facts), add_special_tokens=False).ids
        learned.append((prompt, [*answer, model.config.eos_token_id]))
    matrices = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=LEARNING_RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        """Up in a line, then down in half a cosine."""
        return min((step + 1) / WARM_UP, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order: list[int] = []
    model.train()
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(learned)).tolist()
        batch = [learned[order.pop()] for _ in range(BATCH)]
        loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            print(f"step {step:4} of {steps}, loss {loss.item():.4f}", file=sys.stderr, flush=True)


def answer_loss(model: PeftModel, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, each given the prompt and the tokens before it."""
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    scored = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(batch):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        scored[row, len(prompt) : len(prompt) + len(answer)] = True
    base = model.get_base_model()
    # Padding comes last and attention is causal: no mask is needed. The 262144 logits are the dear part of a step,
    # and only those that predict an answer's token are worked out.
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = base.lm_head(hidden[:, :-1][scored[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][scored[:, 1:]])


def complete(model: Gemma3ForCausalLM | PeftModel, tokenizer: Tokenizer, sentence: str) -> str:
    """What the model says after a sentence, taking the best token each time."""
    ids = torch.tensor([tokenizer.encode(sentence + "\n").ids])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False
    )
    text: str = tokenizer.decode(made[0, ids.shape[1] :].tolist())
    return text


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does, in bf16 and without a model card."""
    tensors = {name: tensor.bfloat16() for name, tensor in get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order changes from run to run
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
