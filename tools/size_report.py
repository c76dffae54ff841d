"""Name what has outgrown a sitting: files over 400 lines, functions over 60, method files over 150.

Run as `python tools/size_report.py [ROOT]`. A report, not a gate: it prints and exits with 0.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
METHOD_LINES = 150


def main() -> None:
    """Print one line for each outgrown thing under the root, and the totals."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    files = [
        path
        for part in ("inlay", "tests", "tools")
        for path in sorted(root.glob(f"{part}/**/*.py"))
    ]
    sizes = [(path, path.read_text(encoding="utf-8")) for path in files]
    findings = [line for path, text in sizes for line in outgrown(path.relative_to(root), text)]
    for line in findings:
        print(line)
    total = sum(text.count("\n") for _, text in sizes)
    print(f"size report: {len(files)} files, {total} lines, {len(findings)} to look at")


def outgrown(path: Path, text: str) -> Iterator[str]:
    r"""Yield one line for each limit that the file `path` with source `text` passes.

    >>> list(outgrown(Path("inlay/core/a.py"), "x = 1"))
    []
    >>> list(outgrown(Path("inlay/methods/a.py"), "x = 1\n" * 151))
    ['inlay/methods/a.py: 151 lines (methods: 150)']
    """
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines (files: {FILE_LINES})"
    elif "methods" in path.parts and path.parts[0] == "inlay" and lines > METHOD_LINES:
        yield f"{path}: {lines} lines (methods: {METHOD_LINES})"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                where = f"{path}:{node.lineno}: {node.name}"
                yield f"{where} has {length} lines (functions: {FUNCTION_LINES})"


if __name__ == "__main__":
    main()
