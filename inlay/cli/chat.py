"""Talk with a model in the terminal, or ask once with --prompt.

    inlay chat runs/support
    inlay chat runs/support --prompt "Where is my order?"
    inlay chat --adapter a=runs/a/adapter --adapter b=runs/b/adapter
    inlay chat --base_model Qwen/Qwen3-0.6B

While talking: /adapter NAME switches (none = the base), /adapters lists, /reset
forgets what was said, /quit ends. With nothing given it talks with inlay-tiny.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from inlay.cli._machine import settle
from inlay.core.errors import UserError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    add = parser.add_argument
    add("source", nargs="?", metavar="RUN", help="a run folder, an adapter's or a model's")
    add(
        "--adapter", action="append", default=[], metavar="[NAME=]FOLDER", help="an adapter; repeat"
    )
    add(
        "--base_model", help="a hub id or a folder (default: what the adapter names, or inlay-tiny)"
    )
    add("--any_base", action="store_true", help="do not check that it is the base of the training")
    add("--prompt", help="ask this, print the answer and end")
    add("--system", help="system prompt")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 = always the likeliest token (default)")
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Load, then answer once or talk."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {arguments.max_new_tokens}; it must be 1 or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature is {arguments.temperature}; it must be 0 or more, finite")
    settle()
    model, tokenizer = load(arguments)
    if not hasattr(model, "generate") or not model.can_generate():
        raise UserError("this is a classifier, which does not talk; `inlay eval` measures it")
    talk = Talk(model, tokenizer, arguments)
    if arguments.prompt is not None:
        talk.answer(arguments.prompt)
        return 0
    print(talk.where())
    while (line := _ask()) is not None:
        if not line.startswith("/"):
            _answer(talk, line)
        elif talk.command(line) == "quit":
            break
    return 0


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and tokenizer that the arguments name."""
    from inlay.model.load import load_base
    from inlay.run.opening import (
        adapter_of,
        is_hub_id,
        kind_of,
        named,
        open_adapters,
        open_trained,
    )

    given = {"device": arguments.device, "check_base": not arguments.any_base}
    adapters, source = list(arguments.adapter), arguments.source
    if source is not None and adapters:
        adapters.insert(0, source)
    if adapters:
        places = {name: adapter_of(place) for name, place in named(adapters).items()}
        return open_adapters(places, arguments.base_model, **given)
    if source is None or (not is_hub_id(source) and kind_of(source) == "model"):
        if source and arguments.base_model:
            raise UserError(f"{source} is a model, and so is --base_model; give one of them")
        model, tokenizer = load_base(source or arguments.base_model, device=arguments.device)
        if tokenizer is None:
            raise UserError(f"{source or arguments.base_model} has no tokenizer")
        return model, tokenizer
    return open_trained(source, arguments.base_model, **given)


class Talk:
    """A conversation with a model; what was said is kept, and rendered anew for each answer."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        from inlay.data.rows import Message
        from inlay.data.template import Template
        from inlay.data.tokens import Tokens
        from inlay.train.answers import stop_ids

        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.template = Template(tokenizer) if tokenizer.chat_template else None
        self.tokens: Any = Tokens(tokenizer) if self.template else None
        self.stops = stop_ids(model, tokenizer, self.template)
        # a template may end a turn with text that is no token of its own
        by_text = self.template is not None and self.template.stop_id is None
        self.end = self.template.stop.strip() if self.template and by_text else ""
        self.system = [Message("system", arguments.system)] if arguments.system else []
        self.said: list[Any] = []
        self.names = list(model.roster.names) if hasattr(model, "roster") else []
        self.off = False

    def answer(self, text: str) -> str:
        """Print the answer as it comes, keep both in the conversation, and return it."""
        from inlay.data.rows import Message

        self.said.append(Message("user", text))
        try:
            answer = self._generate()
        except BaseException:
            self.said.pop()  # an answer that was interrupted was not given
            raise
        self.said.append(Message("assistant", answer))
        return answer

    def command(self, line: str) -> str | None:
        """Do what a line that begins with / says; return "quit" where it says that."""
        word, _, rest = line[1:].strip().partition(" ")
        match word:
            case "quit" | "exit":
                return "quit"
            case "reset":
                self.said.clear()
                print("forgotten")
            case "adapters":
                print(self.where())
            case "adapter":
                self._switch(rest.strip())
            case _:
                print("there are /adapter NAME, /adapters, /reset, /quit")
        return None

    def where(self) -> str:
        """Return the names of the adapters, the active one marked."""
        if not self.names:
            return "the base alone, no adapter"
        active = "none" if self.off else self.model.active_adapters[0]
        return "  ".join(f"*{n}" if n == active else n for n in [*self.names, "none"])

    def _switch(self, name: str) -> None:
        if not name:
            print(self.where())
            return
        if name != "none" and name not in self.names:
            print(f"no adapter {name!r}.{nearest(name, self.names)} {self.where()}")
            return
        self.off = name == "none"
        if not self.off:
            self.model.set_adapter(name, inference_mode=True)
        print(self.where())

    def _generate(self) -> str:
        import torch
        from transformers import GenerationConfig, TextStreamer

        ids = self._ids()
        warm = self.arguments.temperature > 0
        settings = GenerationConfig(
            max_new_tokens=min(self.arguments.max_new_tokens, self._room(ids.shape[1])),
            do_sample=warm,
            eos_token_id=self.stops or None,
            pad_token_id=self.tokenizer.pad_token_id or min(self.stops, default=0),
            **({"temperature": self.arguments.temperature} if warm else {}),
            stop_strings=[self.end] if self.end else None,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        base = self.model.disable_adapter() if self.names and self.off else nullcontext()
        with torch.no_grad(), base:
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=streamer,
                tokenizer=self.tokenizer,
            )
        text = str(self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        return (text.partition(self.end)[0] if self.end else text).strip()

    def _room(self, said: int) -> int:
        """Return how many tokens an answer may have after `said` of them."""
        from inlay.model.load import most_tokens

        limit = most_tokens(self.model)
        if limit is not None and said >= limit:
            raise UserError(
                f"the conversation has {said} tokens, and the model reads {limit}; ask something "
                "shorter, or /reset to forget what was said"
            )
        return self.arguments.max_new_tokens if limit is None else limit - said

    def _ids(self) -> Any:
        import torch

        from inlay.data.chats import question
        from inlay.data.template import RenderError
        from inlay.train.precision import device_of

        if self.template is None:  # a base that never saw a conversation goes on with the text
            ids = self.tokenizer(self.said[-1].content)["input_ids"]
        else:
            try:
                ids = question([*self.system, *self.said], self.template, self.tokens)
            except RenderError as error:
                raise UserError(f"the chat template refuses this conversation: {error}") from error
        return torch.tensor([ids], device=device_of(self.model))


def _answer(talk: Talk, line: str) -> None:
    """Answer; Ctrl-C ends the answer and a mistake is told, and the conversation goes on."""
    try:
        talk.answer(line)
    except KeyboardInterrupt:
        print("\n(interrupted)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


def _ask() -> str | None:
    """Return the next line that says something, or None at the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line
