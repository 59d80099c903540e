"""Expressions of `--filter`: one line of comparisons and arithmetic over an image's columns.

Evaluated by simpleeval, which walks the syntax tree; of what it knows only the nodes, operators and functions below are left. No
attribute, no index, no power, no text longer than what it is made of.
"""

import ast
import difflib
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from simpleeval import EvalWithCompoundTypes

from shards.errors import BadRequest

Value: TypeAlias = int | float | str

MAX_CHARS, MAX_DEPTH = 1000, 50
"""Longest expression, deepest nesting: within these no expression costs a worker more than about a millisecond an image."""


def _of_numbers(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses texts, which `*` and `%` could make arbitrarily long."""

    def checked(*operands: Any) -> Any:
        if not all(isinstance(operand, int | float) for operand in operands):
            raise TypeError("arithmetic is for numbers")
        return operation(*operands)

    return checked


def _of_one_kind(operation: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Refuses to compare a text with a number, which Python calls unequal."""

    def checked(left: Any, right: Any) -> bool:
        if isinstance(left, str) != isinstance(right, str):
            raise TypeError("a text is compared with a number")
        return operation(left, right)

    return checked


_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: _of_numbers(operator.add),
    ast.Sub: _of_numbers(operator.sub),
    ast.Mult: _of_numbers(operator.mul),
    ast.Div: _of_numbers(operator.truediv),
    ast.Mod: _of_numbers(operator.mod),
    ast.USub: _of_numbers(operator.neg),
    ast.UAdd: _of_numbers(operator.pos),
    ast.Not: operator.not_,
    ast.Eq: _of_one_kind(operator.eq),
    ast.NotEq: _of_one_kind(operator.ne),
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, members: item in members,
    ast.NotIn: lambda item, members: item not in members,
}
_NODES = (
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.Call,
    ast.Name,
    ast.Constant,
    ast.Tuple,
    ast.List,
)
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "lower": str.lower,
    "startswith": str.startswith,
    "endswith": str.endswith,
}


class Expression:
    """A parsed expression that is true or false of an image."""

    def __init__(self, text: str, columns: Mapping[str, Value]) -> None:
        """`columns` are an example: their names are those that may be used, their values show whether like is compared with like.

        Raises BadRequest, one line.
        """
        self.text = text
        try:
            self._tree = _parse(text, columns)
            self._evaluator = _evaluator()
            self._try(columns)
        except _Unfit as error:
            raise BadRequest(f"--filter {_cut(text)!r}: {error}") from error

    def holds(self, columns: Mapping[str, Value]) -> bool:
        """Raises ArithmeticError or ValueError where these values cannot be computed with, as in a division by zero."""
        self._evaluator.names = columns
        return bool(self._evaluator.eval(self.text, self._tree))

    def _try(self, columns: Mapping[str, Value]) -> None:
        """Every part is evaluated by itself, since a part may hide behind an `and` that ends early."""
        self._evaluator.names = columns
        called = {id(node.func) for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        for node in reversed(list(ast.walk(self._tree))):
            if not isinstance(node, ast.expr) or id(node) in called:
                continue
            try:
                value = self._evaluator.eval(self.text, node)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise _Unfit(f"{_shown(node)} cannot be computed ({error})") from error
            operands = (
                node.values
                if isinstance(node, ast.BoolOp)
                else [node.operand]
                if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
                else []
            )
            for operand in operands:
                _require_truth(operand, self._evaluator.eval(self.text, operand))
        _require_truth(self._tree, value)


class _Unfit(Exception):
    """Why an expression is refused."""


def _require_truth(node: ast.expr, value: Any) -> None:
    if not isinstance(value, bool):
        raise _Unfit(f"{_shown(node)} is neither true nor false; compare it, as in `side >= 256`")


def _parse(text: str, columns: Mapping[str, Value]) -> ast.expr:
    if len(text) > MAX_CHARS:
        raise _Unfit(f"{len(text)} characters, at most {MAX_CHARS} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, SyntaxWarning, DeprecationWarning, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise _Unfit(f"cannot be read ({reason}); as in `side >= 256 and aspect < 3`") from error
    level, depth = [tree], 0
    while level:
        depth += 1
        for node in level:
            _check(node, columns)
        level = [child for node in level for child in _parts(node)]
        if depth > MAX_DEPTH:
            raise _Unfit(f"nested more than {MAX_DEPTH} deep")
    return tree


def _parts(node: ast.expr) -> list[ast.expr]:
    """The expressions within one, without the name of a function."""
    parts = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    return [part for part in parts if isinstance(part, ast.expr)]


def _check(node: ast.expr, columns: Mapping[str, Value]) -> None:
    operators: list[ast.AST] = [*node.ops] if isinstance(node, ast.Compare) else []
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        operators = [node.op]
    known = isinstance(node, _NODES) and all(type(each) in _OPERATORS for each in operators)
    if isinstance(node, ast.Constant):
        known = isinstance(node.value, int | float | str)
    if not known:
        raise _Unfit(
            f"{_shown(node)} is not allowed; comparisons, + - * / %, and, or, not, in, and the functions {_listed(FUNCTIONS)} are"
        )
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords:
            raise _Unfit(f"{_shown(node)} is not allowed; the functions are {_listed(FUNCTIONS)}")
    elif isinstance(node, ast.Name) and node.id not in columns:
        close = difflib.get_close_matches(node.id, columns, 1)
        hint = f"did you mean {close[0]}?" if close else f"the columns are {_listed(columns)}"
        raise _Unfit(f"no column {node.id}; {hint}")


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _shown(node: ast.expr) -> str:
    return f"`{_cut(ast.unparse(node))}`"


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def _evaluator() -> EvalWithCompoundTypes:
    evaluator = EvalWithCompoundTypes()
    evaluator.nodes = {kind: evaluator.nodes[kind] for kind in _NODES}
    evaluator.operators, evaluator.functions = dict(_OPERATORS), dict(FUNCTIONS)
    return evaluator
