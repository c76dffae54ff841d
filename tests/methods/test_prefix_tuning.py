"""Prefix tuning: caches, masks, positions, generation, rows of their own and training."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import inlay
from inlay import LoraConfig, PrefixTuningConfig, UserError, get_peft_model
from tests.methods.bases import SMALL, bert, build, gpt2, llama, output, randomize, t5, vit

IDS = torch.arange(3, 13).reshape(2, 5)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(make, count=3, **settings):
    torch.manual_seed(0)
    config = PrefixTuningConfig(num_virtual_tokens=count, **settings)
    return get_peft_model(build(make), config).eval()


def adapter(model, name="default"):
    return model.roster.hosts[""].adapters[name]


@pytest.mark.parametrize(("make", "heads"), [(llama, 2), (gpt2, 4)])
def test_a_file_holds_the_keys_and_values_of_a_cache(make, heads):
    model, base = made(make), build(make)
    parts = adapter(model).prompt_embeddings.view(3, 4, heads, -1).transpose(0, 2)
    cache = DynamicCache()
    for layer in range(2):
        both = [parts[:, 2 * layer + i].expand(2, -1, -1, -1) for i in (0, 1)]
        cache.update(*both, layer)
    meant = base(IDS, past_key_values=cache)
    got = model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    torch.testing.assert_close(got.logits, meant.logits)
    scores = meant.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, IDS[:, 1:].flatten())
    torch.testing.assert_close(got.loss, loss)
    places = torch.arange(5).expand(2, -1)
    torch.testing.assert_close(model(IDS, position_ids=places).logits, meant.logits)
    with pytest.raises(UserError, match="packing: false"):
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1))


def test_a_cache_of_fixed_size_is_refused():
    mask = torch.ones_like(IDS)
    with pytest.raises(UserError, match="leave cache_implementation out"):
        made(llama).generate(IDS, attention_mask=mask, cache_implementation="static", **GREEDY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_it_generates_what_peft_does(make, tmp_path):
    peft = pytest.importorskip("peft")
    task = "SEQ_2_SEQ_LM" if make is t5 else "CAUSAL_LM"
    model = made(make, task_type=task)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(make), tmp_path).eval()
    mask = torch.ones_like(IDS)
    start = {"decoder_start_token_id": 0} if make is t5 else {}
    for beams in (1, 2):
        given = {**start, **GREEDY, "num_beams": beams}
        got = model.generate(input_ids=IDS, attention_mask=mask, **given)
        meant = theirs.generate(input_ids=IDS, attention_mask=mask, **given)
        assert got.tolist() == meant.tolist()


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_rows_of_other_lengths_methods_and_the_base_compute_what_they_do_alone(make):
    model = made(make)
    model.add_adapter("longer", PrefixTuningConfig(num_virtual_tokens=5))
    model.add_adapter("lora", LoraConfig(r=2))
    model.set_adapter("lora")
    randomize(model)
    model.double().eval()
    ids = torch.arange(3, 23).reshape(4, 5)
    mask = torch.ones_like(ids)
    if make in (llama, gpt2):
        mask[1, :2] = 0
    names = ["longer", "__base__", "default", "lora"]
    more = {"decoder_input_ids": ids.flip(1)} if make is t5 else {}
    given = {"input_ids": ids, "attention_mask": mask, **more}
    mixed = model(**given, adapter_names=names).logits
    unmasked = model(input_ids=ids, **more, adapter_names=names).logits
    for row, name in enumerate(names):
        with model.routed([name] * 4):
            seen = slice(2, None) if row == 1 and make in (llama, gpt2) else slice(None)
            alone = model.base_model.model(**given).logits[row]
            torch.testing.assert_close(mixed[row][seen], alone[seen])
            torch.testing.assert_close(
                unmasked[row], model.base_model.model(input_ids=ids, **more).logits[row]
            )
    if make is bert:
        return
    start = {"decoder_start_token_id": 0} if make is t5 else {}
    given = {"num_beams": 2, **start, **GREEDY}
    told = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **given)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        alone = model.generate(**one, adapter_names=[name], **given)
        assert told[row].tolist() == alone[0].tolist(), name


def test_it_stands_beside_prompts_and_lora_in_one_stack():
    model = made(llama)
    plain = model(IDS).logits
    model.add_adapter("prompt", inlay.PromptTuningConfig(num_virtual_tokens=2))
    model.add_adapter("lora", LoraConfig(r=2))
    for names in (["default", "prompt", "lora"], ["lora", "prompt", "default"]):
        model.set_adapter(names)
        model.eval()
        got = model(IDS, attention_mask=torch.ones_like(IDS)).logits
        assert got.shape[1] == 7
        assert not torch.allclose(got[:, 2:], plain)
        told = model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        again = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GREEDY)
        assert told.tolist() == again.tolist()


def test_a_network_goes_on_training_where_it_stopped_and_a_table_where_there_is_none(tmp_path):
    model = made(llama, prefix_projection=True, encoder_hidden_size=5)
    expected, trained = output(model), model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path)
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    assert back.get_nb_trainable_parameters()[0] == trained
    torch.testing.assert_close(output(back.eval()), expected)
    used = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    assert adapter(used).encoder is None
    assert not any(p.requires_grad for p in used.parameters())
    torch.testing.assert_close(output(used), expected)

    from safetensors.torch import load_file, save_file

    own = tmp_path / "inlay_training.safetensors"
    save_file({k: t + 1 for k, t in load_file(own).items()}, own)
    with pytest.raises(UserError, match="does not belong to the adapter beside it"):
        inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    own.unlink()
    table = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    assert table.get_nb_trainable_parameters()[0] == 3 * 2 * 2 * 16
    torch.testing.assert_close(output(table.eval()), expected)


def test_it_starts_from_zeros_and_stands_where_heads_are_not_the_width_of_the_model():
    for settings in ({}, {"prefix_projection": True}):
        model = made(llama, init_weights="zero", **settings)
        assert not adapter(model).prompt_embeddings.any()

    def narrow():
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "vocab_size": 64}
        return T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, **sizes))

    model = made(narrow)
    config = model.peft_config["default"]
    assert (config.token_dim, config.num_layers) == (24, 3)
    assert output(model).isfinite().all()


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "first_k_dense_replace": 2}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **ranks, **experts))


def hybrid():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    layers = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2}
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8}
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(**SMALL, **layers, **sizes, num_key_value_heads=2, num_experts_per_tok=1)
    )


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (llama, {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        (llama, {"target_modules": ["q_proj"]}, "at no layer"),
        (llama, {"token_dim": 5}, "token_dim=5 is not the model's, 16"),
        (llama, {"num_layers": 3}, "num_layers=3 is not the model's, 2"),
        (llama, {"num_transformer_submodules": 2}, "num_transformer_submodules=2 is not"),
        (llama, {"init_weights": "ones"}, "init_weights='ones'"),
        (distilbert, {}, "DistilBertForSequenceClassification reads no past|DistilBertModel reads"),
        (mamba, {}, "reads no past keys and values"),
        (vit, {}, "reads no past keys and values"),
        (deepseek, {}, "has keys and values of different widths"),
        (hybrid, {}, "has layers without keys and values"),
    ],
)
def test_what_cannot_be_is_refused(make, settings, said):
    with pytest.raises(UserError, match=said):
        get_peft_model(build(make), PrefixTuningConfig(**settings))


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_is_refused_in_training_alone():
    model = made(llama)
    model.gradient_checkpointing_enable()
    expected = model(IDS).logits
    model.train()
    with pytest.raises(UserError, match="gradient_checkpointing: false"):
        model(IDS)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(model(IDS).logits, expected)


def test_deleting_it_leaves_the_model_as_it_was():
    base = build(llama)
    plain, names = output(base), list(base.state_dict())
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2))
    with model.disable_adapter():
        torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    assert list(base.state_dict()) == names


def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    )


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_with_a_head_is_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = made(classifier, task_type="SEQ_CLS")
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(classifier), tmp_path).eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    torch.testing.assert_close(model(**given).logits, theirs(**given).logits)


def test_the_trainer_trains_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the mail goes to billing"}\n' * 8)
    run = inlay.train(
        {
            "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4},
            "data": {"path": str(rows)},
            "objective": "pretrain",
            "train": {"max_steps": 4, "learning_rate": 0.05, "micro_batch_size": 4},
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert run is not None
    found = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert found.peft_config["default"].num_virtual_tokens == 4


def test_each_layer_of_a_decoder_reads_keys_and_values_of_its_own_where_it_is_told_so():
    model, base = made(t5, num_transformer_submodules=1), build(t5)
    parts = adapter(model).prompt_embeddings.view(3, 4, 4, -1).transpose(0, 2)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(parts[:, 2 * layer + i].expand(2, -1, -1, -1) for i in (0, 1)), layer)
    both = EncoderDecoderCache(cache, DynamicCache())
    meant = base(input_ids=IDS, decoder_input_ids=IDS, past_key_values=both).logits
    torch.testing.assert_close(model(input_ids=IDS, decoder_input_ids=IDS).logits, meant)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    return BartForConditionalGeneration(
        BartConfig(encoder_layers=2, decoder_layers=3, **heads, **sizes)
    )


def falcon():
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
    return FalconForCausalLM(FalconConfig(**sizes, multi_query=True))


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=6)
    )


@pytest.mark.parametrize(
    ("make", "heads", "width", "layers"),
    [(bart, 2, 32, 3), (falcon, 1, 8, 2), (gemma3, 2, 16, 2)],
)
def test_it_knows_the_heads_of_the_part_that_reads_the_cache(make, heads, width, layers):
    model = made(make)
    config = model.peft_config["default"]
    assert (config.num_attention_heads, config.token_dim, config.num_layers) == (
        heads,
        width,
        layers,
    )
    start = {"decoder_start_token_id": 2} if make is bart else {}
    given = {"attention_mask": torch.ones_like(IDS), **start, **GREEDY}
    told = model.generate(input_ids=IDS, **given)
    assert told.tolist() == model.generate(input_ids=IDS, use_cache=False, **given).tolist()
    if make is bart:
        with pytest.raises(UserError, match="takes no position_ids"):
            model(input_ids=IDS, decoder_input_ids=IDS, adapter_names=["default", "__base__"])
