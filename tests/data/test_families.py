"""The chat templates of the families as their makers ship them, beside an independent oracle.

TRL carries them (in its package, read here as files), and for each a training variant in which
people have marked what the assistant says with {% generation %}. Where both write the same text,
our spans are compared with theirs.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from inlay.core.errors import UserError
from inlay.data.encode import IGNORED, encode
from inlay.data.rows import Chat, Message, Source
from inlay.data.spans import Lost, locate
from inlay.data.template import RenderError, Template
from tests.data.reading import trained

found = importlib.util.find_spec("trl")
if found is None:
    pytest.skip("the templates come with trl", allow_module_level=True)
FOLDER = Path(found.submodule_search_locations[0]) / "chat_templates"
SHIPPED = {
    path.stem: path.read_text("utf-8")
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
# read lists of parts for contents, and no plain texts
VISION = ("idefics3", "llava_next", "smolvlm")
# the variant writes another text than the template it is a variant of
REWRITTEN = ("glm4moe",)
# EOS once, after the last turn: no end of a turn, though the variants mark it
ONCE = ("phi3", "phi3_5")
# tokens of the vocabulary as these templates write them
TOKENS = re.compile(
    r"<\|[^|<>\s{}]{1,40}\|>|<\uff5c[^<>\s]{1,40}\uff5c>|<[a-z_]+\|>|<\|[a-z_\"]+>|</?s>"
    r"|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,}\]"
)
HERE = Source("rows.jsonl", 1)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "w"}},
            "required": ["word"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": "blue"}},
}
ASKS = (Message("user", "hello"), Message("assistant", "", tool_calls=(CALL,)))
TOLD = (Message("tool", "42", name="look_up", tool_call_id="call00001"),)
CHATS = {
    "one": Chat((Message("user", "hello"), Message("assistant", "world")), HERE),
    "three": Chat(
        tuple(
            message
            for i in range(3)
            for message in (Message("user", f"ask {i}"), Message("assistant", f"say {i} so"))
        ),
        HERE,
    ),
    "system": Chat(
        (
            Message("system", "be kind"),
            *(Message("user", "hello"), Message("assistant", "world")),
            *(Message("user", "more"), Message("assistant", "again")),
        ),
        HERE,
    ),
    "reasoning": Chat(
        (Message("user", "hello"), Message("assistant", "world", reasoning="hm so")), HERE
    ),
    "tool": Chat((*ASKS, *TOLD, Message("assistant", "it is 42")), HERE, (TOOL,)),
}
TOOLS_LEFT_OUT = (
    *("deepseek_r1_distill", "deepseekv3", "lfm2", "llama3"),
    *("phi3", "phi3_5", "qwen2_5_vl"),
)


@pytest.fixture
def family(tokenizers):
    """Return `get(stem)`, a tokenizer with that template and the special tokens it writes."""

    def get(stem, **settings):
        text = SHIPPED[stem]
        special = sorted(set(TOKENS.findall(text)))
        return tokenizers(stem, special=special, chat_template=text, **settings)

    return get


def marked(template, stem, row):
    """Return the text of the training variant and its marked spans, neighbors joined."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = template.tokenizer
    (text,), (spans,) = render_jinja_template(
        conversations=[[template.call_form.fields(message) for message in row.messages]],
        chat_template=(FOLDER / f"{stem}_training.jinja").read_text("utf-8"),
        tools=list(row.tools) or None,
        return_assistant_tokens_mask=True,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif end > start:
            joined.append([start, end])
    return text, joined


WITH_VARIANT = [
    stem for stem in SHIPPED if (FOLDER / f"{stem}_training.jinja").exists() and stem not in VISION
]


@pytest.mark.parametrize("stem", [stem for stem in WITH_VARIANT if stem not in REWRITTEN])
def test_what_is_trained_is_what_people_have_marked_but_for_what_generation_is_given(stem, family):
    template = Template(family(stem))
    once = template.tokenizer.eos_token if stem in ONCE else ""
    compared = 0
    for name, row in CHATS.items():
        if name == "tool" and stem.startswith(("deepseek", "diffusion")):
            continue  # the variant writes another text, or leaves out a header
        if name == "reasoning" and stem == "qwen3_5_nothink":
            continue  # generation is given that nothing was thought
        turns = {i for i, turn in enumerate(row.messages) if turn.role == "assistant"}
        try:
            parts = locate(template, row.messages, row.tools, turns)
        except (Lost, RenderError):  # refused: no system prompt, no tools, no reasoning
            continue
        text, theirs = marked(template, stem, row)
        ours = [(start, end) for start, end, _ in parts[-1].spans]
        if text != parts[-1].text:
            continue
        if len(parts) > 1:
            theirs = theirs[-1:]
        prompts = [row.messages[:i] for i in sorted(turns)][-len(ours) :]
        for (start, end), (first, last), asked in zip(ours, theirs, prompts, strict=True):
            ended = text[first:last].removesuffix(once).rstrip()
            assert text[start:end] == ended[start - first :]
            given = template.render(asked, row.tools, generation=True)
            given = given.removesuffix(template.surplus) if given not in text else given
            assert given.endswith(text[first:start])
            compared += 1
    assert compared >= 1


@pytest.mark.parametrize("stem", [stem for stem in SHIPPED if stem not in VISION])
def test_every_token_trained_is_the_assistants_and_each_turn_ends_in_a_special_token(stem, family):
    tokenizer = family(stem)
    row = CHATS["three"]
    examples = encode(row, tokenizer, max_length=4096)
    said = "".join(trained(example, tokenizer) for example in examples)
    assert [said.count(f"say {i} so") for i in range(3)] == [1, 1, 1]
    assert "ask" not in said
    if stem != "glm4moe":  # ends no turn; `describe` warns
        special = set(Template(tokenizer).specials.values())
        for example in examples:
            ends = [
                label
                for label, after in zip(example.labels, [*example.labels[1:], IGNORED], strict=True)
                if label != IGNORED and after == IGNORED
            ]
            assert ends
            assert set(ends) <= special


def test_cohere_ends_a_turn_in_two_tokens_and_both_are_trained(family):
    template = Template(family("cohere2"))
    assert template.stop == "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert template.stop_id == template.specials["<|END_OF_TURN_TOKEN|>"]


@pytest.mark.parametrize("stem", TOOLS_LEFT_OUT)
def test_tools_that_the_template_leaves_out_are_refused(stem, family):
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*leaves out (the tools|'look_up' in a)"):
        encode(CHATS["tool"], family(stem), max_length=4096)


@pytest.mark.parametrize("stem", VISION)
def test_a_template_of_a_vision_model_is_refused_in_words(stem, family):
    with pytest.raises(UserError, match=r"give another one as data.chat_template"):
        encode(CHATS["one"], family(stem))


def test_an_answer_that_changes_what_stands_before_it_is_refused(family):
    said = Message("assistant", "let me see", tool_calls=(CALL,))
    row = Chat((ASKS[0], said, *TOLD, Message("assistant", "it is 42")), HERE, (TOOL,))
    with pytest.raises(UserError, match="an answer changes what it writes before that answer"):
        encode(row, family("gemma4_v5"), max_length=4096)


LONG = {
    "questions and answers": lambda n: (
        turn
        for i in range(n)
        for turn in (Message("user", f"ask {i} now"), Message("assistant", f"say {i} so"))
    ),
    "two answers in a row": lambda n: (
        turn
        for i in range(n)
        for turn in (
            Message("user", f"ask {i} now"),
            *(Message("assistant", f"say {i}"), Message("assistant", "and more")),
        )
    ),
    "calls of tools": lambda n: (
        Message("user", "hello"),
        *(turn for _ in range(n) for turn in (ASKS[1], *TOLD)),
        Message("assistant", "done"),
    ),
}
LINEAR = (
    *("cohere2", "deepseek_r1_distill", "gemma", "gemma3", "glm4moe", "lfm2_v2", "llama3_1"),
    *("muse_glimmer", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3_instruct_2507", "qwen3_8"),
)
REWRITES = ("gptoss", "qwen3", "qwen3_5_think", "qwen3_6")


@pytest.fixture
def rendered(monkeypatch):
    """Collect the length of every render."""
    lengths = []
    render = Template._render

    def counting(self, *args):
        text = render(self, *args)
        lengths.append(len(text))
        return text

    monkeypatch.setattr(Template, "_render", counting)
    return lengths


def cost(stem, kind, turns, family, rendered):
    """Return the renders, and the characters rendered for each character of the conversation."""
    row = Chat(tuple(LONG[kind](turns)), HERE, (TOOL,) if "tools" in kind else ())
    rendered.clear()
    encode(row, family(stem), max_length=10**7)
    return len(rendered), sum(rendered) / max(rendered)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("stem", LINEAR)
def test_the_characters_rendered_grow_with_the_conversation_and_not_its_square(
    stem, kind, family, rendered
):
    try:
        _, short = cost(stem, kind, 20, family, rendered)
    except UserError as refused:  # the template takes no such conversation
        pytest.skip(str(refused))
    renders, long = cost(stem, kind, 80, family, rendered)
    assert long < 1.3 * short + 1
    assert renders <= 2 * 80 + 25


@pytest.mark.parametrize("stem", REWRITES)
def test_a_template_that_rewrites_history_costs_two_renders_a_turn(stem, family, rendered):
    for turns in (20, 80):
        renders, _ = cost(stem, "questions and answers", turns, family, rendered)
        assert renders <= 2 * turns + 25
