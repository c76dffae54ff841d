"""Completions and texts, which no chat template renders: what of them is trained, BOS and EOS."""

from __future__ import annotations

import pytest

from inlay.core.errors import UserError
from inlay.data.encode import encode
from inlay.data.rows import Completion, Source, Text
from tests.data.reading import trained, written

HERE = Source("rows.jsonl", 1)


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_over_the_boundary_belongs_to_the_prompt(trim, tokenizers):
    tokenizer = tokenizers("", trim_offsets=trim)
    (example,) = encode(Completion("The sky is ", "blue and", HERE), tokenizer)
    joint = tokenizer("The sky is blue and").input_ids
    assert example.input_ids == [*joint, tokenizer.eos_token_id]
    assert trained(example, tokenizer) == " and</s>"  # " blue" begins in the prompt
    (example,) = encode(Completion("The sky is", " blue and", HERE), tokenizer)
    assert trained(example, tokenizer) == " blue and</s>"


@pytest.mark.parametrize("spaces", ["", "first", "always"])
def test_a_completion_is_trained_from_its_first_character_by_any_tokenizer(spaces, tokenizers):
    tokenizer = tokenizers("", spaces=spaces)
    (example,) = encode(Completion("The sky is", " blue and", HERE), tokenizer)
    words = tokenizer.convert_ids_to_tokens([label for label in example.labels if label >= 0])
    text = "".join(words).replace("\u2581", " ").replace("\u0120", " ")
    assert text == " blue and</s>"


@pytest.mark.parametrize("spaces", ["", "first"])
def test_bos_and_eos_are_written_once_around_completions_and_texts(spaces, tokenizers):
    tokenizer = tokenizers("", spaces=spaces)
    for row in (
        Completion("<s>The sky", " is blue</s>", HERE),
        Completion("The sky", " is blue", HERE),
        Text("<s>The sky is blue</s>", HERE),
        Text("The sky is blue", HERE),
    ):
        (example,) = encode(row, tokenizer)
        ids, eos = example.input_ids, tokenizer.eos_token_id
        assert (ids[0], ids.count(ids[0])) == (tokenizer.bos_token_id, 1)
        assert (ids[-1], example.labels[-1], ids.count(eos)) == (eos, eos, 1)


def test_a_text_is_trained_whole_and_ends_in_eos(tokenizers):
    tokenizer = tokenizers("")
    (example,) = encode(Text("The sky is blue", HERE), tokenizer)
    assert written(example, tokenizer) == "<s>The sky is blue</s>"
    assert trained(example, tokenizer) == "The sky is blue</s>"
    (example,) = encode(Text("<s>The sky is blue</s>", HERE), tokenizer)
    assert written(example, tokenizer) == "<s>The sky is blue</s>"


def test_a_long_text_is_split_and_every_token_is_trained_once(tokenizers):
    tokenizer = tokenizers("")
    text = " ".join(f"number {i}" for i in range(100))
    examples = encode(Text(text, HERE), tokenizer, max_length=32)
    assert len(examples) > 5
    assert all(len(example.input_ids) <= 32 for example in examples)
    assert "".join(trained(example, tokenizer) for example in examples) == text + "</s>"


def test_a_tokenizer_without_offsets_is_refused_with_the_way_out():
    class Slow:
        pass

    with pytest.raises(UserError, match=r"Slow gives no character offsets.*tokenizer.json"):
        encode(Text("x", HERE), Slow())
