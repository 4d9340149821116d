"""The benchmarks run, check what they moved, and say what they measured. No time is asserted."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
# They are no part of the installed package, and `pytest` alone does not look in the directory where it starts.
sys.path.append(str(ROOT))

from benchmarks import soak  # noqa: E402
from benchmarks.calls import CallResult  # noqa: E402
from benchmarks.dumping import measure_dumping  # noqa: E402
from benchmarks.dumping_table import dumping_table, dumping_targets  # noqa: E402
from benchmarks.footprint import measure_import  # noqa: E402
from benchmarks.growth import ALLOWED, PartResult, Samples, sample_process  # noqa: E402
from benchmarks.planning import PlanningResult, measure_planning  # noqa: E402
from benchmarks.resharding import ReshardingResult, shape_of  # noqa: E402
from benchmarks.rounds import Spread, interleaved, ratio, spread  # noqa: E402
from benchmarks.sglang_grafter import load_dumper_module  # noqa: E402
from benchmarks.sharding import DIMS, Crossing  # noqa: E402
from benchmarks.targets import call_targets, planning_targets, resharding_targets, transfer_targets  # noqa: E402
from benchmarks.transfers import CaseResult  # noqa: E402
from benchmarks.units import parse_size, size_text, time_text  # noqa: E402
from benchmarks.ways import AllGatherObject, Ranks  # noqa: E402

TIMES = st.floats(1e-9, 1e3)


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_run_prints_its_tables_and_writes_json(tmp_path: Path) -> None:
    """One run measures every way, for equal and unequal numbers of ranks; table and JSON hold what it measured."""
    path = tmp_path / "figures.json"
    parts = ("transfers", "calls", "memory", "statistics")
    small = ("--quick", "--sizes", "4KiB", "--ranks", "1-1", "2-1")
    done = run_benchmarks(*small, "--parts", *parts, "--json", str(path))
    assert done.returncode == 0, done.stderr
    for text in ("1->1, 4 KiB", "2->1, 4 KiB", "all_gather_object", "gloo send/recv", "memcpy", "unmatched", "Targets"):
        assert text in done.stdout
    figures = json.loads(path.read_text())
    assert {"cpus", "torch", "date"} <= set(figures["machine"])
    assert [(case["ranks"], case["bytes"]) for case in figures["transfers"]] == [("1->1", 4096), ("2->1", 4096)]
    for case in figures["transfers"]:
        assert set(case["seconds"]) == {"grafter", "all_gather_object", "gloo send/recv", "memcpy"}
        assert len({len(rounds) for rounds in case["seconds"].values()}) == 1
    assert {"pairing", "exchange", "write", "elsewhere"} <= set(stages_of(figures, "2->1", "target"))
    assert [call["call"] for call in figures["calls"]] == ["empty function", "disabled", "unmatched"]
    assert {memory["way"] for memory in figures["memory"]} == {"grafter", "all_gather_object", "gloo send/recv"}
    assert {"memcpy", "full", "light"} <= {summary["case"] for summary in figures["statistics"]}
    assert [target["unit"] for target in figures["targets"]] == ["times", "empty functions", "empty functions"]


def stages_of(figures: dict[str, Any], ranks: str, role: str) -> dict[str, float]:
    (found,) = [stage["seconds"] for stage in figures["stages"] if (stage["ranks"], stage["role"]) == (ranks, role)]
    return dict(found)


def test_resharding_is_measured_beside_grafts_and_gathering(tmp_path: Path) -> None:
    """Each value crosses once; every way is measured, its result checked by the ranks, and all of it is told."""
    path = tmp_path / "figures.json"
    done = run_benchmarks("--quick", "--sizes", "4KiB", "--parts", "resharding", "--json", str(path), "--verbose")
    assert done.returncode == 0, done.stderr
    for text in ("2->4 of h, 4 KiB", "4->2 of s, 4 KiB", "gather, then slice", "2->4, 4->4 of s, target"):
        assert text in done.stdout
    results = json.loads(path.read_text())["resharding"]
    assert [(r["ranks"], r["dim"]) for r in results] == [("2->4", "h"), ("2->4", "s"), ("4->2", "h"), ("4->2", "s")]
    for result in results:
        assert set(result["seconds"]) == {"resharded", "2->2", "4->4", "gather, then slice"}
        assert result["bytes_received"] == result["bytes"] == 4096
        roles = {"baseline": {"pairing", "exchange"}, "target": {"pairing", "exchange", "agreement", "write"}}
        for stage in result["stages"]:
            assert roles[stage["role"]] <= set(stage["seconds"])


@given(st.sampled_from([(2, 4), (4, 2), (4, 4), (2, 2)]), st.sampled_from(["h", "s"]), st.integers(0, 8))
def test_the_shards_of_both_jobs_make_one_tensor_of_distinct_values(
    ranks: tuple[int, int], dim: str, doublings: int
) -> None:
    shape = shape_of(1024 << doublings)
    crossing = Crossing("resharded", Ranks(*ranks), dim, shape)
    for role, parts in zip(("baseline", "target"), ranks, strict=True):
        whole = torch.cat([crossing.shard(role, rank) for rank in range(parts)], DIMS.index(dim))
        assert torch.equal(whole.flatten(), torch.arange(whole.numel(), dtype=torch.float32))
        assert (tuple(whole.shape), whole.nbytes) == (shape, 1024 << doublings)


def test_planning_is_measured_for_as_many_pieces_as_the_layouts_cross_in() -> None:
    """In one world the pieces double, in many worlds they stay; a rank's headers are those of all the ranks."""
    results = measure_planning(1)
    tables = {name: [r for r in results if r.table == name] for name in ("layouts", "pieces", "world")}
    assert [r.pieces["target"] for r in tables["pieces"]] == [32, 64, 128, 256, 512, 1024]
    assert {r.world for r in tables["pieces"] + tables["layouts"]} == {1024}
    assert {r.pieces["target"] for r in tables["world"]} == {32}
    assert [r.world for r in tables["world"]] == [64, 128, 256, 512, 1024]
    pieces = {r.name: r.pieces for r in tables["layouts"]}
    assert pieces["dp x tp to cp x tp"] == pieces["DTensors"] == {"baseline": 32, "target": 32}
    # Two stretches of s from each of 32 senders.
    assert pieces["zigzag"]["target"] == 64
    assert pieces["no dim in common"] == {"baseline": 1024, "target": 1024}
    assert all(r.parsing is not None and r.message_bytes > 2 * r.world * 100 for r in tables["layouts"])


def test_saving_is_measured_beside_torch_save_and_leaves_nothing(tmp_path: Path) -> None:
    """Every way saves all tensors in the directory that is given; files of 32 KiB have one target, large ones three."""
    results = [measure_dumping(nbytes, 3, 1, tmp_path, synced=True) for nbytes in (32 << 10, 1 << 20)]
    ways = {"save_file", "own writer", "dump, cold", "dump, warm", "dump, synced"}
    saved = {"torch.save", "torch.save, synced"}
    for result, spaced in zip(results, (set(), {"spaced"}), strict=True):
        own = ways | {f"dump, {kind}" for kind in spaced}
        assert set(result.seconds) - {"memcpy"} == set(result.processor_seconds) == own | saved
        assert set(result.faster) == set(result.less_processor) == own
        assert set(result.stalls) == set(result.stall_memcpys) == {"cold", "warm"} | spaced
    assert list(tmp_path.iterdir()) == []
    assert [target.unit for target in dumping_targets(results)] == ["times", "memcpys", "memcpys", "times"]
    assert dumping_table(results).row_count == 2 * len(ways | saved | {"memcpy"}) + 1


def test_import_is_measured_in_fresh_processes() -> None:
    result = measure_import(1)
    assert result.seconds.median > 0
    assert "grafter" in {module.partition(".")[0] for module, _ in result.costliest}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sizes", "4 parsecs"), "'4 parsecs' is not a size"),
        (("--sizes", "7"), "multiple of 4 bytes"),
        (("--sizes", "12", "--parts", "resharding"), "12 bytes are no [2, s, 4] of float32"),
        (("--ranks", "2"), "'2' is not a number of senders and of receivers"),
        (("--ranks", "0-1"), "'0-1' is not a number of senders and of receivers"),
        (("--sglang", "."), "Give the directory into which the sglang 0.5.23 wheel was unpacked"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    arguments: tuple[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert told in " ".join(capsys.readouterr().err.split())


@given(st.lists(st.tuples(TIMES, TIMES, st.floats(0.1, 10)), min_size=1))
def test_a_machine_that_drifts_between_rounds_changes_no_ratio(rounds: list[tuple[float, float, float]]) -> None:
    """Slowing a whole round down by any factor leaves the ratios of its ways as they were."""
    steady = ratio([a for a, _, _ in rounds], [b for _, b, _ in rounds])
    drifting = ratio([a * factor for a, _, factor in rounds], [b * factor for _, b, factor in rounds])
    assert drifting.median == pytest.approx(steady.median, rel=1e-9)
    assert drifting.noise == pytest.approx(steady.noise, rel=1e-6, abs=1e-9)


@given(st.lists(TIMES, min_size=1))
def test_the_spread_holds_the_median(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_each_round_measures_all_and_begins_with_another() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    results = interleaved({"a": lambda: measure("a"), "b": lambda: measure("b"), "c": lambda: measure("c")}, 4)
    assert order == list("abc" + "bca" + "cab" + "abc")
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@given(st.integers(1, 2**31).map(lambda n: 4 * n))
def test_sizes_are_read_as_they_are_written(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == nbytes
    assert parse_size(f"{nbytes} KiB") == nbytes * 1024
    if nbytes % 2**20 == 0:
        assert size_text(nbytes) == f"{nbytes // 2**20:g} MiB"


def test_times_have_three_digits_and_a_unit() -> None:
    assert [time_text(t) for t in (95e-9, 4.2e-6, 15.2e-3, 1.0, 123.4)] == [
        "95.0 ns",
        "4.20 us",
        "15.2 ms",
        "1.00 s",
        "123 s",
    ]


def test_targets_are_judged_by_the_ratio_of_the_run() -> None:
    """Six times faster than gathering meets the target of 1->1 at 4 KiB; a hair less does not, nor do times count."""
    for gathering, met in ((6.0, True), (5.9, False)):
        for slow_machine in (1.0, 1000.0):
            seconds = {"grafter": [slow_machine], "all_gather_object": [gathering * slow_machine]}
            (target,) = transfer_targets([CaseResult(Ranks(1, 1), 4096, seconds, {})])
            assert target.met is met
    for over_empty, met in ((1.5, True), (1.6, False)):
        one = Spread(over_empty, over_empty, over_empty)
        (target,) = call_targets([CallResult("disabled", one, one)])
        assert target.met is met


def test_resharding_is_judged_by_the_faster_graft_that_reshards_nothing() -> None:
    """Round by round, 1.5 times the faster of 2->2 and 4->4 meets the target; another size has none."""
    for resharded, met in ((1.5, True), (1.6, False)):
        seconds = {"resharded": [resharded, 10 * resharded], "2->2": [1.0, 90.0], "4->4": [9.0, 10.0]}
        for nbytes, count in ((256 << 20, 1), (64 << 20, 0)):
            result = ReshardingResult(Ranks(2, 4), "h", (2, 8192, 4096), nbytes, seconds, {}, nbytes)
            targets = resharding_targets([result])
            assert [target.met for target in targets] == [met] * count


def test_planning_is_judged_by_the_slower_of_sender_and_receiver() -> None:
    for slower, met in ((0.020, True), (0.021, False)):
        seconds: Any = {"baseline": Spread(0.001, 0.001, 0.001), "target": Spread(slower, slower, slower)}
        for table, count in (("layouts", 1), ("pieces", 0)):
            one = PlanningResult("one", table, "", 1024, {}, seconds, seconds["baseline"])
            assert [target.met for target in planning_targets([one])] == [met] * count


def test_a_way_that_was_left_out_has_no_target() -> None:
    """Where memory does not suffice for gathering, nothing is claimed about it."""
    case = CaseResult(Ranks(2, 2), 4096, {"grafter": [1.0]}, {}, {AllGatherObject.name: "needs 20 GiB"})
    assert transfer_targets([case]) == []


@pytest.fixture
def stubs_removed() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.usefixtures("stubs_removed")
def test_the_dumper_of_sglang_loads_without_sglang(tmp_path: Path) -> None:
    """What its file imports is replaced, and a replacement that is called after all says what it stands for."""
    directory = tmp_path / "sglang" / "srt" / "debug_utils"
    directory.mkdir(parents=True)
    (directory / "dumper.py").write_text(
        "import zmq\nfrom sglang.srt.utils import get_device\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass DumperConfig:\n    enable: bool = False\n"
    )
    module = load_dumper_module(tmp_path)
    assert module.DumperConfig().enable is False
    with pytest.raises(RuntimeError, match=r"sglang\.srt\.utils\.get_device"):
        module.get_device()


def grown(measure: str, values: list[int]) -> bool:
    samples = Samples()
    for number, value in enumerate(values):
        samples.add(float(number), number, {"a": {measure: value}})
    (trend,) = samples.trends()
    return trend.grows


@pytest.mark.parametrize("measure", ALLOWED)
def test_what_grows_with_time_is_told_from_what_fills_or_peaks(measure: str) -> None:
    """A steady gain grows; one that ends within the warm-up, a single peak and a fall do not."""
    step = ALLOWED[measure] + 1
    assert grown(measure, [step * number for number in range(60)])
    assert grown(measure, [step * (number // 10) for number in range(60)])
    assert not grown(measure, [step * min(number, 15) for number in range(60)])
    assert not grown(measure, [step * (number == 40) for number in range(60)])
    assert not grown(measure, [-step * number for number in range(60)])
    assert not grown(measure, [0, 0, 0, 0])


HELD_BYTES = 64 << 20


def test_a_process_that_opens_files_and_starts_threads_is_seen_to() -> None:
    """What is sampled is what there is: descriptors, threads, mappings and memory."""
    before = sample_process()
    # A mapping of its own: an allocator might hand out memory that is resident already.
    with open(__file__), open(__file__), open(__file__), mmap.mmap(-1, HELD_BYTES) as held:
        held.write(b"1" * HELD_BYTES)
        after = sample_process()
    assert after["descriptors"] - before["descriptors"] == 3
    assert after["resident"] - before["resident"] > HELD_BYTES // 2
    assert min(after.values()) > 0
    assert PartResult("x").as_json() == {"part": "x", "facts": {}, "trends": [], "faults": []}


def test_the_soak_runs_its_parts_and_says_what_it_saw(tmp_path: Path) -> None:
    """Every part, for seconds: each limit holds, every value is right, and the JSON has the trends of all processes."""
    path = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--quick", "--seconds", "1", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Too short to tell what grows, and every limit held." in done.stdout
    parts = {part["part"]: part for part in json.loads(path.read_text())}
    assert set(parts) == {"points", "ranks", "tensor", "pytree", "dumps", "outbox"}
    assert {trend["who"] for trend in parts["ranks"]["trends"]} == {
        "store", *(f"{role} {rank}" for role in ("baseline", "target") for rank in range(3))
    }  # fmt: skip
    assert {trend["measure"] for trend in parts["points"]["trends"]} == set(ALLOWED)
    assert "GRAFTER_OUTBOX_BYTES" in parts["outbox"]["facts"]["refusal"]
    assert parts["dumps"]["facts"]["left_out"] == {"points": 3}


def test_a_soak_in_which_a_rank_fails_or_something_grows_ends_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and the part's name; a rank's error is shown with its traceback."""

    def fail(_: soak.Load) -> PartResult:
        with soak.SoakGroup(Ranks(1, 0), b2t_filter=None, dump_filter="True") as group:
            group.do("tree", "no number", 0)
        raise AssertionError("it continued")

    def grow(_: soak.Load) -> PartResult:
        samples = Samples()
        for number in range(9):
            samples.add(float(number), number, {"target 3": {"threads": 5 * number}})
        return PartResult("points", trends=samples.trends())

    monkeypatch.setattr(soak, "PARTS", {"dumps": fail, "points": grow})
    assert soak.main([]) == 1
    told = capsys.readouterr().out
    assert "baseline 0 in 'tree'" in told and "TypeError" in told
    assert "GROWS" in told and "grows or fails: dumps, points" in told
