"""Chats that teach inlay-tiny to copy, to pick, to reorder and to follow a form.

A task is a function (rng, words) -> (request, answer). Its answer can be read off the request, so
what is learned is a way of using the context, not facts. `chat` wraps one or more tasks in turns:
with a system prompt that changes the answer's form, or as examples from which the rule must be
inferred. Everything here was written for this project (Apache-2.0).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny_words import KINDS, MATERIALS, NAMES, TOPICS, Words, invented, number, thing

Turn = tuple[str, str]
Task = Callable[[random.Random, Words], Turn]

SEPARATORS = [" | ", " / ", ", ", "; ", " - ", " -> ", " + ", " : ", " & ", " = ", " ~ ", "\n"]
VERBS = ["bought", "sold", "lost", "found", "sent", "needs", "broke", "wants"]
VERBS += ["returned", "ordered"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
COUNTS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def repeat(rng: random.Random, words: Words) -> Turn:
    text = " ".join(words.some(rng, 1, 9))
    ask = rng.choice(
        ["Repeat: {}", "Say exactly: {}", "Copy this.\n{}", "{}\nSay it again.", "Echo {}"]
    )
    return ask.format(text), text


def nth_word(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 3, 6)
    i = rng.randrange(len(some))
    which = rng.choice([ORDINALS[i], f"number {i + 1}"] + ["last"] * (i == len(some) - 1) * 3)
    ask = rng.choice(["Give the {} word: {}", "Which word is {}? {}", "{} word of {}"])
    return ask.format(which, " ".join(some)), some[i]


def join(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 2, 5)
    old, new = rng.sample(SEPARATORS, 2)
    shown = "a new line" if new == "\n" else f"'{new}'"
    ask = rng.choice(
        ["Join with {}: {}", "Put {} between the items: {}", "Use {} as separator.\n{}"]
    )
    return ask.format(shown, old.join(some)), new.join(some)


def reverse(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 2, 5)
    gap = rng.choice([" ", ", "])
    ask = rng.choice(["Reverse the order: {}", "Backwards: {}", "List from last to first: {}"])
    return ask.format(gap.join(some)), gap.join(reversed(some))


def swap(rng: random.Random, words: Words) -> Turn:
    a, b = words.some(rng, 2, 2)
    gap = rng.choice([" ", ", ", " and "])
    return rng.choice(["Swap: {}", "Turn around: {}"]).format(a + gap + b), b + gap + a


def bullets(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 2, 5)
    shown = ", ".join(some)
    if rng.random() < 0.5:
        return f"Make a list: {shown}", "\n".join(f"- {word}" for word in some)
    return f"Make a numbered list: {shown}", "\n".join(f"{i}. {w}" for i, w in enumerate(some, 1))


def count(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 1, 6)
    if rng.random() < 0.5:
        return f"How many words? {' '.join(some)}", COUNTS[len(some)]
    return f"Count the items: {', '.join(some)}", str(len(some))


def case(rng: random.Random, words: Words) -> Turn:
    text = " ".join(words.some(rng, 1, 3))
    name, change = rng.choice(
        [("upper case", str.upper), ("lower case", str.lower), ("title case", str.title)]
    )
    return f"Write in {name}: {text}", change(text)


def contains(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 3, 6)
    word = rng.choice(some) if rng.random() < 0.5 else words.one(rng)
    return f"Is {word} in this list? {', '.join(some)}", "yes" if word in some else "no"


def replace(rng: random.Random, words: Words) -> Turn:
    *some, new = words.some(rng, 4, 7)
    old = rng.choice(some)
    done = " ".join(new if word == old else word for word in some)
    return f"Replace {old} with {new}: {' '.join(some)}", done


def remove(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 3, 6)
    old = rng.choice(some)
    return f"Leave out {old}: {' '.join(some)}", " ".join(word for word in some if word != old)


def look_up(rng: random.Random, words: Words) -> Turn:
    keys, values = words.some(rng, 2, 5), words.some(rng, 5, 5)
    i = rng.randrange(len(keys))
    mark, gap = rng.choice([": ", " = ", " is ", " -> "]), rng.choice(["\n", "; ", ", "])
    table = gap.join(key + mark + value for key, value in zip(keys, values, strict=False))
    ask = rng.choice(["{0}\nWhat is {1}?", "What is {1}?\n{0}", "{0}\n{1}{2}"])
    return ask.format(table, keys[i], mark.rstrip()), values[i]


def invert(rng: random.Random, words: Words) -> Turn:
    keys, values = words.some(rng, 2, 4), words.some(rng, 4, 4)
    i = rng.randrange(len(keys))
    table = "; ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=False))
    return f"{table}\nWhich key has the value {values[i]}?", keys[i]


def after(rng: random.Random, words: Words) -> Turn:
    some = words.some(rng, 4, 8)
    i = rng.randrange(1, len(some) - 1)
    where, answer = rng.choice([("after", some[i + 1]), ("before", some[i - 1])])
    return f"Which word comes {where} {some[i]}? {' '.join(some)}", answer


def translate(rng: random.Random, words: Words) -> Turn:
    plain = words.some(rng, 3, 6)
    foreign = [invented(rng) for _ in plain]
    pairs = "; ".join(f"{a} = {b}" for a, b in zip(foreign, plain, strict=True))
    picked = rng.sample(range(len(plain)), rng.randint(1, 3))
    text = " ".join(foreign[i] for i in picked)
    return f"{pairs}\nTranslate: {text}", " ".join(plain[i] for i in picked)


def which_kind(rng: random.Random, _words: Words) -> Turn:
    kinds = rng.sample(list(KINDS), 3)
    kind = rng.choice(kinds)
    if rng.random() < 0.5:
        return f"{rng.choice(KINDS[kind])}: {kinds[0]}, {kinds[1]} or {kinds[2]}?", kind
    shown = [rng.choice(KINDS[k]) for k in kinds]
    return f"Which one is a {kind}? {', '.join(shown)}", shown[kinds.index(kind)]


def compare(rng: random.Random, _words: Words) -> Turn:
    a, b = rng.sample(range(100), 2)
    name, pick = rng.choice([("larger", max), ("smaller", min)])
    return f"Which is {name}, {a} or {b}?", str(pick(a, b))


def add(rng: random.Random, _words: Words) -> Turn:
    a, b = rng.randrange(10), rng.randrange(10)
    return f"{a} + {b} = ?", str(a + b)


def story(rng: random.Random, words: Words) -> tuple[str, dict[str, str]]:
    """Return a short passage and the fields that can be read off it."""
    field = {
        "name": rng.choice(NAMES) if rng.random() < 0.7 else invented(rng).title(),
        "item": thing(rng),
        "number": number(rng, (2, 3, 4, 4, 5, 6)),
        "place": rng.choice(KINDS["place"]) if rng.random() < 0.7 else invented(rng).title(),
        "day": rng.choice(KINDS["day"]),
        "topic": rng.choice(TOPICS),
        "state": rng.choice(MATERIALS),
    }
    parts = rng.sample(
        [
            ("{name} {verb} a {item}", ("name", "item")),
            ("my name is {name}", ("name",)),
            ("the {item} is {state}", ("item", "state")),
            ("it {verb} on {day}", ("day",)),
            ("{word} {number} {word2}", ("number",)),
            ("the number is {number}", ("number",)),
            ("I live in {place}", ("place",)),
            ("{name} went to {place} with the {item}", ("name", "place", "item")),
            ("this is about {topic}", ("topic",)),
            ("{word} {word2} {topic} {word3}", ("topic",)),
            ("{word} {word2} {word3}", ()),
            ("about my {item}, number {number}", ("item", "number")),
            ("I {verb} {word2} {item} ({number}) {word3}", ("item", "number")),
        ],
        rng.randint(2, 4),
    )
    verb = rng.choice(VERBS)
    more = dict(zip(("word", "word2", "word3"), words.some(rng, 3, 3), strict=True))
    known = {key: field[key] for _, keys in parts for key in keys}
    sentences = [part.format(verb=verb, **more, **field) for part, _ in parts]
    text = " ".join(s[0].upper() + s[1:] + rng.choice(".....!?") for s in sentences)
    return (text, known) if known else story(rng, words)


def ask_story(rng: random.Random, words: Words) -> Turn:
    text, known = story(rng, words)
    key = rng.choice(list(known))
    ask = rng.choice(["What is the {}?", "Which {}?", "{}?", "Give me the {}.", "Extract the {}."])
    parts = [text, ask.format(key)]
    if rng.random() < 0.5:
        parts.reverse()
    return "\n".join(parts), known[key]


def fill_form(rng: random.Random, words: Words) -> Turn:
    """Ask for several fields in a form shown with the fields' names as place holders."""
    text, known = story(rng, words)
    keys = rng.sample(list(known), rng.randint(1, min(4, len(known))))
    gap, fixed = rng.choice(SEPARATORS), words.some(rng, 3, 3)
    slots = [
        f"{rng.choice(fixed)} {{{key}}}" if rng.random() < 0.3 else f"{{{key}}}" for key in keys
    ]
    if rng.random() < 0.4:
        slots.insert(rng.randrange(len(slots) + 1), rng.choice(fixed))
    form = gap.join(slots)
    ask = rng.choice(["Fill in {0}\n{1}", "{1}\nWrite it as {0}", "Form: {0}\nText: {1}"])
    return ask.format(form, text), form.format(**known)


def as_pairs(rng: random.Random, words: Words) -> Turn:
    text, known = story(rng, words)
    keys = rng.sample(list(known), len(known))
    answer = "\n".join(f"{key}: {known[key]}" for key in keys)
    return f"List {', '.join(keys)}.\n{text}", answer


def tag(rng: random.Random, words: Words) -> Turn:
    """Ask for the label that a cue in the text stands for."""
    cues, labels = words.some(rng, 2, 4), words.some(rng, 4, 4)
    i = rng.randrange(len(cues))
    rules = ", ".join(f"{cue} -> {label}" for cue, label in zip(cues, labels, strict=False))
    noise = [word for word in words.some(rng, 2, 6) if word not in cues]
    noise.insert(rng.randrange(len(noise) + 1), cues[i])
    return f"Rules: {rules}\nText: {' '.join(noise)}", labels[i]


def small_talk(rng: random.Random, _words: Words) -> Turn:
    name = rng.choice(NAMES)
    return rng.choice(
        [
            ("Hello!", "Hello! How can I help you?"),
            ("Hi", "Hello! How can I help you?"),
            ("Who are you?", "I am inlay-tiny, a very small language model."),
            (
                "What can you do?",
                "I can copy, pick and reorder words. Teach me more with an adapter.",
            ),
            ("Thank you!", "You are welcome."),
            (f"My name is {name}.", f"Hello, {name}!"),
            (f"I am {name}. Who am I?", f"You are {name}."),
            ("Goodbye", "Goodbye!"),
        ]
    )


TASKS: dict[Task, int] = {
    repeat: 6, nth_word: 4, join: 6, reverse: 3, swap: 2, bullets: 3, count: 2, case: 2,
    contains: 2, replace: 3, remove: 3, look_up: 7, invert: 3, after: 3, translate: 4,
    which_kind: 3, compare: 1, add: 1, ask_story: 10, fill_form: 14, as_pairs: 4, tag: 5,
    small_talk: 1,
}  # fmt: skip
"""Each task and its share of the requests."""


def chat(rng: random.Random, words: Words) -> list[dict[str, str]]:
    """Return the messages of one chat of one to four turns, some with a system prompt."""
    draw = rng.random()
    if draw < 0.15:
        return _by_example(rng, words)
    turns = [_task(rng)(rng, words) for _ in range(2 if draw > 0.85 else 1)]
    if draw < 0.25:
        return _ruled(rng, words, turns)
    return _messages(turns)


def _task(rng: random.Random) -> Task:
    return rng.choices(list(TASKS), list(TASKS.values()))[0]


def _messages(turns: list[Turn], system: str = "") -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for request, answer in turns:
        messages += [
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer},
        ]
    return messages


def _ruled(rng: random.Random, words: Words, turns: list[Turn]) -> list[dict[str, str]]:
    """Let a system prompt say how each answer begins or ends."""
    mark = " ".join(words.some(rng, 1, 2))
    where, form = rng.choice([("Begin", "{mark} {answer}"), ("End", "{answer} {mark}")])
    done = [(request, form.format(mark=mark, answer=answer)) for request, answer in turns]
    return _messages(done, f"{where} each answer with {mark}")


def _by_example(rng: random.Random, words: Words) -> list[dict[str, str]]:
    """Show a rule two or three times and leave the last turn to it."""
    n = rng.randint(2, 4)
    order = rng.sample(range(n), rng.randint(1, n))
    gap, prefix = rng.choice(SEPARATORS), rng.choice(["", "", words.one(rng) + " "])
    turns = []
    for _ in range(rng.randint(3, 4)):
        some = words.some(rng, n, n)
        turns.append((" ".join(some), prefix + gap.join(some[i] for i in order)))
    return _messages(turns)
