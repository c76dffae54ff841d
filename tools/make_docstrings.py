"""Docstrings of this Python's standard library as labeled rows: from which part is this one?

    python tools/make_docstrings.py FOLDER    ->    FOLDER/train.jsonl, dev.jsonl, test.jsonl

The sources are parsed and never imported. The sides are of docstrings, not of modules: half of what
a part has is often one large module's, so whole modules would leave too little to learn a topic
from. Texts that differ in no more than case, digits, spaces and punctuation count as one, and the
first place where one stands is taken.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PARTS = {
    "concurrency": (
        "asyncio multiprocessing concurrent threading queue subprocess sched selectors asyncore "
        "asynchat _threading_local contextlib"
    ),
    "desktop": "tkinter idlelib turtle turtledemo",
    "files": (
        "tarfile zipfile pathlib shutil tempfile os bz2 gzip lzma glob fnmatch _pyio fileinput "
        "filecmp posixpath ntpath genericpath _compression zipimport mmap dbm shelve sqlite3 "
        "pickle pickletools plistlib configparser csv netrc uu binhex wave aifc sunau chunk"
    ),
    "language": (
        "ast inspect dis importlib typing types enum tokenize symtable lib2to3 pkgutil opcode "
        "modulefinder pyclbr py_compile compileall code codeop copyreg copy abc runpy dataclasses "
        "functools operator collections _collections_abc weakref _weakrefset"
    ),
    "network": (
        "email http urllib xmlrpc wsgiref mailbox imaplib nntplib smtplib smtpd ftplib ssl cgi "
        "socketserver socket telnetlib poplib ipaddress mimetypes webbrowser cgitb mailcap"
    ),
    "numbers": (
        "_pydecimal decimal fractions statistics random numbers datetime calendar colorsys "
        "_strptime secrets hashlib hmac heapq bisect uuid"
    ),
    "packaging": "distutils ensurepip venv zipapp sysconfig site platform",
    "testing": (
        "unittest doctest pdb bdb trace traceback pydoc logging profile cProfile pstats timeit "
        "tracemalloc warnings cmd optparse argparse getopt"
    ),
    "text": (
        "xml html json string textwrap difflib encodings locale gettext codecs re sre_compile "
        "sre_parse stringprep base64 quopri shlex reprlib pprint"
    ),
}
"""Label -> the modules and packages whose docstrings have it."""
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
WORDS = 4
"""A shorter docstring says too little."""
SHARES = {"test": 0.2, "dev": 0.15}
"""Side -> its share of the docstrings; the rest trains."""


def main() -> None:
    """Write the three files, and say how many rows each has."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for side, rows in sides(list(docstrings(Path(sysconfig.get_path("stdlib"))))).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / side}.jsonl: {len(rows)} docstrings")


def docstrings(library: Path) -> Iterator[dict[str, str]]:
    """Yield {"text", "label", "module"} of every docstring below `library`, each once."""
    labels = {name: label for label, names in PARTS.items() for name in names.split()}
    seen = set()
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        label = labels.get(place.parts[0].removesuffix(".py"))
        if label is None or LEFT_OUT.intersection(place.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            text = ast.get_docstring(node)
            said = re.sub(r"[^a-z]+", " ", (text or "").lower()).strip()
            if text and len(said.split()) >= WORDS and said not in seen:
                seen.add(said)
                yield {"text": text, "label": label, "module": place.as_posix()}


def sides(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return side -> rows, in an order that hashes of the texts give."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
    found, at = {}, 0
    for side, share in SHARES.items():
        end = at + round(share * len(rows))
        found[side], at = ordered[at:end], end
    return {"train": ordered[at:], **found}


if __name__ == "__main__":
    main()
