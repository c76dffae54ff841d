"""A YAML recipe -> its values, each with the line it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inlay.config.given import Given
from inlay.config.schema import BLOCKS
from inlay.config.values import Loader
from inlay.core.errors import UserError, nearest


def read_recipe(path: str | Path) -> list[Given]:
    """Return the values of the recipe at `path`.

    Raises UserError, with the line where there is one: no such file, a folder, not UTF-8, broken
    YAML, a key that stands there twice, a tag other than YAML's plain ones, or nothing in it.
    """
    path = Path(path)
    root = _compose(_text(path), path)
    if root is None:
        raise UserError(f"{path}: the recipe is empty; it needs at least data: {{path: FILE}}")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{_at(path, root)}: a recipe is a mapping of keys to values, such as "
            "data: {path: chats.jsonl}"
        )
    _check_tag(root, path)
    found = []
    for key, value, where in _pairs(root, path):
        if key in BLOCKS and isinstance(value, yaml.MappingNode):
            _check_tag(value, path)
            found += [
                Given(f"{key}.{name}", _value(inner, path), at, folder=path.parent)
                for name, inner, at in _pairs(value, path)
            ]
        else:
            found.append(Given(key, _value(value, path), where, folder=path.parent))
    return found


def _text(path: Path) -> str:
    if path.is_dir():
        recipes = sorted(p.name for p in path.glob("*.y*ml"))[:5]
        hint = f"; it holds {', '.join(recipes)}" if recipes else ""
        raise UserError(f"{path}: this is a directory, not a recipe{hint}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, around)
        raise UserError(f"{path}: no such recipe.{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _compose(text: str, path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context or ""
        if problem.startswith("but ") and error.context:
            problem = f"{error.context}, {problem}"
        raise UserError(f"{path}{line}: broken YAML: {problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: broken YAML: {str(error).splitlines()[0]}") from None


def _pairs(node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield key, value and place ("recipe.yaml:3") of a mapping; UserError for a key twice."""
    seen: dict[str, str] = {}
    for key_node, value in node.value:
        where = _at(path, key_node)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not key or key == "<<":
            raise UserError(f"{where}: a key must be a name")
        if key in seen:
            raise UserError(f"{where}: {key!r} stands there twice, first at {seen[key]}; keep one")
        seen[key] = where
        yield key, value, where


def _check_tag(node: yaml.MappingNode, path: Path) -> None:
    """Raise UserError for a block that claims to be something other than a mapping."""
    if node.tag != Loader.DEFAULT_MAPPING_TAG:
        raise UserError(f"{_at(path, node)}: the tag {node.tag!r} is not read; plain YAML only")


def _value(node: yaml.Node, path: Path) -> Any:
    for inner in _walk(node):
        if isinstance(inner, yaml.MappingNode):
            list(_pairs(inner, path))  # the loader would take the last of two like keys
    loader = Loader("")
    try:
        return loader.construct_document(node)
    except (yaml.constructor.ConstructorError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{_at(path, node)}: {problem}; plain YAML values only") from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield `node` and all below it once; an anchor may make a graph of a tree."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        yield at
        if isinstance(at, yaml.MappingNode):
            waiting += [value for _, value in at.value]
        elif isinstance(at, yaml.SequenceNode):
            waiting += at.value


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"
