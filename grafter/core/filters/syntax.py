"""The whitelist of filter syntax: allowed nodes of Python's grammar are rewritten, all others are faults.

    layer_id >= 2 and name.startswith('attn')
    ->  greater_equal(tags.get('layer_id'), 2) and starts_with(tags.get('name'), 'attn')

The result holds only constants, `tags.get(...)`, boolean operators, `==`, `is`, membership in literals, and calls of
compiled patterns and of the functions in `operations`. It is made here node by node, never copied from the text.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from typing import Any, cast

from grafter.core.filters.regular_expressions import MatchMethod, PatternError, compile_pattern

MAX_DEPTH = 100
_MAX_QUOTED = 60

FUNCTIONS = ("search", "match", "fullmatch", "len")
_ORDERINGS: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "add"),
    ast.Sub: ("-", "subtract"),
    ast.Mult: ("*", "multiply"),
    ast.Div: ("/", "divide"),
    ast.FloorDiv: ("//", "floor_divide"),
    ast.Mod: ("%", "modulo"),
}
_OTHER_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.BitAnd: ("&", "filters have no `&`; write `and`"),
    ast.BitOr: ("|", "filters have no `|`; write `or`"),
    ast.BitXor: ("^", "filters have no `^`; write `!=`"),
    ast.Pow: ("**", "filters have no powers"),
    ast.LShift: ("<<", "filters have no shifts"),
    ast.RShift: (">>", "filters have no shifts"),
    ast.MatMult: ("@", "filters have no `@`"),
}
_OTHER_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None", "nil": "None"}
_OTHER_NODES: dict[type[ast.AST], str] = {
    ast.Lambda: "filters have no functions of their own (`lambda`)",
    ast.IfExp: "filters have no `if ... else`; write `(a and b) or (not a and c)`",
    ast.NamedExpr: "filters assign nothing (`:=`); compare with `==`",
    ast.JoinedStr: "filters have no f-strings; write the text out, or join texts with `+`",
    ast.Subscript: "filters have no `[...]` after a value; a tag is its name alone, such as `layer_id`",
    ast.Dict: "filters have no dictionaries",
    ast.Set: "a set may only stand after `in`; write a tuple, such as `(3, 4)`",
    ast.Starred: "filters have no `*` before a value; write the values out",
}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# What is wrong with a name, as a text; None if it may be read.
NameCheck = Callable[[str], str | None]


class Fault(Exception):
    """Something that filters do not have. at: its node, or the index of its character in the text."""

    def __init__(self, message: str, at: ast.expr | int) -> None:
        super().__init__(message)
        self.message = message
        self.at = at


def index_of(text: str, line: int, byte_column: int) -> int:
    """The index in `text` of a position of `ast`, whose lines count from 1 and whose columns count bytes of UTF-8."""
    lines = text.split("\n")
    before = sum(len(skipped) + 1 for skipped in lines[: line - 1])
    return before + len(lines[line - 1].encode()[:byte_column].decode(errors="ignore"))


class Rewriter:
    """Rewrites one expression. names: the tags that it reads. functions: its compiled patterns."""

    def __init__(self, text: str, check_name: NameCheck | None = None) -> None:
        self._text = text
        self._check_name = check_name
        self._temporaries = 0
        self.names: set[str] = set()
        self.functions: dict[str, Callable[..., Any]] = {}
        self._rules: dict[type[ast.AST], Callable[[Any, int], ast.expr]] = {
            ast.Constant: self._constant,
            ast.Name: self._tag,
            ast.BoolOp: self._boolean,
            ast.UnaryOp: self._unary,
            ast.BinOp: self._arithmetic,
            ast.Compare: self._comparison,
            ast.Tuple: self._sequence,
            ast.List: self._sequence,
            ast.Call: self._call,
            ast.Attribute: self._attribute,
        }

    def rewrite_condition(self, node: ast.expr, depth: int = 0) -> ast.expr:
        """As `rewrite`, for a value that is used as true or false: there a text or number is always a mistake."""
        if isinstance(node, ast.Constant) and type(node.value) in (str, int, float):
            written = self._written(node)
            tag = "name" if isinstance(node.value, str) else "layer_id"
            raise Fault(f"{written} alone is true or false for every point; write `{tag} == {written}`", node)
        return self.rewrite(node, depth)

    def rewrite(self, node: ast.expr, depth: int = 0) -> ast.expr:
        """The safe form of `node`. Raises Fault at the first thing that filters do not have."""
        if depth > MAX_DEPTH:
            raise Fault(f"the expression is nested more than {MAX_DEPTH} deep; write `x in (...)`, or simplify", node)
        rule = self._rules.get(type(node))
        if rule is not None:
            return rule(node, depth + 1)
        if isinstance(node, _COMPREHENSIONS):
            raise Fault("filters have no loops (`for`)", node)
        raise Fault(_OTHER_NODES.get(type(node), f"filters have no {type(node).__name__.lower()}"), node)

    def _written(self, node: ast.expr) -> str:
        """The node as it was written, shortened if it is long."""
        written = ast.get_source_segment(self._text, node) or ast.unparse(node)
        return written if len(written) <= _MAX_QUOTED else written[:_MAX_QUOTED] + "..."

    def _constant(self, node: ast.Constant, depth: int) -> ast.expr:
        if node.value is not None and type(node.value) not in (str, int, float, bool):
            raise Fault("filters know texts, whole numbers, decimal numbers, True, False and None", node)
        return ast.Constant(node.value)

    def _tag(self, node: ast.Name, depth: int) -> ast.expr:
        if node.id in FUNCTIONS:
            raise Fault(f"`{node.id}` is a function; write `{_usage(node.id)}`", node)
        if node.id.startswith("__"):
            raise Fault("no tag's name starts with `__`", node)
        if node.id.lower() in _OTHER_WORDS:
            raise Fault(f"`{node.id}` would be a tag; write `{_OTHER_WORDS[node.id.lower()]}`", node)
        complaint = self._check_name(node.id) if self._check_name is not None else None
        if complaint is not None:
            raise Fault(complaint, node)
        self.names.add(node.id)
        method = ast.Attribute(ast.Name("tags", ast.Load()), "get", ast.Load())
        return ast.Call(method, [ast.Constant(node.id)], [])

    def _boolean(self, node: ast.BoolOp, depth: int) -> ast.expr:
        return ast.BoolOp(node.op, [self.rewrite_condition(value, depth) for value in node.values])

    def _unary(self, node: ast.UnaryOp, depth: int) -> ast.expr:
        if isinstance(node.op, ast.Not):
            return ast.UnaryOp(ast.Not(), self.rewrite_condition(node.operand, depth))
        if isinstance(node.op, ast.Invert):
            raise Fault("filters have no `~`; write `not`", node)
        is_minus = isinstance(node.op, ast.USub)
        operand = node.operand
        if isinstance(operand, ast.Constant) and type(operand.value) in (int, float):
            return ast.Constant(-operand.value if is_minus else operand.value)  # type: ignore[operator]
        return _call("negative" if is_minus else "positive", self._operand(operand, "-" if is_minus else "+", depth))

    def _arithmetic(self, node: ast.BinOp, depth: int) -> ast.expr:
        if type(node.op) in _OTHER_OPERATORS:
            symbol, message = _OTHER_OPERATORS[type(node.op)]
            raise Fault(message, self._index_of_operator(node, symbol))
        symbol, operation = _ARITHMETIC[type(node.op)]
        return _call(operation, *(self._operand(side, symbol, depth) for side in (node.left, node.right)))

    def _operand(self, node: ast.expr, symbol: str, depth: int) -> ast.expr:
        if isinstance(node, ast.Tuple | ast.List):
            raise Fault(f"`{symbol}` takes numbers, not a sequence", node)
        if symbol != "+" and isinstance(node, ast.Constant) and isinstance(node.value, str):
            raise Fault(f"`{symbol}` takes numbers, not a text", node)
        return self.rewrite(node, depth)

    def _index_of_operator(self, node: ast.BinOp, symbol: str) -> int:
        # There are only brackets, blanks and the operator between two operands.
        end = index_of(self._text, node.left.end_lineno or 1, node.left.end_col_offset or 0)
        return self._text.find(symbol, end)

    def _sequence(self, node: ast.Tuple | ast.List, depth: int) -> ast.expr:
        return type(node)([self.rewrite(item, depth) for item in node.elts], ast.Load())

    def _comparison(self, node: ast.Compare, depth: int) -> ast.expr:
        links: list[ast.expr] = []
        left_node, left = node.left, self.rewrite(node.left, depth)
        for position, (op, right_node) in enumerate(zip(node.ops, node.comparators, strict=True)):
            is_last = position == len(node.ops) - 1
            right = self._right_side(op, right_node, is_last, depth)
            next_left = right
            if not is_last and not isinstance(right, ast.Constant):
                # `a < b < c` evaluates b once. Without a temporary, nested chains would also double at each level.
                self._temporaries += 1
                name = f"middle{self._temporaries}"
                right = ast.NamedExpr(ast.Name(name, ast.Store()), right)
                next_left = ast.Name(name, ast.Load())
            links.append(self._link(op, left_node, left, right_node, right))
            left_node, left = right_node, next_left
        return links[0] if len(links) == 1 else ast.BoolOp(ast.And(), links)

    def _right_side(self, op: ast.cmpop, node: ast.expr, is_last: bool, depth: int) -> ast.expr:
        if isinstance(op, ast.In | ast.NotIn) and is_last and isinstance(node, ast.Set):
            return ast.Tuple([self.rewrite(item, depth) for item in node.elts], ast.Load())
        return self.rewrite(node, depth)

    def _link(
        self, op: ast.cmpop, left_node: ast.expr, left: ast.expr, right_node: ast.expr, right: ast.expr
    ) -> ast.expr:
        if type(op) in _ORDERINGS:
            return _call(_ORDERINGS[type(op)], left, right)
        if isinstance(op, ast.In | ast.NotIn) and not isinstance(right, ast.Tuple | ast.List):
            found = _call("contains", right, left)
            return ast.UnaryOp(ast.Not(), found) if isinstance(op, ast.NotIn) else found
        if isinstance(op, ast.Is | ast.IsNot) and not (_is_singleton(left_node) or _is_singleton(right_node)):
            # Whether two equal numbers or texts are one object depends on the interpreter.
            word, instead = ("is", "==") if isinstance(op, ast.Is) else ("is not", "!=")
            raise Fault(f"`{word}` is for None, True and False; write `{instead}`", right_node)
        return ast.Compare(left, [op], [right])

    def _call(self, node: ast.Call, depth: int) -> ast.expr:
        if node.keywords:
            raise Fault("filters have no named arguments; write the values alone", node.keywords[0].value)
        if isinstance(node.func, ast.Name):
            return self._function(node.func, node.args, depth)
        if isinstance(node.func, ast.Attribute):
            return self._method(node.func, node.args, depth)
        raise Fault(f"this cannot be called; filters have {', '.join(FUNCTIONS)}, .startswith and .endswith", node)

    def _function(self, function: ast.Name, arguments: list[ast.expr], depth: int) -> ast.expr:
        name = function.id
        if name not in FUNCTIONS:
            near = difflib.get_close_matches(name, FUNCTIONS, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; they have {', '.join(FUNCTIONS)}"
            if name in ("startswith", "endswith"):
                hint = f"; write `name.{name}('x')`"
            raise Fault(f"filters have no function `{name}`{hint}", function)
        if len(arguments) != (1 if name == "len" else 2):
            raise Fault(f"`{name}` is written `{_usage(name)}`", function)
        if name == "len":
            return _call("length", self.rewrite(arguments[0], depth))
        subject = self.rewrite(arguments[1], depth)
        return _call(self._pattern(cast(MatchMethod, name), arguments[0]), subject)

    def _pattern(self, method: MatchMethod, node: ast.expr) -> str:
        """Compile a regular expression, and return the name of its function."""
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            raise Fault(f"the pattern must be a text in quotes: `{_usage(method)}`", node)
        try:
            function = compile_pattern(node.value, method)
        except PatternError as error:
            raise Fault(error.message, self._place_in_text(node, error.at)) from None
        name = f"pattern{len(self.functions)}"
        self.functions[name] = function
        return name

    def _place_in_text(self, node: ast.Constant, index: int | None) -> ast.expr | int:
        """The index in the filter of the character at `index` of a quoted text; its node if escapes hide that."""
        written = ast.get_source_segment(self._text, node) or ""
        start = written.find(str(node.value))
        if index is None or start < 0:
            return node
        return index_of(self._text, node.lineno, node.col_offset) + start + index

    def _method(self, function: ast.Attribute, arguments: list[ast.expr], depth: int) -> ast.expr:
        operation = {"startswith": "starts_with", "endswith": "ends_with"}.get(function.attr)
        if operation is None:
            raise Fault(self._method_hint(function, arguments), _index_after(self._text, function))
        if len(arguments) != 1:
            raise Fault(f"`{function.attr}` takes one text, or a tuple of texts", _index_after(self._text, function))
        prefix = arguments[0]
        if isinstance(prefix, ast.List):
            prefix = ast.Tuple(prefix.elts, ast.Load())
        return _call(operation, self.rewrite(function.value, depth), self.rewrite(prefix, depth))

    def _method_hint(self, function: ast.Attribute, arguments: list[ast.expr]) -> str:
        receiver = self._written(function.value)
        first = self._written(arguments[0]) if arguments else "'x'"
        message = f"filters have no `.{function.attr}`"
        if receiver == "re" and function.attr in FUNCTIONS:
            return f"filters have no modules; write `{_usage(function.attr)}`"
        if function.attr in FUNCTIONS or function.attr == "matches":
            return f"{message}; write `search({first}, {receiver})`"
        if function.attr in ("contains", "includes", "find", "index", "count", "has"):
            return f"{message}; write `{first} in {receiver}`"
        if function.attr in ("lower", "upper", "casefold"):
            return f"{message}; ignore case with `search(r'(?i)...', {receiver})`"
        near = difflib.get_close_matches(function.attr.replace("_", "").lower(), ("startswith", "endswith"), n=1)
        return f"{message}; did you mean `.{near[0]}`?" if near else f"{message}; they have .startswith and .endswith"

    def _attribute(self, node: ast.Attribute, depth: int) -> ast.expr:
        at = _index_after(self._text, node)
        if node.attr in ("startswith", "endswith"):
            raise Fault(f"`{node.attr}` is written `name.{node.attr}('x')`", at)
        if node.attr.startswith("__"):
            raise Fault("filters have no attributes", at)
        raise Fault(f"filters have no attributes; a tag is its name alone: `{node.attr}`", at)


def _call(function: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


def _is_singleton(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _usage(function: str) -> str:
    return "len(name)" if function == "len" else f"{function}(r'attn.*', name)"


def _index_after(text: str, node: ast.Attribute) -> int:
    """The index of the dot of `value.attr`."""
    end = index_of(text, node.value.end_lineno or 1, node.value.end_col_offset or 0)
    return text.find(".", end)
