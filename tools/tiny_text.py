"""English text that every Python installation carries: its documentation (PSF license).

Two sources: `pydoc_data.topics`, which is the language reference in plain text, and the docstrings
of the standard library. Other versions of Python carry slightly other text.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from pathlib import Path

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}
HELD_OUT = 50
"""One document in so many is kept from training."""


def documents() -> tuple[list[str], list[str]]:
    """Return the documents to train on and those held out, in a fixed order, none twice."""
    from pydoc_data.topics import topics

    every = dict.fromkeys([*(topics[key].strip() for key in sorted(topics)), *_docstrings()])
    train, held_out = [], []
    for text in every:
        digest = hashlib.sha256(text.encode()).digest()
        (held_out if digest[0] * 256 + digest[1] < 65536 // HELD_OUT else train).append(text)
    return train, held_out


def common_words(texts: list[str], limit: int = 3000) -> list[str]:
    """Return the commonest lower-case words of three letters or more, commonest first."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,9}\b", text))
    return [word for word, _ in counts.most_common(limit)]


def _docstrings() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= 60 and text.isascii():
                    found.append(text)
    return found
