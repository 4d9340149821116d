"""Recordings: what they keep, how they are read without trust, and what is said of jobs that are played from one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.config.settings.config import GrafterConfig
from grafter.core.leaves import decode_extras
from grafter.core.messages.roster import PlayedFrom
from grafter.core.roles import Place
from grafter.errors import ConfigError, DumpError, UsageError
from grafter.rank.grafter import Grafter
from grafter.rank.job_environment import STARTUP_DIRECTORY, player_environment
from grafter.rank.peer import start_peer
from grafter.store.dumps.record import DumpRecord
from grafter.store.recording import RecordedPart, Recording, open_recording
from grafter.wire.monitor.deadlock import explain_stuck
from grafter.wire.monitor.status_board import BoardLine, describe_board
from grafter.wire.rendezvous.join import store_place


def config(directory: Path, **fields: Any) -> GrafterConfig:
    given = {
        "role": "baseline",
        "record": True,
        "b2t_filter": "name != 'other'",
        "dir": str(directory),
        "run_name": "r",
    }
    return GrafterConfig(enable=True, log_level="error", **{**given, **fields})


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Grafter]:
    """A job of one rank that is recorded alone, in this process."""
    grafter = Grafter(config(tmp_path))
    yield grafter
    grafter.close()


def played(directory: Path) -> Recording:
    return open_recording(directory / "r", "baseline")


def lines_of(directory: Path) -> Path:
    return directory / "r" / "baseline" / "rank0.dumps.jsonl"


def change_record(directory: Path, change: dict[str, Any]) -> None:
    """Change the one record, in its line (which is what counts)."""
    (line,) = lines_of(directory).read_text().splitlines()
    lines_of(directory).write_text(json.dumps({**json.loads(line), **change}) + "\n")


# What is kept.


def test_a_recording_needs_no_other_job(recorder: Grafter, tmp_path: Path) -> None:
    """Points that a direction's filter matches are kept in the program's order, and nothing joins."""
    for layer in range(2):
        value = torch.full((2,), float(layer))
        assert recorder.dump("h", value, layer_id=layer) is value
    recorder.step()
    recorder.dump("other", torch.ones(1))
    recorder.dump("h", lambda: torch.ones(1), layer_id=0)
    recorder.close()
    recording = played(tmp_path)
    assert [(one.record.name, one.record.tags, one.record.step) for one in recording.ranks[0].points] == [
        ("h", {"layer_id": 0}, 0), ("h", {"layer_id": 1}, 0), ("h", {"layer_id": 0}, 1)
    ]  # fmt: skip
    offers = [one.offer() for one in recording.ranks[0].points]
    assert [offer.leaves.tensors[0].tolist() for offer in offers if offer.leaves] == [[0.0, 0.0], [1.0, 1.0], [1.0]]
    assert recording.ranks[0].played_from == PlayedFrom(
        directory=str(tmp_path / "r" / "baseline"), points=3, last_step=1
    )
    assert recording.ranks[0].lost == 0
    assert recording.ranks[0].ended is None


def test_limits_and_levels_of_dumps_are_none_of_a_recordings(tmp_path: Path) -> None:
    """A recording is complete, whatever dumps leave out: levels, steps, counts and metadata."""
    limits = {"dump_filter": "True", "dump_level": "checksum", "dump_max_points": 1, "dump_steps": "7"}
    grafter = Grafter(config(tmp_path, **limits))
    for layer in range(3):
        grafter.dump("h", torch.tensor([layer]), layer_id=layer, extras={"hidden_states": torch.ones(2)})
    grafter.close()
    for layer, one in enumerate(played(tmp_path).ranks[0].points):
        offer = one.offer()
        assert offer.leaves is not None and offer.leaves.tensors[0].tolist() == [layer]
        assert offer.extras_text is not None
        assert decode_extras(offer.extras_text, offer.extras)["hidden_states"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.bfloat16, torch.bool])
def test_dtypes_that_files_lack_come_back(recorder: Grafter, tmp_path: Path, dtype: torch.dtype) -> None:
    """Values and extras have their own dtype again, bit for bit."""
    value = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    recorder.dump("h", value, extras={"t": value, "empty": value[:0]})
    recorder.close()
    offer = played(tmp_path).ranks[0].points[0].offer()
    assert offer.leaves is not None
    for tensor, expected in zip([*offer.leaves.tensors, *offer.extras], [value, value, value[:0]], strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_what_has_nothing_to_offer_says_so(recorder: Grafter, tmp_path: Path) -> None:
    """A value that is no tensor is recorded as such; one that failed fails again."""
    recorder.dump("h", None)
    with pytest.raises(UsageError):
        recorder.dump("bad", torch.ones(1), extras={"f": print})
    recorder.close()
    nothing, failed = (one.offer() for one in played(tmp_path).ranks[0].points)
    assert nothing.nothing == "the value is None, not a tensor (when it was recorded)"
    assert "UsageError: extras['f'] is a builtin_function_or_method" in str(failed.failure)


def test_a_rank_without_points_is_still_a_rank(recorder: Grafter, tmp_path: Path) -> None:
    """It joins when it is played, since the live job counts on it."""
    recorder.dump("h", torch.ones(1))
    recorder.close()
    facts = tmp_path / "r" / "baseline" / "rank0.recording.json"
    two = {**json.loads(facts.read_text()), "role_world_size": 2}
    facts.write_text(json.dumps(two))
    with pytest.raises(DumpError, match=r"has 2 ranks, but rank1\.recording\.json does not exist"):
        played(tmp_path)
    facts.with_name("rank1.recording.json").write_text(json.dumps({**two, "role_rank": 1}))
    ranks = played(tmp_path).ranks
    assert [len(rank.points) for rank in ranks] == [1, 0]
    assert ranks[1].played_from.end == "the recording has no point"
    assert ranks[1].ended == "ended without closing (killed, or crashed)"


# What is no recording.


def test_what_is_no_recording_is_told(tmp_path: Path) -> None:
    """Nothing there; dumps alone; the other role; a newer version; too many ranks: each says what to do."""
    with pytest.raises(DumpError, match="there is no such directory"):
        open_recording(tmp_path / "absent", "baseline")
    dumping = Grafter(config(tmp_path, record=False, b2t_filter=None, dump_filter="True"))
    dumping.dump("h", torch.ones(1))
    dumping.close()
    with pytest.raises(DumpError, match=r"holds no recording: .* made with GRAFTER_RECORD=1"):
        played(tmp_path)
    recorder = Grafter(config(tmp_path, run_name="s"))
    recorder.dump("h", torch.ones(1))
    recorder.close()
    for directory in (tmp_path / "s", tmp_path / "s" / "baseline"):
        assert len(open_recording(directory, "baseline").ranks[0].points) == 1
        with pytest.raises(
            DumpError, match="a recording of the baseline, but a recording of the target is needed here"
        ):
            open_recording(directory, "target")
    facts = tmp_path / "s" / "baseline" / "rank0.recording.json"
    content = json.loads(facts.read_text())
    for change, reason in (
        ({"recording_version": 9}, "a newer grafter recorded it"),
        ({"role_world_size": 1 << 20}, "1048576 ranks; 1 to 1024 can be played"),
        ({"role_world_size": "x"}, "it cannot be read"),
    ):
        facts.write_text(json.dumps({**content, **change}))
        with pytest.raises(DumpError, match=reason):
            open_recording(tmp_path / "s", "baseline")


@pytest.mark.parametrize("tag", ["transform", "ranks", "name", "save", "extras"])
def test_a_tag_that_is_an_option_is_refused(recorder: Grafter, tmp_path: Path, tag: str) -> None:
    """A file could else name a transform, which is code."""
    recorder.dump("h", torch.ones(1))
    recorder.close()
    change_record(tmp_path, {"tags": {tag: "os.system"}})
    with pytest.raises(DumpError, match=f"{tag} cannot be a tag. The recording is damaged, or was tampered with"):
        played(tmp_path)


@pytest.mark.parametrize(
    "header", ["", "{", "[]", '{"header": {}}', "{" * 9000, '{"header": {"role": "target", "role_rank": 0}}']
)
def test_a_header_that_is_none_costs_its_point(recorder: Grafter, tmp_path: Path, header: str) -> None:
    """It is played as a point that has nothing to offer, for that reason."""
    recorder.dump("h", torch.ones(1))
    recorder.close()
    change_record(tmp_path, {"header": header})
    (one,) = played(tmp_path).ranks[0].points
    assert "what the recording says of it cannot be read" in str(one.offer().nothing)


def part_with(directory: Path, **changes: Any) -> dict[str, Any]:
    (line,) = lines_of(directory).read_text().splitlines()
    part = RecordedPart.model_validate_json(DumpRecord.model_validate_json(line).header or "")
    return {"header": json.dumps({"header": {**json.loads(part.header.model_dump_json()), **changes}})}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leaves": []}, "its header describes no tensors"),
        ({"leaves": [{"path": "", "shape": [2], "dtype": "float32", "device": "cpu"}]}, "its header says float32[2]"),
        ({"leaves": [{"path": "['x']", "shape": [1], "dtype": "float32", "device": "cpu"}]}, "has no leaf"),
        ({"layouts": [None, None]}, "other layouts than tensors"),
        (
            {"extras": "{}", "extras_tensors": [{"path": "0", "shape": [1], "dtype": "int8", "device": "cpu"}]},
            "0 are in",
        ),
        ({"participants": [[1, 2, 1]]}, "its participants do not belong to this job"),
        ({"role_rank": 5}, "it belongs to another rank"),
    ],
)
def test_a_header_that_does_not_fit_its_file_costs_its_point(
    recorder: Grafter, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Whatever a header claims is compared with what the file has."""
    recorder.dump("h", torch.ones(1))
    recorder.close()
    change_record(tmp_path, part_with(tmp_path, **changes))
    (one,) = played(tmp_path).ranks[0].points
    assert reason in str(one.offer().nothing)


def test_a_file_that_is_gone_or_cut_costs_its_point(recorder: Grafter, tmp_path: Path) -> None:
    """The reason names the file; the other points are played."""
    for layer in range(3):
        recorder.dump("h", torch.ones(1), layer_id=layer)
    recorder.close()
    first, second, _ = sorted((tmp_path / "r" / "baseline" / "rank0").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-2])
    offers = [one.offer() for one in played(tmp_path).ranks[0].points]
    assert "there is no such file" in str(offers[0].nothing)
    assert "truncated" in str(offers[1].nothing)
    assert offers[2].nothing is None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    """A recording of one point, by path within the run."""
    directory = tmp_path_factory.mktemp("sound")
    recorder = Grafter(config(directory))
    recorder.dump("h", torch.ones(1), extras={"t": torch.ones(2)}, dims="h")
    recorder.close()
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["rank0.dumps.jsonl", "rank0.recording.json", "000000-h.safetensors"]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(32, 126)), min_size=1, max_size=4),
)
def test_no_damage_does_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, sound: dict[Path, bytes], name: str, changes: list[tuple[int, int]]
) -> None:
    """Bytes changed anywhere: a DumpError, or points that offer something or say why not."""
    directory = tmp_path_factory.mktemp("damaged")
    for path, content in sound.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        damaged = bytearray(content)
        for at, byte in changes if path.name == name else ():
            damaged[at % len(damaged)] = byte
        (directory / path).write_bytes(bytes(damaged))
    try:
        points = played(directory).ranks[0].points
    except DumpError:
        return
    for one in points:
        offer = one.offer()
        assert (offer.leaves is None) == (offer.nothing is not None or offer.failure is not None)


# Settings.


def test_recording_alone_needs_a_filter_and_no_port() -> None:
    """GRAFTER_RECORD and GRAFTER_PEER need no port, and a filter of a direction."""
    base = {"GRAFTER_ENABLE": "1", "GRAFTER_ROLE": "target"}
    recording = GrafterConfig.from_environment({**base, "GRAFTER_RECORD": "1", "GRAFTER_B2T_FILTER": "True"})
    assert recording.records_alone and recording.only_dumps
    live = GrafterConfig.from_environment(
        {**base, "GRAFTER_RECORD": "1", "GRAFTER_B2T_FILTER": "True", "GRAFTER_MASTER_PORT": "29400"}
    )
    assert not live.records_alone and not live.only_dumps
    grafting = GrafterConfig.from_environment({**base, "GRAFTER_PEER": "x", "GRAFTER_B2T_FILTER": "True"})
    assert not grafting.only_dumps
    for setting in ("RECORD", "PEER"):
        with pytest.raises(ConfigError, match=f"a filter for GRAFTER_{setting}: it is for the points that one of"):
            GrafterConfig.from_environment({**base, f"GRAFTER_{setting}": "1", "GRAFTER_DUMP_FILTER": "True"})
    with pytest.raises(ConfigError, match="master_port"):
        GrafterConfig.from_environment({**base, "GRAFTER_B2T_FILTER": "True"})


def test_a_peer_that_cannot_be_is_refused_on_every_rank(recorder: Grafter, tmp_path: Path) -> None:
    """No recording, another key, or several ranks without a port: told before anything is opened."""
    recorder.dump("h", torch.ones(1))
    recorder.close()
    peer = {"role": "target", "record": False, "peer": str(tmp_path / "r")}
    two_ranks = Place("target", 1, 2)
    for fields, place, reason in (
        ({"peer": str(tmp_path / "absent")}, two_ranks, "GRAFTER_PEER=.*there is no such directory"),
        (
            {"key": "layer_id", "b2t_filter": "True"},
            two_ranks,
            "the recording has GRAFTER_KEY=unset, and here it is layer",
        ),
        ({}, two_ranks, "the target has 2 ranks, which must meet at one port: set GRAFTER_MASTER_PORT"),
        ({"role": "baseline"}, Place("baseline", 0, 1), "a recording of the target is needed here"),
    ):
        with pytest.raises(ConfigError, match=reason):
            start_peer(config(tmp_path, **{**peer, **fields}), place)
    assert start_peer(config(tmp_path, **peer, master_port=29400), two_ranks) is None


def test_the_store_is_hosted_by_the_live_side(tmp_path: Path) -> None:
    """Both sides name one rank: rank 0 of the live job, whatever its role; `grafter run` where it hosts."""
    live, player = Place("target", 1, 2), Place("baseline", 0, 1)
    assert store_place(config(tmp_path, role="target", record=False, peer="x"), live) == ("target", 0)
    assert store_place(config(tmp_path, record=False, store_host="peer", master_port=1), player) == ("target", 0)
    assert store_place(config(tmp_path, record=False, master_port=1), live) == ("baseline", 0)
    assert store_place(config(tmp_path, record=False, peer="x", store_host="launcher"), live) is None


def test_the_player_has_the_jobs_settings_and_no_hooks() -> None:
    """It finds this package, and no start-up module; what was inherited of another place is gone."""
    inherited = {"GRAFTER_ATTACH": "*", "GRAFTER_PEER": "x", "GRAFTER_RECORD": "1", "RANK": "3", "PYTHONPATH": "/mine"}
    environment = player_environment(
        {**inherited, "PYTHONPATH": f"{STARTUP_DIRECTORY}:/mine"}, "baseline", {"timeout": "9", "attach": "*"},
        master=("127.0.0.1", 5), directory="/d", run_name=None,
    )  # fmt: skip
    assert environment["PYTHONPATH"].split(":") == ["/mine", str(Path(__file__).parents[2])]
    assert environment["GRAFTER_TIMEOUT"] == "9"
    assert not environment.get("GRAFTER_ATTACH")
    assert not {"GRAFTER_PEER", "GRAFTER_RECORD", "RANK"} & environment.keys()


# Words.


def line(role: str, state: str, **fields: Any) -> BoardLine:
    return BoardLine(role=role, role_rank=0, graft_rank=role == "target", sequence=1, state=state, since=0.0, **fields)


def test_messages_say_which_side_is_a_recording() -> None:
    """The board and the error name the recording and where it ends; a rank that left says so in its words."""
    recording = PlayedFrom(directory="/runs/old/baseline", points=4, last_step=1)
    left = line("baseline", "left", played_from=recording)
    waiting = line("target", "waiting", point="'h' (step=2)", digest="d", participants=(1,))
    text = str(explain_stuck([waiting], {}, describe_board([left, waiting]), [left, waiting]))
    assert text.startswith(
        "the baseline is a recording, and the recording ends after step 1; it has no more points: target waits for 'h' "
        "(step=2)."
    )
    assert (
        "baseline rank 0 (played from /runs/old/baseline) has left (the recording ends after step 1; it has no more "
        "points)" in text
    )
    stays = line("baseline", "waiting", played_from=recording, point="'x' (step=1)", digest="e", participants=(0,))
    text = str(explain_stuck([stays, waiting], {}, "", [stays, waiting]))
    assert text.startswith("the baseline is a recording, and this job asks for points that it lacks")
    crashed = line("baseline", "left", played_from=recording, note="DumpError: x")
    assert "has left with DumpError: x" in describe_board([crashed])
