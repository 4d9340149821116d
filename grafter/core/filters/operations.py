"""What a filter's operators do at run time: as in Python, except that they never raise and never need much memory.

An operation without a result (an absent tag, a text where a number is needed, a division by zero) gives None, and a
test without one gives False. A filter can therefore be applied to any point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_NUMBER = (int, float)


def less(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return False
    try:
        return bool(left < right)
    except TypeError:  # a text and a number have no order
        return False


def less_equal(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return False
    try:
        return bool(left <= right)
    except TypeError:
        return False


def greater(left: Any, right: Any) -> bool:
    return less(right, left)


def greater_equal(left: Any, right: Any) -> bool:
    return less_equal(right, left)


def contains(container: Any, item: Any) -> bool:
    try:
        return item in container
    except TypeError:  # None and numbers contain nothing; a text contains only texts
        return False


def add(left: Any, right: Any) -> Any:
    """The sum of two numbers, or two texts joined."""
    if isinstance(left, _NUMBER) and isinstance(right, _NUMBER):
        try:
            return left + right
        except ArithmeticError:
            return None
    if isinstance(left, str) and isinstance(right, str):
        return left + right
    return None


def _of_numbers(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # Numbers only: `text * n` and `"%999999999d" % n` would let a filter fill the memory.
    def checked(left: Any, right: Any) -> Any:
        if isinstance(left, _NUMBER) and isinstance(right, _NUMBER):
            try:
                return operation(left, right)
            except ArithmeticError:  # division by zero, or an integer too large for a float
                return None
        return None

    return checked


subtract = _of_numbers(lambda left, right: left - right)
multiply = _of_numbers(lambda left, right: left * right)
divide = _of_numbers(lambda left, right: left / right)
floor_divide = _of_numbers(lambda left, right: left // right)
modulo = _of_numbers(lambda left, right: left % right)


def negative(value: Any) -> Any:
    return -value if isinstance(value, _NUMBER) else None


def positive(value: Any) -> Any:
    return +value if isinstance(value, _NUMBER) else None


def length(value: Any) -> int | None:
    return len(value) if isinstance(value, (str, tuple, list)) else None


def starts_with(value: Any, prefix: Any) -> bool:
    try:
        return isinstance(value, str) and value.startswith(prefix)
    except TypeError:
        return False


def ends_with(value: Any, suffix: Any) -> bool:
    try:
        return isinstance(value, str) and value.endswith(suffix)
    except TypeError:
        return False


# By the names that rewritten filters call.
OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (less, less_equal, greater, greater_equal, contains, add, negative, positive, length)
} | {
    "starts_with": starts_with,
    "ends_with": ends_with,
    "subtract": subtract,
    "multiply": multiply,
    "divide": divide,
    "floor_divide": floor_divide,
    "modulo": modulo,
}
