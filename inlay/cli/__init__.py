"""The command `inlay`: one file a command; the file's name is the command's.

A command's module has `add_arguments(parser)` and `run(arguments) -> exit code`, or `main(words)`
where argparse does not do. It imports torch and all of inlay inside its functions, so that the help
answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from inlay.core.errors import UserError, nearest

ORDER = ("train", "compare", "chat", "eval", "merge", "quantize", "info")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (default: those of the process) name; return the exit code.

    0, or 2 for a mistake in what was given, 1 for one of ours, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        return _dispatch(words)
    except UserError as error:
        return _failed(words, error, 2, str(error))
    except KeyboardInterrupt as error:
        return _failed(words, error, 130, "interrupted")
    except BrokenPipeError:
        # who read us has gone (`inlay info | head`); nothing more may be written, not even at exit
        sys.stdout = None
        return 0
    except OSError as error:
        # of the machine, not of the program: a folder that refuses, a network that is away
        where = f"{error.filename}: " if error.filename else ""
        return _failed(words, error, 2, f"{where}{error.strerror or error}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}\nThis is a mistake of inlay, not of yours"
        return _failed(words, error, 1, text)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours and no abbreviated options."""

    def __init__(self, prog: str, module: ModuleType) -> None:
        """Take the help from the docstring of the command's module."""
        summary, _, rest = (module.__doc__ or "").partition("\n")
        super().__init__(
            prog=prog,
            description=f"{summary}\n{rest}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("action", None, Once)
        self.register("action", "store", Once)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of ending the process."""
        options = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = nearest(unknown.split("=")[0], options) if unknown.startswith("--") else ""
        raise UserError(f"{message}.{hint} See {self.prog} --help")


class Once(argparse.Action):
    """Stores a value; a second one for the same option is an error, not the one that wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store `values`."""
        before = getattr(namespace, self.dest, self.default)
        if option_string and before != self.default and before != values:
            parser.error(f"{option_string} is given twice: {before!r} and {values!r}; keep one")
        setattr(namespace, self.dest, values)


def commands() -> list[str]:
    """Return the names of the commands, those of a run's life first."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    known = [name for name in ORDER if name in found]
    return known + [name for name in sorted(found) if name not in known]


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from inlay import __version__

        print(f"inlay {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in commands():
        hint = nearest(name, commands())
        raise UserError(f"there is no command {name!r}.{hint} There are {', '.join(commands())}")
    module = importlib.import_module(f"{__name__}.{name}")
    if hasattr(module, "main"):
        return int(module.main(rest))
    parser = Parser(f"inlay {name}", module)
    module.add_arguments(parser)
    try:
        arguments = parser.parse_args(rest)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    return int(module.run(arguments))


def _help() -> str:
    lines = ["inlay: parameter-efficient fine-tuning", "", "usage: inlay COMMAND ...", ""]
    for name in commands():
        module = importlib.import_module(f"{__name__}.{name}")
        lines.append(f"  {name:9}{(module.__doc__ or '').splitlines()[0]}")
    lines += ["", "inlay COMMAND --help tells more; inlay --version; docs/cli.md has all of it"]
    return "\n".join(lines)


def _failed(words: Sequence[str], error: BaseException, code: int, text: str) -> int:
    if "--debug" in words:
        import traceback

        traceback.print_exception(error)
    if "--json" in words:
        kind = {1: "bug", 2: "mistake", 130: "interrupted"}[code]
        line = {"event": "error", "kind": kind, "text": text, "code": code}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        hint = "" if code != 1 or "--debug" in words else "; --debug shows the traceback"
        print(f"error: {text}{hint}" if code != 130 else text, file=sys.stderr)
    return code
