"""P-tuning: its networks beside plain torch, and training that stops and goes on."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, relu

import inlay
from inlay import PromptEncoderConfig, UserError, get_peft_model, set_peft_model_state_dict
from tests.methods.bases import build, llama, output, vit

IDS = torch.arange(3, 13).reshape(2, 5)
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6}


def made(**settings):
    torch.manual_seed(0)
    config = PromptEncoderConfig(num_virtual_tokens=3, **settings)
    return get_peft_model(build(llama), config).eval()


def adapter(model):
    return model.roster.hosts[""].adapters["default"]


def test_an_mlp_computes_the_tokens_before_the_embeddings():
    model = made(encoder_hidden_size=7)
    own = dict(adapter(model).named_parameters())
    h = own["encoder.inputs"]
    for layer in (0, 2, 4):
        h = linear(h, own[f"encoder.layers.{layer}.weight"], own[f"encoder.layers.{layer}.bias"])
        h = relu(h) if layer < 4 else h
    joined = torch.cat([h.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
    got = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, build(llama)(inputs_embeds=joined).logits)


def test_an_lstm_reads_the_tokens_both_ways_and_drops_out_in_training_alone():
    model = made(**LSTM, encoder_dropout=0.5)
    before = output(model)
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)
    held = adapter(model).encoder.inputs
    first = adapter(model).prompt_embeddings[0].clone()
    with torch.no_grad():
        held[-1] += 1
    assert not torch.allclose(adapter(model).prompt_embeddings[0], first)
    model.train()
    assert not torch.allclose(output(model), output(model))


@pytest.mark.parametrize("settings", [{"encoder_hidden_size": 7}, LSTM])
def test_the_network_goes_on_where_it_stopped_and_a_file_alone_trains_as_a_table(
    settings, tmp_path
):
    model = made(**settings)
    expected, trained = output(model), model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path)
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    assert back.get_nb_trainable_parameters()[0] == trained
    torch.testing.assert_close(output(back.eval()), expected)
    (tmp_path / "inlay_training.safetensors").unlink()
    table = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    assert table.get_nb_trainable_parameters()[0] == 3 * 32
    torch.testing.assert_close(output(table.eval()), expected)
    model(IDS, labels=IDS).loss.backward()
    table(IDS, labels=IDS).loss.backward()
    assert adapter(table).table.grad.any()
    assert all(p.grad is not None for p in adapter(model).parameters())


def test_a_state_dict_of_peft_is_set_as_what_it_is():
    model = made(encoder_hidden_size=7)
    wanted = torch.randn(3, 32)
    set_peft_model_state_dict(model, {"prompt_embeddings": wanted})
    torch.testing.assert_close(adapter(model).virtual(), wanted)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.virtual_tokens.adapters.default.table"
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type='GRU'"),
        ({"encoder_num_layers": 3}, "are the LSTM's"),
        ({"encoder_dropout": 0.1}, "are the LSTM's"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size=0"),
        ({"token_dim": 5}, "width of the model's embeddings"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        made(**settings)


def test_a_model_without_tokens_is_refused():
    with pytest.raises(UserError, match="takes no tokens"):
        get_peft_model(build(vit), PromptEncoderConfig())


def test_the_trainer_trains_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the mail goes to billing"}\n' * 8)
    run = inlay.train(
        {
            "adapter": {"method": "p_tuning", "num_virtual_tokens": 4, **LSTM},
            "data": {"path": str(rows)},
            "objective": "pretrain",
            "train": {"max_steps": 4, "learning_rate": 0.01, "micro_batch_size": 4},
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert run is not None
    assert (tmp_path / "run" / "adapter" / "inlay_training.safetensors").is_file()
    found = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert found.peft_config["default"].encoder_reparameterization_type == "LSTM"
