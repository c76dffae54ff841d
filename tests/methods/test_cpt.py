"""CPT: its loss, limits and training beside PEFT's and plain torch."""

from __future__ import annotations

import copy

import pytest
import torch

import inlay
from inlay import CPTConfig, UserError, get_peft_model
from tests.methods.bases import build, llama, output, randomize
from tests.methods.settings.cpt import CONTEXT

IDS = torch.arange(11, 23).reshape(2, 6)
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}


def made(**settings):
    return get_peft_model(build(llama), CPTConfig(**{**CONTEXT, **settings}))


def adapter(model):
    return model.roster.hosts[""].adapters["default"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, DECAY, DECAY | {"opt_projection_epsilon": 3.0}])
@pytest.mark.parametrize("typed", [False, True])
def test_it_trains_step_by_step_as_pefts_does(settings, typed):
    peft = pytest.importorskip("peft")
    ours = made(**settings)
    theirs = peft.get_peft_model(build(llama), peft.CPTConfig(**CONTEXT, **settings))
    types = torch.tensor([[1, 2, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4]])
    labels = torch.where(IDS == 18, -100, IDS)
    losses = []
    for model in (ours, theirs):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=3.0)
        found = []
        for _ in range(4):
            more = {"input_type_mask": types.clone()} if typed else {}
            loss = model(input_ids=IDS, labels=labels, **more).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[0], losses[1])
    own = theirs.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(adapter(ours).prompt_embeddings, own)


def test_the_loss_is_of_label_tokens_alone_and_never_lost():
    model, base = made(cpt_tokens_type_mask=[1, 2, 2, 3, 4, 5, 6, 7]).eval(), build(llama)
    labels = IDS.clone()
    got = model(IDS, labels=labels)
    context = torch.tensor(CONTEXT["cpt_token_ids"]).expand(2, -1)
    whole = torch.cat([context, IDS], 1)
    logits = base(whole).logits
    torch.testing.assert_close(got.logits, logits)
    seen = torch.cat([torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0]] * 2), torch.ones_like(IDS)], 1)
    meant = torch.where(seen.bool(), whole, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), meant.flatten())
    torch.testing.assert_close(got.loss, loss)
    assert next(iter(got.keys())) == "loss"
    model.add_adapter("b", CPTConfig(**CONTEXT))
    with pytest.raises(UserError, match="in batches of their own"):
        model(IDS, labels=IDS, adapter_names=["default", "b"])
    halves = [
        model(IDS[i : i + 1], labels=IDS[i : i + 1], num_items_in_batch=12).loss for i in (0, 1)
    ]
    torch.testing.assert_close(sum(halves), loss)


def test_no_embedding_moves_past_its_limit_and_labels_not_at_all():
    model = made(opt_projection_epsilon=0.5).eval()
    held = adapter(model)
    randomize(model, 10.0)
    moved = (held.prompt_embeddings - held.context).norm(dim=1)
    width = (32 / 2048) ** 0.5
    kinds = torch.tensor(CONTEXT["cpt_tokens_type_mask"]) % 4
    limits = torch.where(kinds == 2, 0.5, 0.1) * width * (kinds != 0)
    torch.testing.assert_close(moved, limits, rtol=1e-4, atol=1e-6)
    before = held.delta.clone()
    output(model)
    torch.testing.assert_close(held.delta, before, rtol=0, atol=0)  # used, it does not change


def test_training_goes_on_within_the_limits_of_the_first_context(tmp_path):
    model = made().eval()
    randomize(model)
    expected = output(model)
    model.save_pretrained(tmp_path)
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(back), expected)
    torch.testing.assert_close(adapter(back).context, adapter(model).context)
    assert adapter(back).delta.any()
    assert not adapter(back).context.requires_grad
    (tmp_path / "inlay_training.safetensors").unlink()
    other = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(other), expected)
    assert not adapter(other).delta.any()
    torch.testing.assert_close(output(copy.deepcopy(other)), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM alone"),
        ({"cpt_mask": [1]}, "cpt_mask has 1 entries"),
        ({"cpt_mask": [0] * 8}, "cpt_mask"),
        ({"cpt_token_ids": [64] * 8}, "vocabulary has 64"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens=3, but cpt_token_ids has 8"),
        ({"opt_projection_epsilon": -1.0}, "are from 0"),
        ({"opt_weighted_loss_type": "log"}, "opt_weighted_loss_type='log'"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        made(**settings)
