"""Make the embedded base `inlay-tiny`: a tokenizer and a small Llama, trained here, on a CPU.

    python tools/make_tiny.py [--out inlay/assets/inlay-tiny] [--steps 1500] [--threads 2]

The text is the documentation of the Python that runs this (tiny_text.py), the chats are generated
(tiny_tasks.py); nothing is downloaded. A step adds two losses: the mean over the tokens of a batch
of chats, those outside the answers counted a tenth, and the mean over those of a batch of text.
Seeded: the same Python, torch and thread count give the same model, others one much like it.
Weights are rounded to bfloat16 values and stored as float32, so that a base loaded in either is the
same base.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_card import write_card
from tiny_tasks import chat
from tiny_text import common_words, documents
from tiny_words import Words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
VOCABULARY = 2560
LONGEST = 256
CHAT_TOKENS, TEXT_TOKENS = 2560, 1536  # of one step
REQUEST_WEIGHT = 0.1

Row = tuple[list[int], list[float]]
"""Token ids, and the weight of each as a target."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text, held_out = documents()
    words = Words(common_words(text))
    tokenizer = make_tokenizer(text, words, options.seed)
    model = make_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(text)} documents, {sum(map(len, text))} characters; {size} parameters", flush=True)

    started = time.monotonic()
    train(model, tokenizer, text, words, options)
    minutes = (time.monotonic() - started) / 60

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    figures = {
        "text_loss": text_loss(model, tokenizer, held_out),
        "chat_loss": chat_loss(model, tokenizer, words, options.seed + 1),
        "minutes": minutes,
        "parameters": size,
        "documents": len(text),
        "characters": sum(map(len, text)),
        "held_out": len(held_out),
    }
    print({name: round(figure, 3) for name, figure in figures.items()}, flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    # written for the owner alone, but it is to be installed for all
    (options.out / "model.safetensors").chmod(0o644)
    write_card(options.out, figures, options.steps, options.seed)


def make_tokenizer(text: list[str], words: Words, seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `text` and chats; each digit is a token, so numbers copy well."""
    rng = random.Random(seed)
    chats = (m[key] for _ in range(15_000) for m in chat(rng, words) for key in ("role", "content"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for parts in (text, chats) for part in parts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[:2],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2 * LONGEST,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: 5 layers of width 192, tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def train(model, tokenizer, text: list[str], words: Words, options: argparse.Namespace) -> None:
    """Train for `options.steps` steps: Muon on the layers' matrices, AdamW on the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=options.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, options.steps))
        for o in optimizers
    ]
    chats = chat_batches(tokenizer, words, random.Random(options.seed))
    texts = text_batches(tokenizer, text, random.Random(options.seed))
    started, smooth = time.monotonic(), [0.0, 0.0]
    for step in range(1, options.steps + 1):
        for i, batch in enumerate((next(chats), next(texts))):
            loss = weighted_loss(model, batch)
            loss.backward()
            smooth[i] += (loss.item() - smooth[i]) / min(step, 50)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for moved in (*optimizers, *schedules):
            moved.step()
        model.zero_grad()
        if step % 50 == 0 or step == options.steps:
            seconds = time.monotonic() - started
            print(
                f"step {step}  chat {smooth[0]:.3f}  text {smooth[1]:.3f}  {seconds:.0f} s",
                flush=True,
            )
        if options.save_every and step % options.save_every == 0:
            model.save_pretrained(options.out)
            tokenizer.save_pretrained(options.out)


def _rate(step: int, steps: int, warmup: int = 60) -> float:
    """Linear warmup, then a cosine down to 1%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def weighted_loss(model: LlamaForCausalLM, rows: list[Row]) -> torch.Tensor:
    """Return the mean next-token loss of `rows`, each target counted by its weight."""
    longest = max(len(ids) for ids, _ in rows)
    # Padding stands on the right, where causal attention cannot see it.
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def chat_batches(tokenizer, words: Words, rng: random.Random) -> Iterator[list[Row]]:
    """Yield batches of fresh chats of about the same length, without end."""
    while True:
        rows = [chat_row(tokenizer, chat(rng, words)) for _ in range(1500)]
        rows = sorted((row for row in rows if len(row[0]) <= LONGEST), key=lambda row: len(row[0]))
        batches: list[list[Row]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * len(row[0]) > CHAT_TOKENS:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def chat_row(tokenizer, messages: list[dict[str, str]], request_weight=REQUEST_WEIGHT) -> Row:
    """Return the rendered chat; answers, with the token that ends them, count 1."""
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assistant = tokenizer.convert_tokens_to_ids("assistant")
    weights, answering = [], False
    for i, token in enumerate(ids):
        # An answer begins after its three tokens of header: start, role, new line.
        answering = answering or (i > 2 and ids[i - 3] == start and ids[i - 2] == assistant)
        weights.append(1.0 if answering else request_weight)
        answering = answering and token != end
    return ids, weights


def text_batches(tokenizer, text: list[str], rng: random.Random) -> Iterator[list[Row]]:
    """Yield batches of pieces of the documents, all of one length, without end."""
    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(text)]
    while True:
        rng.shuffle(encoded)
        stream = [token for ids in encoded for token in (0, *ids)]
        length = rng.choice((LONGEST // 2, LONGEST))
        pieces = [stream[i : i + length] for i in range(0, len(stream) - length, length)]
        rng.shuffle(pieces)
        rows = TEXT_TOKENS // length
        for i in range(0, len(pieces) - rows, rows):
            yield [(ids, [1.0] * length) for ids in pieces[i : i + rows]]


@torch.no_grad()
def text_loss(model, tokenizer, held_out: list[str]) -> float:
    """Return the mean loss a token (nats) over the first LONGEST tokens of each document."""
    encoded = [[0, *e.ids][:LONGEST] for e in tokenizer.backend_tokenizer.encode_batch(held_out)]
    total = sum(weighted_loss(model, [(i, [1.0] * len(i))]).item() * (len(i) - 1) for i in encoded)
    return total / sum(len(ids) - 1 for ids in encoded)


@torch.no_grad()
def chat_loss(model, tokenizer, words: Words, seed: int) -> float:
    """Return the mean loss a token (nats) over the answers of 500 fresh chats."""
    rng = random.Random(seed)
    rows = [chat_row(tokenizer, chat(rng, words), request_weight=0.0) for _ in range(500)]
    counts = [sum(weights[1:]) for _, weights in rows]
    losses = [weighted_loss(model, [row]).item() for row in rows]
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "inlay" / "assets" / "inlay-tiny"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="also save every so many steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
