"""Twenty steps of a run beside PEFT in a plain torch loop: same start, same rows, float32."""

from __future__ import annotations

import math

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.objectives.sft import Sft
from inlay.train.events import Events, read_events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig

peft = pytest.importorskip("peft")

STEPS, RATE, DECAY = 20, 2e-3, 0.01
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def rows(count=8):
    generator = torch.Generator().manual_seed(11)
    made = []
    for i in range(count):
        length = int(torch.randint(4, 14, (), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length - 1, (), generator=generator))
        labels = [-100] * masked + ids[masked:]
        where = Source("golden.jsonl", i + 1)
        made.append(Example(input_ids=ids, labels=labels, row_id=f"{i}", source=where))
    return made


def plain_loop(model, made):
    """Return the losses of 20 steps over all rows: transformers' own loss, AdamW, cosine."""
    width = max(len(row.input_ids) for row in made)
    ids = torch.tensor([r.input_ids + [2] * (width - len(r.input_ids)) for r in made])
    labels = torch.tensor([r.labels + [-100] * (width - len(r.labels)) for r in made])
    mask = torch.tensor([[1] * len(r.labels) + [0] * (width - len(r.labels)) for r in made])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    model.train()
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize(("size", "times"), [(8, 1), (2, 4), (1, 8)])
def test_losses_and_weights_are_those_of_peft_in_a_plain_loop(
    tiny_llama, tiny_tokenizer, tmp_path, size, times, packing, fast
):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**LORA))
    ours = inlay.get_peft_model(tiny_llama(), inlay.LoraConfig(**LORA))
    start = {n: t.clone() for n, t in peft.get_peft_model_state_dict(theirs).items()}
    inlay.set_peft_model_state_dict(ours, start)
    made = rows()
    expected = plain_loop(theirs, made)

    config = TrainConfig(
        max_steps=STEPS,
        micro_batch_size=size,
        gradient_accumulation_steps=times,
        learning_rate=RATE,
        weight_decay=DECAY,
        warmup_steps=0,
        precision="float32",
        fast=fast,
    )
    events = Events(tmp_path)
    objective = Sft(packing=packing, fast=fast)
    fit(ours, tiny_tokenizer, objective, made, [], config, tmp_path, events)
    found = [e["loss"] for e in read_events(events.path) if e["event"] == "step"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.01, "nothing was learned, so nothing was compared"
    weights = inlay.get_peft_model_state_dict(ours)
    torch.testing.assert_close(
        dict(weights), peft.get_peft_model_state_dict(theirs), rtol=0, atol=1e-5
    )
