"""Whatever a dumped file holds, reading ends in a value that fits its record or in a DumpError that names the file.

About 4 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dump_parts import RankDumps
from hypothesis import example, given, settings
from hypothesis import strategies as st

import grafter
from grafter.errors import DumpError
from grafter.store.dumps.record import FORMAT_VERSION

VALUE = torch.arange(24, dtype=torch.float32).view(4, 6)


def one_point(directory: Path) -> Path:
    """The file of a directory's only point."""
    return RankDumps(directory).add("x", VALUE)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def described(**changes: Any) -> Callable[[Path], None]:
    """The entry of the tensor says something else."""

    def change(path: Path) -> None:
        header, data = header_of(path)
        header["value"] |= changes
        write_header(path, header, data)

    return change


def length(claimed: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(claimed.to_bytes(8, "little") + path.read_bytes()[8:])


def beside(name: str, entry: Any) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        header, data = header_of(path)
        write_header(path, {**header, name: entry}, data)

    return add


def raw(text: bytes) -> Callable[[Path], None]:
    return lambda path: write_header(path, text, b"")


def renamed(path: Path) -> None:
    header, data = header_of(path)
    write_header(path, {name.replace("value", "v"): entry for name, entry in header.items()}, data)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes.*truncated"),
    "only a length": (lambda path: os.truncate(path, 8), "has 8 bytes"),
    "cut in the header": (lambda path: os.truncate(path, 60), "claims .* bytes, and the file has 60"),
    "cut in the data": (lambda path: os.truncate(path, path.stat().st_size - 1), "ends at byte.*truncated"),
    "more at the end": (lambda path: path.write_bytes(path.read_bytes() + b"more"), "4 bytes after its last tensor"),
    "length 2**64 - 1": (length(2**64 - 1), "claims 18446744073709551615 bytes"),
    "length -1, as signed": (length(2**63), "claims 9223372036854775808"),
    "length 0": (length(0), "claims 0 bytes"),
    "no JSON": (raw(b"{" * 100), "no JSON"),
    "a JSON bomb": (raw(b'{"a":' * 200_000), "no JSON"),
    "a list bomb": (raw(b"[" * 500_000), "no JSON"),
    "a number of many digits": (raw(b'{"a":' + b"9" * 100_000 + b"}"), "no JSON"),
    "no object": (raw(b"[1, 2]"), "no JSON object"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "no JSON"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "twice"),
    "an entry that is none": (beside("other", 7), "no description of the tensor 'other'"),
    "metadata that is none": (beside("__metadata__", {"grafter": 7}), "no map from text to text"),
    "no record": (beside("__metadata__", {"other": "x"}), "no dump of grafter"),
    "a record that is none": (beside("__metadata__", {"grafter": "{"}), "its metadata is no record"),
    "a bomb for a record": (beside("__metadata__", {"grafter": "[" * 300_000}), "its metadata is no record"),
    "beyond the file": (described(shape=[1 << 40], data_offsets=[0, 1 << 42]), "ends at byte"),
    "an absurd shape": (described(shape=[1 << 62] * 64), "has 96 bytes"),
    "a negative size": (described(shape=[-4, -6]), "no shape"),
    "a size that is no number": (described(shape=[4.0, 6]), "no shape"),
    "a size that is a truth": (described(shape=[True, 24]), "no shape"),
    "offsets turned round": (described(data_offsets=[96, 0]), "-96 bytes"),
    "negative offsets": (described(data_offsets=[-96, 0]), "no place"),
    "three offsets": (described(data_offsets=[0, 96, 96]), "no place"),
    "a gap": (described(shape=[92], dtype="U8", data_offsets=[4, 96]), "leaves a gap"),
    "an overlap": (beside("y", {"dtype": "U8", "shape": [8], "data_offsets": [88, 96]}), "lies over another"),
    "a dtype that is none": (described(dtype="F7"), "'F7', which is none"),
    "a dtype that is a list": (described(dtype=[]), "which is none"),
    "another dtype than the record": (described(dtype="I32"), r"says float32\[4, 6\] of 'value'.*int32\[4, 6\]"),
    "another shape than the record": (described(shape=[6, 4]), r"says float32\[4, 6\].*float32\[6, 4\]"),
    "no such tensor": (renamed, "has no tensor 'value'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_an_error_that_names_it_and_the_fault(fault: str, tmp_path: Path) -> None:
    """Both where its line names it, and where only the listing does; `check` finds it, and the rest reads."""
    damage, words = FAULTS[fault]
    directory = tmp_path / "with line"
    dumps = RankDumps(directory)
    path = dumps.add("x", VALUE)
    dumps.add("good", VALUE)
    damage(path)
    read = grafter.open_dumps(directory)
    with pytest.raises(DumpError, match=f"000000-x.safetensors: .*{words}"):
        read.point("x").whole()
    assert torch.equal(read.point("good").whole(), VALUE)
    assert [problem.file for problem in read.check()] == ["rank0/000000-x.safetensors"]
    # The same file without its line: its own record is all that there is.
    alone = tmp_path / "without line"
    RankDumps(alone).add("good", VALUE, order=1)
    (alone / "rank0" / "000000-good.safetensors").rename(alone / "rank0" / "000001-good.safetensors")
    shutil.copy(path, alone / "rank0")
    read = grafter.open_dumps(alone)
    told = [str(problem) for problem in read.problems if "000000-x" in problem.file]
    if told:
        assert len(told) == 1
    else:
        with pytest.raises(DumpError, match=words):
            read.point("x").whole()


def test_bytes_of_a_bool_that_are_none_are_an_error(tmp_path: Path) -> None:
    """What torch computes with such a bool is undefined."""
    path = RankDumps(tmp_path).add("x", torch.ones(4, dtype=torch.bool))
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(DumpError, match="neither 0 nor 1"):
        grafter.open_dumps(tmp_path).points[0].whole()


def test_tensors_that_lie_where_their_dtype_does_not_allow_it_are_read(tmp_path: Path) -> None:
    """A header of odd length puts a float32 on an odd address; it is copied."""
    path = one_point(tmp_path)
    header, data = header_of(path)
    text = json.dumps(header).encode()
    write_header(path, text + b" " * (1 - len(text) % 2), data)
    assert torch.equal(grafter.open_dumps(tmp_path).points[0].local(0), VALUE)


@given(st.randoms(use_true_random=False), st.booleans())
@example(random.Random(0), False)
@settings(max_examples=300, deadline=None)
def test_random_damage_gives_a_fitting_tensor_or_a_dump_error(dice: random.Random, in_line: bool) -> None:
    """Bytes turned, taken out, put in and cut off, in the file or in its line: never another exception."""
    directory = Path(_scratch()) / "baseline"
    shutil.rmtree(directory, ignore_errors=True)
    path = RankDumps(directory).add("x", VALUE, "a[tp] b", axes=[["tp", 0, 1]], tags={"layer_id": 3})
    damaged = directory / "rank0.dumps.jsonl" if in_line else path
    content = bytearray(damaged.read_bytes())
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content) + 1) if dice.random() < 0.5 else dice.randrange(min(len(content), 60) + 1)
        what = dice.randrange(4)
        if what == 0:
            del content[at:]
        elif what == 1:
            content[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 9)))
        elif what == 2:
            del content[at : at + dice.randint(1, 9)]
        elif at < len(content):
            content[at] = dice.randrange(256) if dice.random() < 0.5 else dice.choice(b'0123456789"{}[],:-e')
    damaged.write_bytes(content)
    read_all(directory)


def read_all(directory: Path) -> None:
    """Whatever can be asked of dumps ends in an answer that fits, or in a DumpError."""
    try:
        dumps = grafter.open_dumps(directory)
    except DumpError as error:
        assert str(directory) in str(error)
        return
    assert len(dumps.table()) >= len(dumps) and all(map(str, (*dumps.problems, *dumps.check(), *dumps.notes)))
    for point in dumps:
        assert dumps.get(point.key) is point and point.tags["name"] == point.name
        for leaf in point.first.leaves:
            for read in (partial(point.local, 0), point.whole):
                try:
                    value = read(leaf.path)
                except DumpError as error:
                    assert "x.safetensors" in str(error) or repr(point.name) in str(error)
                else:
                    assert value.numel() <= 24
        for ask in (point.extras, point.tokens):
            with contextlib.suppress(DumpError):
                ask(0)


STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 1 << 40, 1 << 62, 1 << 63, -(1 << 63), 1 << 200, 0.5, float("nan"), float("inf"),
    "", "x", "a[tp] b", "t[tp:zigzag] b", "a[tp:partial] b", "__init__", "float32", "no_grad", "\x00", "\U0001f600",
    [], [[]], {}, {"a": None}, [0, 0, 0], [[0, 1 << 62, 0]], [4, 6], [1 << 62, 1 << 62], ["tp", 0, 1 << 62],
    {"__grafter_tensor__": 10**30},
]  # fmt: skip
LAYOUTS: list[Any] = [
    {"dims": "a[tp] b"},
    {"dims": "t[tp:zigzag] b", "seq_lens": [4]},
    {"global_shape": [4, 6], "runs": [[[0, 4, 0]], [[0, 6, 0]]], "place": [0], "mesh": "m", "summand": ["sum", 0, 1]},
    {"global_shape": [4, 6], "boxes": [[[0, 0], [4, 6], [0, 0]]]},
]


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_records_that_say_strange_things_give_a_fitting_tensor_or_a_dump_error(dice: random.Random) -> None:
    """One to three fields of a record, at any depth, the same in line and file, are something else."""
    directory = Path(_scratch()) / "baseline"
    shutil.rmtree(directory, ignore_errors=True)
    leaf = {"path": "", "shape": [4, 6], "dtype": "float32", "device": "cpu", "layout": dice.choice(LAYOUTS)}
    leaf |= {"statistics": {"numel": 24, "mean": 0.5}, "stored_as": dice.choice([None, "float32"])}
    fields = {
        "leaves": [leaf], "axes": [["tp", 0, 1]], "tags": {"layer_id": 3}, "extras": {"a": {"__grafter_tensor__": 0}},
        "tokens": {"runs": [["a", 0, 3], [None, 0, 1]], "hashes": [["a", "AAAAAAAAAAA="]]}, "others": {"b": 1},
    }  # fmt: skip
    record = json.loads(json.dumps(RankDumps(directory).record("x", {}, **fields)))
    for _ in range(dice.randint(1, 3)):
        holder, key = record, dice.choice(list(record))
        while isinstance(holder[key], (dict, list)) and holder[key] and dice.random() < 0.8:
            holder = holder[key]
            key = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
        holder[key] = json.loads(json.dumps(dice.choice(STRANGE)))
    again = RankDumps(directory)
    again.add("x", VALUE, stored={"extras0": VALUE}, line=False)
    path = directory / "rank0" / "000000-x.safetensors"
    header, data = header_of(path)
    header["__metadata__"]["grafter"] = json.dumps(record)
    write_header(path, header, data)
    if dice.random() < 0.8:
        again.write_line(json.dumps(record))
    read_all(directory)


_DIRECTORIES: list[Any] = []


def _scratch() -> str:
    import tempfile

    if not _DIRECTORIES:
        _DIRECTORIES.append(tempfile.TemporaryDirectory())
    return str(_DIRECTORIES[0].name)


# --- paths


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd", "../secret.safetensors", "rank0/../../secret.safetensors", "rank0/../rank1/x.safetensors",
        "rank1/x.safetensors", "rank00/x.safetensors", "rank0//x.safetensors", "rank0/a/x.safetensors",
        "rank0/.x.safetensors", "rank0/x.tmp", "rank0/x\0.safetensors", "", "rank0",
        "rank0/" + "x" * 5000 + ".safetensors",
    ],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_is_never_opened(file: str, tmp_path: Path) -> None:
    """The line is refused, or the file is not there; the rest reads."""
    secret = one_point(tmp_path / "other")
    shutil.copy(secret, tmp_path / "secret.safetensors")
    dumps = RankDumps(tmp_path / "baseline")
    dumps.add("good", VALUE)
    dumps.write_line(json.dumps(dumps.record("x", {"": VALUE}, file=file)))
    read = grafter.open_dumps(tmp_path / "baseline")
    assert read.problems
    for point in read.select("name == 'x'"):
        with pytest.raises(DumpError):
            point.whole()
    assert torch.equal(read.point("good").whole(), VALUE)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither a file nor a rank's directory may be a link; the directory that the user names may be."""
    secret = one_point(tmp_path / "other")
    path = one_point(tmp_path / "baseline")
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(DumpError, match="symbolic link"):
        grafter.open_dumps(tmp_path / "baseline").points[0].whole()
    one_point(tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "rank0")
    (tmp_path / "linked" / "rank0").symlink_to(tmp_path / "other" / "rank0")
    read = grafter.open_dumps(tmp_path / "linked")
    assert "no such file" in str(read.problems[0])
    with pytest.raises(DumpError, match="symbolic link"):
        read.points[0].whole()
    (tmp_path / "by link").symlink_to(tmp_path / "other")
    assert torch.equal(grafter.open_dumps(tmp_path / "by link").points[0].whole(), VALUE)


def test_pipes_and_directories_in_the_place_of_files_do_not_hang(tmp_path: Path) -> None:
    """A pipe that nobody writes to would block an ordinary open for ever."""
    path = one_point(tmp_path)
    path.unlink()
    os.mkfifo(path)
    os.mkfifo(tmp_path / "run.json")
    os.mkfifo(tmp_path / "rank1.dumps.jsonl")
    os.mkfifo(tmp_path / "rank0" / "000009-y.safetensors")
    (tmp_path / "rank0" / "000010-z.safetensors").mkdir()
    read = grafter.open_dumps(tmp_path)
    assert {problem.file.split(":")[0] for problem in read.problems} == {
        "run.json", "rank1.dumps.jsonl", "rank0/000009-y.safetensors", "rank0/000010-z.safetensors",
    }  # fmt: skip
    with pytest.raises(DumpError, match="no plain file"):
        read.points[0].whole()


# --- lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "order"),
        ("", "not a record"),
        ("null", "not a record"),
        ("\0\0\0\0", "not a record"),
        ("[" * 200_000, "not a record"),
        ('{"order":' * 100_000, "not a record"),
        ({"role": "trainer"}, "role"),
        ({"role_rank": 1, "role_world_size": 2}, "of role rank 1, and stands among those of rank 0"),
        ({"role_world_size": 0}, "no place"),
        ({"order": -1}, "below what they count from"),
        ({"leaves": [{"path": "", "shape": [-1], "dtype": "float32", "device": "cpu"}]}, "negative size"),
        ({"leaves": [{"path": "", "shape": [1], "dtype": "float32", "device": "cpu"}] * 2}, "one path"),
        ({"leaves": [{"path": "", "shape": [], "dtype": "int8", "device": "cpu", "layout": {"runs": 3}}]}, "layout"),
        ({"name": "x", "order": 0}, "order 0"),
        ({"role": "target", "order": 7, "file": None}, "two runs were mixed"),
        ({"role_world_size": 5, "order": 7, "file": None}, "two runs were mixed"),
        ({"order": 7}, "one file"),
        ({"order": 7, "file": None}, "both of 'x'"),
    ],
)  # fmt: skip
def test_a_bad_line_is_a_problem_and_the_rest_reads(line: Any, words: str, tmp_path: Path) -> None:
    """With file and, where one line is at fault, its number."""
    dumps = RankDumps(tmp_path)
    dumps.add("x", VALUE)
    first = json.loads(dumps.lines.read_text())
    dumps.write_line(line if isinstance(line, str) else json.dumps({**first, **line}))
    dumps.add("y", VALUE)
    read = grafter.open_dumps(tmp_path)
    (problem,) = read.problems
    assert problem.file.startswith("rank0.dumps.jsonl") and words in problem.what
    assert [point.name for point in read] == ["x", "y"] and torch.equal(read.points[1].whole(), VALUE)


def test_a_line_that_breaks_off_is_told_and_its_file_read(tmp_path: Path) -> None:
    """The process died while it wrote the line: the file's own record is taken."""
    dumps = RankDumps(tmp_path)
    dumps.add("x", VALUE)
    dumps.add("y", VALUE + 1, line=False)
    dumps.write_line(json.dumps(dumps.record("y", {"": VALUE}))[:70], end="")
    read = grafter.open_dumps(tmp_path)
    assert "breaks off" in str(read.problems[0]) and read.problems[0].file == "rank0.dumps.jsonl:2"
    assert torch.equal(read.point("y").whole(), VALUE + 1)
    assert "000001-y.safetensors" in read.notes[0]


def test_files_without_lines_are_found_and_temporary_ones_are_told(tmp_path: Path) -> None:
    """A crash between the two; and one in the middle of a file."""
    dumps = RankDumps(tmp_path)
    for name in ("x", "y"):
        dumps.add(name, VALUE, line=False)
    (tmp_path / "rank0" / "000002-z.safetensors.tmp").write_bytes(b"half")
    dumps.lines.unlink()
    read = grafter.open_dumps(tmp_path)
    assert [point.name for point in read] == ["x", "y"] and not read.problems
    assert "000002-z.safetensors.tmp" in read.notes[0] and "2 files that no line names" in read.notes[1]


def test_a_file_under_another_name_than_its_own_is_told(tmp_path: Path) -> None:
    """A copy beside the file is no second point."""
    path = one_point(tmp_path)
    shutil.copy(path, path.with_name("000009-copy.safetensors"))
    read = grafter.open_dumps(tmp_path)
    assert len(read) == 1 and "says that it is rank0/000000-x.safetensors" in str(read.problems[0])


def test_a_record_and_its_file_that_disagree_are_an_error(tmp_path: Path) -> None:
    """Two files of one shape, exchanged: no other check would see it."""
    dumps = RankDumps(tmp_path)
    x, y = dumps.add("x", VALUE), dumps.add("y", -VALUE)
    content = x.read_bytes()
    x.write_bytes(y.read_bytes())
    y.write_bytes(content)
    for point in grafter.open_dumps(tmp_path):
        with pytest.raises(DumpError, match="its own record says order"):
            point.whole()


def test_a_file_that_a_line_names_and_that_is_gone_is_told(tmp_path: Path) -> None:
    """When it is opened, and again when its tensor is wanted."""
    dumps = RankDumps(tmp_path)
    dumps.add("x", VALUE).unlink()
    dumps.add("y", VALUE)
    read = grafter.open_dumps(tmp_path)
    assert [str(problem) for problem in read.problems] == [
        "rank0/000000-x.safetensors: record 0 names it, and there is no such file"
    ]
    with pytest.raises(DumpError, match="no such file"):
        read.points[0].whole()


@pytest.mark.parametrize("known", [True, False], ids=["fields as now", "fields of its own"])
def test_a_newer_version_says_to_update(known: bool, tmp_path: Path) -> None:
    """In a line, and in a file without one."""
    dumps = RankDumps(tmp_path)
    record = dumps.record("x", {"": VALUE}, format_version=FORMAT_VERSION + 1)
    dumps.write_line(json.dumps(record if known else {"format_version": FORMAT_VERSION + 1, "order": "first"}))
    with pytest.raises(DumpError, match=r"rank0.dumps.jsonl:1: a newer grafter.*Update grafter"):
        grafter.open_dumps(tmp_path)
    dumps.lines.unlink()
    dumps.add("x", VALUE, line=False, format_version=FORMAT_VERSION + 1)
    with pytest.raises(DumpError, match=r"000000-x.safetensors: a newer grafter.*Update grafter"):
        grafter.open_dumps(tmp_path)


def test_fields_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    """A later grafter may say more in the same version."""
    RankDumps(tmp_path).add("x", VALUE, weather="fine")
    assert torch.equal(grafter.open_dumps(tmp_path).points[0].whole(), VALUE)


def test_a_directory_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    """With what is wrong, file by file."""
    dumps = RankDumps(tmp_path)
    dumps.write_line("what?")
    with pytest.raises(DumpError, match=r"nothing in it can be read(.|\n)*rank0.dumps.jsonl:1: not a record"):
        grafter.open_dumps(tmp_path)


def test_layouts_that_claim_more_than_there_is_cost_nothing(tmp_path: Path) -> None:
    """A box of a tensor of 2**61 values, runs without end, sequence lengths: refused before memory is taken."""
    huge = 1 << 61
    layouts = [
        {"global_shape": [huge, 6], "boxes": [[[0, 0], [4, 6], [0, 0]]]},
        {"global_shape": [huge, 6], "runs": [[[0, huge, 0]], [[0, 6, 0]]], "place": [0], "mesh": "m"},
        {"dims": "t[tp:zigzag] d", "seq_lens": [huge]},
        {"dims": f"(a={huge}*c) b"},
        {"dims": "a b"},
    ]
    dumps = RankDumps(tmp_path)
    for layout in layouts[:4]:
        leaf = {"path": "", "shape": [4, 6], "dtype": "float32", "device": "cpu", "layout": layout}
        dumps.add("x", VALUE, leaves=[leaf], axes=[["tp", 0, 2]], occurrence=dumps.order)
    leaf = {"path": "", "shape": [huge, 6], "dtype": "float32", "device": "cpu", "layout": layouts[4]}
    dumps.add("x", VALUE, leaves=[leaf], occurrence=4)
    for point in grafter.open_dumps(tmp_path):
        with pytest.raises(DumpError):
            point.whole()


def test_tokens_that_contradict_themselves_are_an_error(tmp_path: Path) -> None:
    """Or that claim more rows than could be."""
    dumps = RankDumps(tmp_path)
    for runs in ([[0, 0, 3], [0, 2, 1]], [[0, -1, 2]], [[0, 0, 0]], [[0, 0, 1 << 63]], [[0, 1 << 62, 1]]):
        dumps.add("x", VALUE, tokens={"runs": runs}, occurrence=dumps.order)
    dumps.add("x", VALUE, tokens={"runs": [[0, 0, 2]], "hashes": [[0, "???"]]}, occurrence=dumps.order)
    dumps.add("x", VALUE, tokens={"runs": [[0, 0, 2]], "hashes": [[1, "AAAAAAAAAAA="]]}, occurrence=dumps.order)
    for point in grafter.open_dumps(tmp_path):
        with pytest.raises(DumpError, match="its tokens are none"):
            point.tokens(0)
