"""Do two small Python functions mean the same? Decided on their syntax trees; nothing is executed.

Two functions count as the same when they differ only in white space, in the names of their loop
variables and other locals, or in a loop variable that reuses the name of the list it walks over (the
list is evaluated once, so `for z in z` is sound). The function's name and its arguments must be the asked
ones. A function that means the same but is built differently counts as wrong: the figure is a lower bound.
"""

from __future__ import annotations

import ast

from trimtab.evaluation.skillset.base import unfenced


def same_function(answer: str, reference: str) -> bool:
    """True when `answer` is `reference` up to the names of locals; false for text that does not parse."""
    try:
        trees = [ast.parse(unfenced(text)) for text in (answer, reference)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _canonical(trees[0]) == _canonical(trees[1])


def _canonical(tree: ast.Module) -> str:
    return ast.dump(_Renamer().visit(tree))


class _Renamer(ast.NodeTransformer):
    """Gives every local variable the number of its first assignment; arguments keep their names."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.bound = 0

    def _bind(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = f"local {self.bound}"
            self.bound += 1

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id not in self.names:
                self._bind(target)
        node.targets = [self.visit(t) for t in node.targets]
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        node.iter = self.visit(node.iter)
        self._bind(node.target)
        node.target = self.visit(node.target)
        node.body = [self.visit(statement) for statement in node.body]
        node.orelse = [self.visit(statement) for statement in node.orelse]
        return node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        outer = dict(self.names)
        for generator in node.generators:
            generator.iter = self.visit(generator.iter)
            self._bind(generator.target)
            generator.target = self.visit(generator.target)
            generator.ifs = [self.visit(test) for test in generator.ifs]
        node.elt = self.visit(node.elt)
        self.names = outer
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(id=self.names.get(node.id, node.id), ctx=node.ctx)
