"""What is read off a chat template by rendering it."""

from __future__ import annotations

import datetime

import pytest

from inlay.core.errors import UserError
from inlay.data.encode import encode
from inlay.data.rows import Message
from inlay.data.template import BUILT_IN, Template


def test_a_tokenizer_without_a_template_is_an_error_that_names_the_option(tokenizers, chat):
    with pytest.raises(UserError, match=r"no chat template.*data.chat_template to chatml, plain"):
        encode(chat("u: q", "a: yes"), tokenizers(""))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_serves_a_tokenizer_without_one(name, tokenizers, chat):
    tokenizer = tokenizers("")
    (example,) = encode(chat("u: q", "a: yes"), tokenizer, chat_template=name)
    trained = [label for label in example.labels if label >= 0]
    ending = {"chatml": "yes<|im_end|>", "plain": "yes</s>"}[name]
    assert tokenizer.decode(trained) == ending
    assert Template(tokenizer, name).origin == f"built-in {name}"


def test_a_template_comes_from_a_file_or_is_given_as_text(tokenizers, tmp_path):
    text = tokenizers("chatml").chat_template
    (tmp_path / "my.jinja").write_text(text, encoding="utf-8")
    from_file = Template(tokenizers("llama3"), str(tmp_path / "my.jinja"))
    assert from_file.text == text == Template(tokenizers("llama3"), text).text
    assert from_file.origin.endswith("my.jinja")
    with pytest.raises(UserError, match="'chatlm' is no file"):
        Template(tokenizers("llama3"), "chatlm")


def test_a_template_that_refuses_a_plain_question_is_an_error(tokenizers):
    refuses = "{{ raise_exception('tools only') }}"
    with pytest.raises(UserError, match="refuses a question with its answer: tools only"):
        _ = Template(tokenizers("chatml"), refuses).probe


STOPS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral": "</s>",
}


@pytest.mark.parametrize("name", STOPS)
def test_the_token_that_ends_a_turn_is_read_off_the_render(name, tokenizers):
    template = Template(tokenizers(name))
    assert template.stop == STOPS[name]
    assert template.stop_id == tokenizers(name).convert_tokens_to_ids(STOPS[name])


def test_a_template_that_ends_no_turn_or_ends_it_in_plain_text_is_told(tokenizers):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Template(tokenizers("chatml"), endless).stop == ""
    worded = endless.replace("\n", " [END]\n")
    template = Template(tokenizers("chatml"), worded)
    assert (template.stop, template.stop_id) == (" [END]", None)


@pytest.mark.parametrize(("name", "prompt"), [("qwen2.5", "You are Tiny."), ("chatml", "")])
def test_a_system_prompt_that_the_template_adds_is_found(name, prompt, tokenizers):
    assert Template(tokenizers(name)).default_system == prompt


def test_a_generation_prompt_that_holds_more_than_the_rows_is_told(tokenizers):
    assert Template(tokenizers("deepseek")).surplus == "<think>\n"
    assert Template(tokenizers("llama3")).surplus == ""


def test_the_arguments_of_a_template_reach_it(tokenizers):
    template = Template(tokenizers("qwen3"), kwargs={"enable_thinking": False})
    assert template.render([Message("user", "q")], generation=True).endswith("</think>\n\n")


def test_a_template_that_writes_the_day_is_told(tokenizers):
    today = datetime.date.today().strftime("%d %b %Y")
    assert Template(tokenizers("llama3.1")).dates[:1] == [today]
    given = Template(tokenizers("llama3.1"), kwargs={"date_string": "26 Jul 2024"})
    assert given.dates == Template(tokenizers("llama3")).dates == []


def test_what_is_written_once_after_the_last_turn_does_not_end_a_turn(tokenizers):
    assert Template(tokenizers("phi3")).stop == "<|end|>"
    twice = tokenizers("chatml").chat_template.replace("<|im_end|>", "<|end|><|im_end|>")
    template = Template(tokenizers("chatml"), twice)
    assert template.stop == "<|end|><|im_end|>"
    assert template.stop_id == template.specials["<|im_end|>"]


def test_a_template_that_leaves_out_plain_texts_is_refused(tokenizers):
    parts = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves out the answer to a question"):
        _ = Template(tokenizers("chatml"), parts).probe
