"""Every type that a public signature names can be imported from a public module, to annotate one's own code with."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyllava
from pyllava import types

PACKAGE = Path(pyllava.__file__).parent
PUBLIC = sorted(path.stem for path in PACKAGE.glob("[a-z]*.py"))


def names_in(annotation: ast.expr) -> Iterator[str]:
    """The names of an annotation, the last one of a dotted one; what stands in quotes is read, too."""
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            yield from names_in(ast.parse(annotation.value, mode="eval").body)
    elif isinstance(annotation, ast.Attribute):
        yield annotation.attr if ast.unparse(annotation.value) == "_lib" else ""
    elif isinstance(annotation, ast.Name):
        yield annotation.id
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return
    else:
        for part in ast.iter_child_nodes(annotation):
            if isinstance(part, ast.expr):
                yield from names_in(part)


def annotations_of(nodes: list[ast.stmt]) -> Iterator[ast.expr]:
    """Those of public functions, methods and fields."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from annotations_of(node.body)
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield node.annotation
            if ast.unparse(node.annotation) == "TypeAlias" and node.value is not None:
                yield node.value
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            arguments = node.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            given += [more for more in (arguments.vararg, arguments.kwarg) if more is not None]
            yield from (argument.annotation for argument in given if argument.annotation is not None)
            if node.returns is not None:
                yield node.returns


def private_sources(tree: ast.Module) -> dict[str, str]:
    """What a module imports from the package's private modules, and from which of them."""
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and (node.module or "").startswith("_")
        for alias in node.names
    }


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "types"])
def test_types_of_signatures_are_public(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    private = private_sources(tree)
    module = importlib.import_module(f"pyllava.{name}")
    public = {*pyllava.__all__, *types.__all__, *getattr(module, "__all__", ())}
    used = {word for annotation in annotations_of(tree.body) for word in names_in(annotation)}
    hidden = {word: private[word] for word in used & private.keys() if word not in public}
    assert not hidden


def test_the_module_of_types() -> None:
    assert types.__all__ == sorted(types.__all__)
    for name in types.__all__:
        assert getattr(types, name) is not None
        assert name not in pyllava.__all__ or getattr(types, name) is getattr(pyllava, name)
    assert importlib.import_module("pyllava.types") is pyllava.types
