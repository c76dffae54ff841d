"""aLoRA: what comes before the invocation is the base's, also over a cache and beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.methods.lora import LoraConfig
from tests.methods.bases import build, llama, randomize

# PEFT's, of a name in transformers that will go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
INVOCATION = [5, 6]
PLAIN = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# an invocation in the middle; none; two of them
IDS = torch.tensor([[9, 5, 6, 7, 8, 9], [9, 6, 5, 7, 8, 9], [5, 6, 7, 5, 6, 9]])
FROM = [1, 6, 3]


def adapted(**settings: Any) -> Any:
    config = LoraConfig(
        alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM", **{**PLAIN, **settings}
    )
    model = inlay.get_peft_model(build(llama), config)
    randomize(model, 0.5)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **said: Any) -> torch.Tensor:
    return model(input_ids=ids, **said).logits


def as_plain_lora(model: Any) -> Any:
    plain = inlay.get_peft_model(build(llama), LoraConfig(**PLAIN))
    inlay.set_peft_model_state_dict(plain, inlay.get_peft_model_state_dict(model))
    return plain.eval()


def test_the_tokens_from_the_last_invocation_on_are_adapted_and_no_others():
    model = adapted()
    base, ours = logits(build(llama)), logits(model)
    for row, start in enumerate(FROM):
        torch.testing.assert_close(ours[row, :start], base[row, :start])
        changed = (ours[row, start:] - base[row, start:]).abs().amax(-1) > 1e-3
        assert bool(changed.all())


def test_a_row_that_begins_with_the_invocation_is_a_plain_loras():
    model = adapted()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    torch.testing.assert_close(logits(model, ids), logits(as_plain_lora(model), ids))


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_over_a_cache_goes_on_as_the_prompt_began_and_as_peft_does(beams, tmp_path):
    model = adapted()
    told = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    told |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": 63}
    cached = model.generate(input_ids=IDS, **told)
    again = model.generate(input_ids=IDS, use_cache=False, **told)
    assert torch.equal(cached.sequences, again.sequences)
    for one, other in zip(cached.logits, again.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    if beams > 1:
        return  # PEFT has no beams here
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(llama), tmp_path).eval()
    assert torch.equal(theirs.generate(input_ids=IDS, **told).sequences, cached.sequences)


def test_a_cache_may_be_filled_in_parts_but_not_behind_the_adapters_back():
    from transformers import DynamicCache

    model, cache, ids = adapted(), DynamicCache(), IDS[:2]
    whole = logits(model, ids)
    parts = [logits(model, ids[:, a:b], past_key_values=cache) for a, b in ((0, 3), (3, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    other = DynamicCache()
    with model.disable_adapter():
        logits(model, IDS[:, :3], past_key_values=other)
    with pytest.raises(inlay.UserError, match="filled in calls that aLoRA did not see"):
        logits(model, IDS[:, 3:], past_key_values=other)


def test_each_row_of_a_batch_is_adapted_as_it_would_be_alone():
    model = adapted()
    model.add_adapter("other", LoraConfig(**PLAIN, init_lora_weights=False))
    model.add_adapter("late", LoraConfig(**PLAIN, alora_invocation_tokens=[7, 8]))
    randomize(model)
    names = ["default", "other", "late", "__base__"]
    ids = IDS[:1].expand(4, -1)
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, ids[:1])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[3], logits(build(llama), ids[:1])[0], rtol=0, atol=1e-5)


def test_it_trains_the_same_where_activations_are_recomputed_and_never_as_the_base():
    grads, model = [], adapted().train()
    for told in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if told:
            known = {"context_fn": model.roster.selection.checkpoint_context}
            more = {} if told["use_reentrant"] else known
            model.activation_checkpointing_enable({**told, **more})
            model.enable_input_require_grads()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if told and told["use_reentrant"]:
            with pytest.raises(inlay.UserError, match="computes outside of a call of its model"):
                loss.backward()
            continue
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(g.abs().sum() > 0 for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "among token ids: give input_ids"),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
            "set packing: false",
        ),
    ],
)
def test_a_call_in_which_no_invocation_can_be_told_is_refused(said, says):
    with pytest.raises(inlay.UserError, match=says):
        adapted()(**said)


def test_a_batch_without_an_invocation_is_told_of_in_training():
    model = adapted().train()
    with pytest.warns(UserWarning, match=r"holds the invocation \[5, 6\]: nothing trains on it"):
        model(input_ids=IDS[1:2], labels=IDS[1:2])


def test_it_merges_into_no_weight_and_combines_with_no_other():
    model = adapted()
    with pytest.raises(inlay.UserError, match="is a ALora, which no weight can say"):
        model.merge_and_unload()
    refused = [
        ({"use_dora": True}, "use_dora and alora_invocation_tokens do not go together"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens is empty"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens=-1 must be"),
        ({"bias": "all"}, "bias='all' trains what alora_invocation_tokens leaves to the base"),
    ]
    for settings, says in refused:
        with pytest.raises(inlay.UserError, match=says):
            LoraConfig(**{"alora_invocation_tokens": [1], **settings})
