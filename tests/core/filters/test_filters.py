"""The filter language: what it means, what it refuses and how, and that it reaches nothing."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import types
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.core.filters.expression import MAX_LENGTH, Filter, parse_filter
from grafter.errors import FilterError

DOCS = Path(__file__).parents[3] / "docs" / "filters.md"


def parse(source: str) -> Filter:
    return parse_filter(source, setting="GRAFTER_B2T_FILTER")


def matches(source: str, **tags: Any) -> bool:
    return parse(source)(tags)


def fault(source: str) -> str:
    with pytest.raises(FilterError) as raised:
        parse(source)
    return str(raised.value)


# ---- what expressions mean


@pytest.mark.parametrize(
    ("source", "tags", "expected"),
    [
        ("layer_id is None and name == 'x'", {"name": "x"}, True),
        ("layer_id is None and name == 'x'", {"name": "x", "layer_id": 0}, False),
        ("search(r'attn.*', name) is not None", {"name": "self_attn_out"}, True),
        ("search(r'attn.*', name) is not None", {"name": "mlp"}, False),
        ("match('attn', name)", {"name": "self_attn"}, False),
        ("fullmatch('attn', name)", {"name": "attn_out"}, False),
        ("search('(?i)ATTN', name)", {"name": "attn"}, True),
        (r"search('layers\.\d+', name)", {"name": "layers.3"}, True),
        ("name.startswith('attn')", {"name": "attn_out"}, True),
        ("name.endswith(('in', 'out'))", {"name": "attn_out"}, True),
        ("name.endswith(['in', 'out'])", {"name": "attn_out"}, True),
        ("layer_id in (3, 4) and step >= 2", {"layer_id": 4, "step": 2}, True),
        ("layer_id in (3, 4) and step >= 2", {"layer_id": 4, "step": 1}, False),
        ("layer_id in {3, 4}", {"layer_id": 4}, True),
        ("layer_id not in [3, 4]", {"layer_id": 5}, True),
        ("'attn' in name", {"name": "self_attn"}, True),
        ("1 <= layer_id < 8", {"layer_id": 8}, False),
        ("1 <= layer_id + 1 < 9 != step", {"layer_id": 7, "step": 3}, True),
        ("layer_id % 4 == 0", {"layer_id": 8}, True),
        ("layer_id == -1", {"layer_id": -1}, True),
        ("prefix + '_out' == name", {"name": "a_out", "prefix": "a"}, True),
        ("len(name) > 3", {"name": "abcd"}, True),
        ("flag is True", {"flag": True}, True),
        ("flag", {"flag": 0}, False),
        ("True", {}, True),
        ("layer_id == 3\n  or layer_id == 4", {"layer_id": 4}, True),
        ("layer_id == 3 or \\\r\n layer_id == 4", {"layer_id": 4}, True),
        ("  name == '#1 a\\\n&& b'  ", {"name": "#1 a&& b"}, True),
    ],
)
def test_an_expression_means_what_it_means_in_python(source: str, tags: dict[str, Any], expected: bool) -> None:
    """Each operator and function does what Python's does."""
    assert matches(source, **tags) is expected


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">="])
@pytest.mark.parametrize("tags", [{}, {"layer_id": None}, {"layer_id": "3"}])
def test_an_ordering_that_has_no_answer_is_false(operator: str, tags: dict[str, Any]) -> None:
    """Ordering with an absent tag, None, or a text against a number is false on either side, and never raises."""
    assert matches(f"layer_id {operator} 3", **tags) is False
    assert matches(f"3 {operator} layer_id", **tags) is False
    assert matches(f"1 {operator} layer_id {operator} 3", **tags) is False


@pytest.mark.parametrize(
    "operation",
    [
        "x + 1",
        "x - 1",
        "x * 2",
        "x / 2",
        "x // 2",
        "x % 2",
        "-x",
        "+x",
        "len(x)",
        "y / 0",
        "y // 0",
        "y % 0",
        "name - 1",
    ]
    + ["name * 1000000000", "name % y", "name + 1", f"{10**400} / 3", "search('a', x)", "match('a', y)"],
)
def test_an_operation_that_has_no_answer_is_none(operation: str) -> None:
    """Arithmetic with None or a text, divisions by zero and searches in no text give None."""
    assert matches(f"({operation}) is None", y=3, name="x") is True


@pytest.mark.parametrize("source", ["'a' in x", "1 in y", "1 in name", "x.startswith('a')", "y.endswith('3')"])
def test_a_test_that_has_no_answer_is_false(source: str) -> None:
    """Membership in None or a number, and text tests of what is no text, are false; their negation is true."""
    assert matches(source, y=3, name="x") is False
    assert matches(f"not ({source})", y=3, name="x") is True


def test_names_are_the_tags_that_are_read() -> None:
    """`names` has every tag of the expression and no function."""
    assert parse("search('a', name) and layer_id in (first, 3) or not step").names == {
        "name",
        "layer_id",
        "first",
        "step",
    }


def test_a_filter_is_immutable_and_survives_pickling_by_being_parsed_again() -> None:
    """A filter cannot be changed; its copy from another process is equal and works."""
    original = parse("layer_id == 3 and search('a', name)")
    with pytest.raises(FrozenInstanceError):
        original.source = "True"  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(original))
    assert copy == original
    assert copy({"layer_id": 3, "name": "a"}) is True


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("source", "column", "words"),
    [
        ("layer_id = 3", 10, "`==`"),
        ("a == 1 && b == 2", 8, "`and`"),
        ("a == 1 || b == 2", 8, "`or`"),
        ("!a", 1, "`not`"),
        ("a === 1", 3, "`==`"),
        ("a <> 1", 3, "`!=`"),
        ("a => 1", 3, "`>=`"),
        ("a == 1 AND b == 2", 8, "`and`"),
        ("x := 3", 3, "compare with `==`"),
        ("(x := 3)", 2, "compare with `==`"),
        ("(a == 1) & (b == 2)", 10, "`and`"),
        ("a == 1 or (b | c)", 14, "`or`"),
        ("~a", 1, "`not`"),
        ("'é' == x and x ** 2", 16, "no powers"),
        ("1 << x", 3, "no shifts"),
        ("name.contains('x')", 5, "`'x' in name`"),
        ("name.lower() == 'x'", 5, "(?i)"),
        ("name.starts_with('x')", 5, "`.startswith`"),
        ("name.startswith", 5, "name.startswith('x')"),
        ("startswith(name, 'x')", 1, "name.startswith('x')"),
        ("re.search('a', name)", 3, "write `search("),
        ("name.match('a')", 5, "`search('a', name)`"),
        ("tags.layer_id == 3", 5, "`layer_id`"),
        ("name.__class__", 5, "no attributes"),
        ("tags['layer_id'] == 3", 1, "name alone"),
        ("f'{x}' == name", 1, "f-strings"),
        ("lambda: 3", 1, "lambda"),
        ("[a for a in b]", 1, "loops"),
        ("any(a for a in b)", 1, "no function `any`"),
        ("__import__('os')", 1, "no function `__import__`"),
        ("eval ('1')", 1, "no function `eval`"),
        ("serch('a', name)", 1, "did you mean `search`?"),
        ("__builtins__", 1, "`__`"),
        ("a if b else c", 1, "`if ... else`"),
        ("{1: 2} == x", 1, "dictionaries"),
        ("{1, 2} == x", 1, "tuple"),
        ("x == (1, *y)", 10, "write the values out"),
        ("3j == x", 1, "decimal numbers"),
        ("b'a' == x", 1, "texts"),
        ("layer_id is 3", 13, "`==`"),
        ("layer_id is not 'a'", 17, "`!=`"),
        ("flag == true", 9, "`True`"),
        ("x == null", 6, "`None`"),
        ("name == 'a' or 'b'", 16, "`name == 'b'`"),
        ("layer_id == 3 or 4", 18, "`layer_id == 4`"),
        ("'attn'", 1, "every point"),
        ("search", 1, "is a function"),
        ("search('a')", 1, "is written"),
        ("search(name, 'a')", 8, "text in quotes"),
        ("search(pattern='a', string=name)", 16, "named arguments"),
        ("search('(', name)", 8, "missing )"),
        ("search('a{99999999999999999999}', name)", 10, "at most 1000 times"),
        ("'a' * 1000000000 == x", 1, "takes numbers"),
        ("'%1000000000d' % 3 == x", 1, "takes numbers"),
        ("(1, 2) * 1000000000 == x", 1, "not a sequence"),
        ("a ==", 5, "missing at the end"),
        ("(a == 1", 1, "never closed"),
        ("name == 'a", 9, "unterminated"),
        ("a b", 3, "not an expression"),
        ("", 1, "empty"),
        ("a == 1 # why", 8, "comments"),
        ("a == \0", 6, "NUL"),
        ("a == '\ud800'", 1, "cannot be read"),
        ("'''a\r\rb''' == (x ** 2)", 18, "no powers"),
    ],
)
def test_a_fault_is_shown_where_it_stands_with_a_way_out(source: str, column: int, words: str) -> None:
    """The message names the setting, says what to write, and has a caret under the fault."""
    message = fault(source)
    head, shown, caret = message.split("\n")
    assert head.startswith("GRAFTER_B2T_FILTER: ")
    assert words in head
    assert f"(column {column}):" in head
    assert caret == " " * (4 + column - 1) + "^"
    assert shown.startswith("    ")


def test_a_long_filter_is_shown_around_its_fault() -> None:
    """Only the part around the fault is printed, with the caret still under it."""
    message = fault("a" * 300 + " = " + "b" * 300)
    _, shown, caret = message.split("\n")
    assert len(shown) < 130
    assert len(fault(f"{'x' * 3000}.contains({'y' * 3000})")) < 400
    assert shown[caret.index("^")] == "="


def test_length_and_depth_are_bounded() -> None:
    """Too long or too deep an expression is a FilterError, whichever part of the parser would have given up."""
    assert f"{MAX_LENGTH} are allowed" in fault("a" * (MAX_LENGTH + 1))
    for source in ("-" * 9000 + "a", "+".join("a" * 4000), "(" * 500 + "a" + ")" * 500, "not " * 150 + "a"):
        assert re.search("nested", fault(source))
    assert matches(" or ".join(f"layer_id == {layer}" for layer in range(500)), layer_id=499)


def test_nested_chains_do_not_double_at_each_level() -> None:
    """A chain evaluates its middle once, so that fifty nested chains compile to a small function."""
    source = "x"
    for _ in range(50):
        source = f"(0 < {source} < 2)"
    compiled = parse(source)
    assert compiled({"x": 1}) is True
    assert isinstance(compiled.matches, types.FunctionType)
    assert len(compiled.matches.__code__.co_code) < 20_000


def test_a_compiled_filter_has_no_builtins_and_calls_nothing_but_its_operations() -> None:
    """What is compiled has only the filter's operations as globals, and reads tags by `get` alone."""
    function = parse("search('a', name) and x + 1 < 3 and name.startswith('b')").matches
    assert isinstance(function, types.FunctionType)
    assert function.__globals__["__builtins__"] == {}
    assert set(function.__code__.co_names) == {"get", "pattern0", "less", "add", "starts_with"}


def test_the_language_needs_no_pydantic() -> None:
    """Filters and the switch can be imported before anything says that grafting is on."""
    program = (
        "import sys, grafter.core.filters.expression, grafter.config.switch; "
        "print({'pydantic', 'ruamel.yaml'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_every_filter_in_the_docs_parses() -> None:
    """docs/filters.md shows only filters that work."""
    (block,) = re.findall(r"```filter\n(.*?)```", DOCS.read_text(), re.DOTALL)
    sources = block.strip().splitlines()
    assert len(sources) >= 10
    assert [parse(source).source for source in sources] == sources


# ---- regular expressions


@pytest.mark.parametrize(
    ("pattern", "fragment", "words"),
    [
        (r"a(?=b)", "(?=", "no lookaheads (`(?=`); write two tests"),
        (r"a(?!b)", "(?!", "no lookaheads (`(?!`); write two tests"),
        (r"(?<=a)b", "(?<=", "no lookbehinds (`(?<=`); write two tests"),
        (r"(?<!a)b", "(?<!", "no lookbehinds (`(?<!`); write two tests"),
        (r"\(?=[(?=]x(?=b)", "(?=b)", "no lookaheads"),
        (r"(a)\1", r"\1", "no backreferences"),
        (r"(?P<x>a)-(?P=x)", "(?P=", "no backreferences"),
        (r"(a)?(?(1)b|c)", "(?(", "no conditions"),
        (r"(?>a+)b", "(?>", "no atomic groups (`(?>`); leave it out"),
        (r"a++b", "++", "no possessive repetitions (`++`); leave it out"),
        (r"a*+b", "*+", "no possessive repetitions"),
        (r"a{2}+b", "{2}+", "no possessive repetitions"),
        (r"a(?#why)", "(?#", "no comments"),
        (r"(?x) a b", "(?x", "`(?i)`, `(?m)` and `(?s)`"),
        (r"(?a)b", "(?a", "`(?i)`, `(?m)` and `(?s)`"),
        (r"a\Z", r"\Z", r"write `\z`, or use `fullmatch`"),
        (r"\u00e9", r"\u", r"`\x{e9}`"),
        (r"\N{DASH}", r"\N", r"`\x{e9}`"),
        (r"ab{,3}", "{,3}", "write `{0,3}`"),
        (r"ab{,}", "{,}", "write `{0,}`"),
        (r"a{1001}", "{1001}", "at most 1000 times"),
        (r"a{1,99999999999999999999}", "{1,9", "at most 1000 times"),
    ],
)
def test_what_linear_time_has_not_is_refused_where_it_stands(pattern: str, fragment: str, words: str) -> None:
    """A pattern that RE2 lacks, or reads otherwise than Python, is refused at its place with what to write instead."""
    source = f"layer_id == 3 and search(r'{pattern}', name)"
    message = fault(source)
    assert words in message
    assert f"(column {source.index(fragment) + 1}):" in message


def test_a_pattern_that_would_grow_without_bound_is_refused() -> None:
    """Nested repetitions, and patterns that need more than a bounded memory, are refused, and not compiled."""
    assert "repeat less" in fault("search('((a{100}){100}){100}', name)")
    assert "repeat less" in fault(r"search('" + r"(\\pL|x){900}" * 40 + "', name)")


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(a*)*b", r"(.*a){20}b", r"([a-z]+\.?)*\d"])
@pytest.mark.parametrize("method", ["search", "match", "fullmatch"])
def test_no_pattern_takes_exponential_time(method: str, pattern: str) -> None:
    """Patterns that would keep Python's `re` busy for years are answered on a name of ten thousand characters."""
    assert matches(f"{method}(r'{pattern}', name)", name="a" * 10_000 + "!") is False


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"a$", "a\n", False),
        (r"a\z", "a", True),
        (r"\d", "٣", False),
        (r"\p{Nd}", "٣", True),
        (r"(?i)É", "é", True),
        (r"^.é.$", "xéy", True),
        (r"(?s)a.b", "a\nb", True),
        (r"(?m)^b$", "a\nb\nc", True),
        (r"{}", "a{}", True),
        (r"[{,3}]", "3", True),
        (r"\{,3}", "{,3}", True),
    ],
)
def test_the_documented_differences_from_re(pattern: str, text: str, expected: bool) -> None:
    """`$`, classes and Unicode are as docs/filters.md says; braces that repeat nothing are text."""
    assert matches(f"search(r'{pattern}', name)", name=text) is expected


def test_a_lone_surrogate_is_met_and_never_raised() -> None:
    """A text that UTF-8 cannot hold is searched, and in a pattern it is a fault."""
    assert matches("search('^a.c$', name)", name="a\ud800c") is True
    assert "cannot be encoded" in fault(r"search('a\ud800', name)")


def test_results_are_remembered_within_a_bound_and_texts_told_apart() -> None:
    """Ten thousand names, each met twice in another order, are each answered right."""
    compiled = parse(r"search(r'\.[0-9]*7\.', name)")
    names = [f"layers.{number}.mlp" for number in range(10_000)]
    for name in names + names[::-1]:
        assert compiled({"name": name}) is ("7." in name)


def test_re2_is_imported_only_by_a_filter_with_a_pattern() -> None:
    """Filters without patterns need no google-re2; one with a pattern says which Python lacks it."""
    program = (
        "import sys; sys.modules['re2'] = None\n"
        "from grafter.core.filters.expression import parse_filter\n"
        "print(parse_filter(\"'a' in name and name.endswith('b')\", setting='S')({'name': 'ab'}))\n"
        "try: parse_filter(\"search('a', name)\", setting='S')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("True\nFilterError S: ")
    assert f"google-re2, which {sys.executable} lacks" in finished.stdout


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", r"\b", "(?:ab)", "^", "$", "(?i:B)", "{}"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}?", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(
    pattern=PATTERNS,
    method=st.sampled_from(["search", "match", "fullmatch"]),
    text=st.text(alphabet="abB.1_{}", max_size=12),
)
def test_any_other_pattern_means_what_it_means_in_re(pattern: str, method: str, text: str) -> None:
    """Apart from the documented differences, a filter finds what Python's `re` finds."""
    expected = getattr(re, method)(pattern, text) is not None
    assert matches(f"{method}(r'{pattern}', name)", name=text) is expected


# ---- any expression, any text

NUMBERS = st.recursive(
    st.sampled_from(["layer_id", "step", "0", "3", "-7", "2.5", "len(name)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(inner, st.sampled_from(["/ 2", "// 3", "% 4"])).map(lambda p: f"({p[0]} {p[1]})"),
        inner.map(lambda x: f"-({x})"),
    ),
    max_leaves=5,
)
TEXTS = st.recursive(
    st.sampled_from(["name", "kind", "'attn'", "'a'", "'out'"]),
    lambda inner: st.tuples(inner, inner).map(lambda p: f"({p[0]} + {p[1]})"),
    max_leaves=3,
)
ORDERINGS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
TESTS = st.one_of(
    st.tuples(NUMBERS, ORDERINGS, NUMBERS, ORDERINGS, NUMBERS).map(" ".join),
    st.tuples(NUMBERS, ORDERINGS, NUMBERS).map(" ".join),
    st.tuples(TEXTS, ORDERINGS, TEXTS).map(" ".join),
    st.tuples(NUMBERS, st.sampled_from(["in", "not in"]), NUMBERS, NUMBERS).map(
        lambda p: f"{p[0]} {p[1]} ({p[2]}, {p[3]})"
    ),
    st.tuples(TEXTS, st.sampled_from(["in", "not in"]), TEXTS).map(" ".join),
    st.tuples(TEXTS, st.sampled_from(["startswith", "endswith"]), TEXTS).map(lambda p: f"{p[0]}.{p[1]}({p[2]})"),
    st.tuples(st.sampled_from(["search", "match", "fullmatch"]), TEXTS).map(
        lambda p: f"{p[0]}('at+n', {p[1]}) is not None"
    ),
    st.sampled_from(["flag", "flag is True", "nothing is None", "nothing is not None"]),
)
CONDITIONS = st.recursive(
    TESTS.map(lambda x: f"({x})"),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or", "==", "!="]), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        inner.map(lambda x: f"(not {x})"),
    ),
    max_leaves=4,
)
FULL_TAGS = st.fixed_dictionaries(
    {
        "layer_id": st.integers(-5, 40),
        "step": st.integers(0, 9) | st.floats(-9, 9),
        "name": st.sampled_from(["attn", "attn_out", "mlp", "", "a"]),
        "kind": st.sampled_from(["a", "out"]),
        "flag": st.booleans(),
        "nothing": st.none(),
    }
)


@given(source=CONDITIONS, tags=FULL_TAGS)
def test_with_all_tags_present_a_filter_agrees_with_python(source: str, tags: dict[str, Any]) -> None:
    """Any whitelisted expression gives what Python gives, where Python gives a value."""
    functions = {"search": re.search, "match": re.match, "fullmatch": re.fullmatch, "len": len}
    code = compile(source, "<reference>", "eval")
    assert matches(source, **tags) is bool(types.FunctionType(code, {**functions, **tags})())


WORDS = (
    "layer_id name step None True and or not in is lambda if else for yield await async __class__ 3 2.5 1e999 é 'a' "
    "'attn' f'{x}' search( match( len( .startswith( .endswith("
)
SIGNS = "( ) [ ] { } , . : := = == != < <= > >= + - * / // % ** & | ~ @ ; ! && \" ''' \\ #"
FRAGMENTS = st.lists(st.sampled_from([*WORDS.split(), *SIGNS.split(), "\n", "\r", "\0"]), max_size=14)
ANY_TAG_VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)


@given(
    source=st.one_of(FRAGMENTS.map(" ".join), FRAGMENTS.map("".join), st.text(max_size=40), CONDITIONS),
    tags=st.dictionaries(st.sampled_from(["layer_id", "name", "step", "kind", "flag"]), ANY_TAG_VALUE),
)
def test_any_text_is_a_filter_that_never_raises_or_a_filter_error(source: str, tags: dict[str, Any]) -> None:
    """Whatever is written, the outcome is FilterError or a filter that answers True or False for any point."""
    try:
        compiled = parse(source)
    except FilterError as error:
        assert str(error).startswith("GRAFTER_B2T_FILTER: ")
        return
    assert compiled(tags) in (True, False)
