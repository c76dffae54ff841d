"""Names, expressions, and the limits that hold them."""

from __future__ import annotations

import re
import time

import pytest

from inlay.core import patterns
from inlay.core.errors import UserError

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.up_proj",
    "h.2.attn.c_attn",
    "lm_head",
    "my_lora_block.head",
]
SLOW = r"(?:[\w.]|\w\w|\w\w\w|[a-z]{4})+(?<![a-z])"


def test_a_name_is_a_path_or_its_dotted_end_and_nothing_else():
    assert patterns.matches(["q_proj"], PATHS[0])
    assert patterns.matches({"self_attn.q_proj"}, PATHS[0])
    assert patterns.matches([PATHS[0]], PATHS[0])
    assert not patterns.matches(["proj", "attn.q_proj", "layers", "q_proj."], PATHS[0])
    assert not patterns.matches(["head"], "lm_head")
    assert not patterns.matches(None, "lm_head")
    assert not patterns.matches([], "lm_head")
    assert patterns.names("head", "a.head")
    assert not patterns.names("head", "lm_head")


def test_the_ends_of_a_path_are_its_dotted_tails():
    assert list(patterns.ends("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(patterns.ends("a")) == ["a"]


@pytest.mark.parametrize(
    "expression", [r".*\.(q|up)_proj", r"model\.layers\.\d{1,2}\..*", "lm_head", r"h\.[0-9]+.*", ""]
)
def test_an_expression_picks_what_re_fullmatch_picks(expression):
    for path in PATHS:
        assert patterns.matches(expression, path) == bool(re.fullmatch(expression, path))


def reference(keys: dict[str, int], path: str, otherwise: int) -> int:
    """PEFT's rule: the first key that matches the end of the path."""
    for key, value in keys.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"q_proj": 1},
        {"self_attn.q_proj": 1, "q_proj": 2},
        {"q_proj": 2, "self_attn.q_proj": 1},
        {".*proj": 3, "q_proj": 1},
        {"q_proj": 1, ".*proj": 3},
        {"nothing": 1, r"layers\.\d+\..*": 2, "up_proj": 3},
        {r"layers\.1\..*": 2, "c_attn": 3, "lm_head": 4},
        {"^lm_head": 5, r"^h\.2.*": 6},
        {"(q|v)_proj": 7, "model.layers.0.self_attn.q_proj": 8},
    ],
)
def test_the_first_key_that_matches_gives_the_value_as_in_peft(keys):
    for path in PATHS:
        assert patterns.Keys(keys).first(path, -1) == reference(keys, path, -1)


def test_keys_that_reach_no_path_are_told():
    keys = {
        "q_proj": 1,
        "k_proj": 1,
        r".*\.up.*": 1,
        "(x|y)": 1,
        "layers.11.mlp.experts.3.up_proj": 1,
    }
    assert [list(keys)[at] for at in patterns.Keys(keys).unused(PATHS)] == ["k_proj", "(x|y)"]


@pytest.mark.parametrize(
    ("names", "path", "index"),
    [
        (None, "model.layers.3.mlp.up", 3),
        (None, "model.layers.3.experts.7.up", 3),
        ([], "layers.4.attn.q", 4),
        (None, "lm_head", None),
        (None, "model.layers.3", None),
        ("layers", "model.blocks.1.layers.2.q", 2),
        (["blocks", "layers"], "model.blocks.1.layers.2.q", 1),
        ("h", "h.5.attn", 5),
        ("h", "oh.5.attn", None),
    ],
)
def test_the_layer_is_the_first_number_or_the_one_after_the_named_list(names, path, index):
    assert patterns.layer(names, path) == index


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(", "not a regular expression"),
        (r"\p{Nonsense}", "not a regular expression"),
        ("a" * 10_001, "over the limit of 10000"),
        ("(" * 4000 + ")" * 4000, "not a usable regular expression"),
        ("((a{1000}){1000}){1000}", "counted repeats"),
        ("(?x) (a{ 1, 99999999999999999 })", "counted repeats"),
    ],
)
def test_what_cannot_be_compiled_or_costs_too_much_to_is_refused(expression, says):
    with pytest.raises(UserError, match=says):
        patterns.fullmatch(expression, "a")


def test_an_expression_that_backtracks_forever_is_stopped():
    with pytest.raises(UserError, match=r"took more than 0\.5 s"):
        patterns.fullmatch(SLOW, "model.layers.0.self_attn.q_proj" * 2)


def test_all_expressions_of_one_budget_share_its_time(monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) * 0.3)  # each takes 0.3 s
    with patterns.budget():
        for _ in range(7):
            patterns.fullmatch("a", "a")
        with pytest.raises(UserError, match=r"all patterns together: 2\.0 s"):
            patterns.fullmatch("a", "a")
    assert patterns.fullmatch("a", "a")  # a new one begins afresh


def test_a_budget_inside_another_adds_nothing():
    with (
        patterns.budget(0.0),
        patterns.budget(100),
        pytest.raises(UserError, match="took more than 0 s"),
    ):
        patterns.fullmatch("a", "a")


def test_more_expressions_or_names_than_the_limit_are_refused():
    with pytest.raises(UserError, match="1001 regular expressions"):
        patterns.Keys({f"a{i}.*": 1 for i in range(1001)})
    with pytest.raises(UserError, match="holds 100001 names, over the limit"):
        patterns.check_counts("target_modules", range(100_001))


def test_looking_a_name_up_does_not_depend_on_how_many_there_are():
    class Counted(frozenset):
        looked = 0

        def __contains__(self, name):
            Counted.looked += 1
            return super().__contains__(name)

        def __iter__(self):
            raise AssertionError("walked over the names")

    assert not patterns.matches(Counted(str(i) for i in range(10_000)), "a.b.c.d")
    assert Counted.looked == 4
