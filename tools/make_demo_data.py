"""Make recipes/data/support.jsonl: mails to a shop, each answered by one routing line.

    python tools/make_demo_data.py [--out FILE] [--rows 800] [--seed 0]

A row is a chat of two messages: a customer's mail, and `queue | order NUMBER | item | action`.
Queue and action follow from what the customer wants (`WISHES`), number and item are copied; a mail
that gives no number gets `order missing`. No two mails are equal, so whatever rows are held out,
their mails are not among the trained ones. The answer's form and policy appear nowhere in the
mails: a model that has not been trained on such rows cannot know them. Written for inlay
(Apache-2.0).
"""

# ruff: noqa: SIM905  a line of words reads better than a column of quoted ones

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

WISHES: dict[tuple[str, str], list[str]] = {
    ("billing", "refund"): [
        "You charged me twice for the {item}",
        "I was charged two times for my {item}",
        "The {item} was paid twice, please give the money back",
        "My card was charged twice when I ordered the {item}",
    ],
    ("billing", "invoice"): [
        "I still need an invoice for the {item}",
        "Please send me the invoice for my {item}",
        "There was no invoice with the {item}",
        "My office asks for the invoice of the {item}",
    ],
    ("shipping", "trace"): [
        "The {item} has not arrived yet",
        "My {item} never arrived",
        "I am still waiting for the {item}",
        "Where is my {item}? It is late",
    ],
    ("shipping", "readdress"): [
        "Please send the {item} to my new address",
        "I have moved, so the {item} must go to a new address",
        "Can you change the address for the {item}?",
        "The address for my {item} is wrong",
    ],
    ("returns", "replace"): [
        "The {item} arrived broken",
        "My {item} came with a crack",
        "When I opened the box, the {item} was broken",
        "The {item} was damaged on the way",
    ],
    ("returns", "exchange"): [
        "The {item} is too small for me",
        "I would like another size of the {item}",
        "The {item} has the wrong size",
        "My {item} is too large, can I swap it?",
    ],
    ("orders", "cancel"): [
        "I want to cancel the {item}",
        "Please cancel my {item}",
        "I do not need the {item} any more, cancel it",
        "Stop the order of the {item}, I changed my mind",
    ],
    ("repair", "collect"): [
        "The {item} stopped working",
        "My {item} does not work any more",
        "The {item} worked for a month and then it stopped",
        "I cannot get the {item} to work",
    ],
}
NUMBERS = ["My order number is {number}.", "Order {number}.", "It is about order {number}."]
NUMBERS += ["(order {number})", "This was order {number}.", "Number of the order: {number}."]
OPENINGS = ["Hello,", "Hi,", "Good morning,", "Dear shop,", "Hello again,"] + [""] * 3
CLOSINGS = ["Thanks, {name}", "Kind regards, {name}", "{name}", "Thank you!", "Please help."]
CLOSINGS += [""] * 2
ASIDES = ["I bought it on {day}.", "I ordered it {n} weeks ago.", "I paid {n} euros."]
ASIDES += ["This is the first time.", "I wrote to you on {day}."] + [""] * 4
COLORS = "red blue green yellow black white brown gray pink purple silver golden".split()
LOOKS = "wooden steel glass small large round folding heavy light soft plain old".split()
THINGS = (
    "lamp chair table shelf mirror clock kettle radio camera phone basket bottle bowl cup plate "
    "coat hat scarf jacket watch wallet umbrella tent bike heater fan pillow blanket desk stool"
).split()
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan June Leo Mia Nils Olga Paul Rosa Sam Tara".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "recipes" / "data" / "support.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    answers: dict[str, str] = {}
    while len(answers) < options.rows:
        mail, answer = request(rng)
        answers[mail] = answer
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": _messages(*pair)}) for pair in answers.items()]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def request(rng: random.Random) -> tuple[str, str]:
    """Return one mail and the line that routes it."""
    queue, action = rng.choice(list(WISHES))
    item = f"{rng.choice(COLORS + LOOKS)} {rng.choice(THINGS)}"
    number = str(rng.randrange(1000, 100_000))
    wish = rng.choice(WISHES[queue, action]).format(item=item)
    parts = [wish if wish.endswith("?") else wish + "."]
    if rng.random() < 0.9:
        parts.insert(rng.randrange(2), rng.choice(NUMBERS).format(number=number))
    else:
        number = "missing"
    parts.insert(rng.randrange(len(parts) + 1), rng.choice(ASIDES))
    details = {"name": rng.choice(NAMES), "day": rng.choice(DAYS), "n": rng.randint(2, 90)}
    mail = " ".join(part for part in (rng.choice(OPENINGS), *parts, rng.choice(CLOSINGS)) if part)
    return mail.format(**details), f"{queue} | order {number} | {item} | {action}"


def _messages(mail: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": mail}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    main()
