"""Limits of a dump, and which points are meant: pure, without a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.config.options import DumpChoice
from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import Place
from grafter.core.sizes import read_size, read_steps
from grafter.errors import ConfigError, LayoutError
from grafter.rank.grafter import Grafter
from grafter.store.dumps.limits import Limits
from grafter.store.dumps.rank_dumps import find_run_name, open_run


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("512MiB", 512 << 20), ("10 GiB", 10 << 30), ("1kib", 1024), ("3 b", 3)]
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    """Binary units, with and without a blank, in any case."""
    assert read_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5GiB", "10GB", "1e9", "9" * 19])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Decimal units, fractions and what is absurdly long are no sizes."""
    with pytest.raises(ValueError, match="10GiB"):
        read_size(text)


@given(st.lists(st.tuples(st.integers(0, 50), st.none() | st.integers(0, 20)), min_size=1, max_size=5))
def test_steps_are_those_of_the_ranges(ranges: list[tuple[int, int | None]]) -> None:
    """A step is allowed exactly if one of the ranges has it; each that is not is counted."""
    text = ",".join(f"{first}-" if more is None else f"{first}-{first + more}" for first, more in ranges)
    assert read_steps(text) == tuple((first, None if more is None else first + more) for first, more in ranges)
    limits = Limits(text, None, None, "baseline rank 0")
    meant = [step for step in range(80) if any(f <= step and (m is None or step <= f + m) for f, m in ranges)]
    assert [step for step in range(80) if limits.allows_step(step)] == meant
    assert limits.left_out["steps"] == 80 - len(meant)


def test_a_limit_that_is_reached_stays_reached(caplog: pytest.LogCaptureFixture) -> None:
    """After a point that is too large, a small one is not saved either: there is no hole. It is said once, counted."""
    limits = Limits(None, "100", None, "baseline rank 0")
    assert [limits.take(n) for n in (60, 50, 1, 40)] == [True, False, False, False]
    assert limits.left_out == {"bytes": 3}
    assert [record.getMessage().count("GRAFTER_DUMP_MAX_BYTES") for record in caplog.records] == [1]


def test_points_are_counted() -> None:
    """So many points, and no more."""
    limits = Limits(None, None, 2, "baseline rank 0")
    assert [limits.take(0) for _ in range(4)] == [True, True, False, False]
    assert limits.left_out == {"points": 2}


def choice(**settings: Any) -> DumpChoice:
    return DumpChoice(GrafterConfig(**settings))


@pytest.mark.parametrize(
    ("ruled", "said", "filtered", "saved"),
    [
        (None, None, False, False),
        (None, None, True, True),
        (None, False, True, False),
        (None, True, False, True),
        (False, True, True, False),
        (True, False, False, True),
    ],
)
def test_the_plan_file_wins_over_the_call_and_the_call_over_the_filter(
    ruled: bool | None, said: bool | None, filtered: bool, saved: bool
) -> None:
    """Whether a point is saved: its rule's `save`, else its own, else the dump filter's answer."""
    rules = [] if ruled is None else [{"match": "x", "save": ruled}]
    chosen = choice(dump_filter="name == 'x'" if filtered else "name == 'y'", rules=rules)
    tags = {"name": "x", "step": 0, "phase": "forward", "save": said}
    assert chosen.saves(tags) is saved
    # A point for which no filter of a direction asks is found only if the matcher says yes, or the call itself does.
    assert chosen.matcher is not None
    if saved and not said:
        assert chosen.matcher(tags)


def test_a_dump_filter_that_never_matched_is_told() -> None:
    """As the other filters, by its name and text."""
    chosen = choice(dump_filter="layer_id == 3")
    assert chosen.never_matched() == ["dump: layer_id == 3"]
    chosen.saves({"name": "x", "layer_id": 3})
    assert chosen.never_matched() == []


def test_a_dump_filter_may_read_what_differs_between_ranks() -> None:
    """Nobody has to agree on what is saved; what is no tag at all is still refused."""
    assert GrafterConfig(dump_filter="tp_rank == 0").saved_points is not None
    with pytest.raises(ConfigError, match="occurrence"):
        GrafterConfig(dump_filter="occurrence == 0")
    with pytest.raises(ConfigError, match="argument of"):
        GrafterConfig(dump_filter="extras == 0")


@pytest.mark.parametrize("more", [{"dump_filter": "True"}, {"rules": [{"match": "x", "save": True}]}])
def test_a_run_that_only_dumps_needs_no_port(more: dict[str, Any]) -> None:
    """A dump filter, or a rule that saves, is enough; with a filter of a direction the port is required again."""
    config = GrafterConfig(enable=True, role="baseline", **more)
    assert config.only_dumps
    with pytest.raises(ConfigError, match="master_port"):
        GrafterConfig(enable=True, role="baseline", b2t_filter="True", **more)


def test_without_any_filter_the_dump_filter_is_offered() -> None:
    """The message that a filter is missing names it."""
    with pytest.raises(ConfigError, match="GRAFTER_DUMP_FILTER"):
        GrafterConfig.from_environment({"GRAFTER_ENABLE": "1", "GRAFTER_ROLE": "baseline"})


PAIR = Place("baseline", 1, 2)


def test_a_single_rank_is_called_by_the_time() -> None:
    """Nobody else needs to know the name."""
    assert find_run_name(Place("baseline", 0, 1), {}).count("-") == 1


def test_ranks_of_torchrun_agree_on_a_name_without_a_store() -> None:
    """By the id that torchrun gives all of them; or, on one machine, by torchrun's own process."""
    assert find_run_name(PAIR, {"TORCHELASTIC_RUN_ID": "ab/../c"}) == "job-ab_.._c"
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    assert find_run_name(PAIR, torchrun).startswith(f"job-{os.getppid()}-")


@pytest.mark.parametrize(
    "environ", [{}, {"LOCAL_WORLD_SIZE": "2"}, {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}]
)
def test_ranks_that_cannot_agree_are_told_what_to_set(environ: dict[str, str]) -> None:
    """Several machines without an id, or ranks that were started by hand: GRAFTER_RUN_NAME is needed."""
    with pytest.raises(ConfigError, match="GRAFTER_RUN_NAME"):
        find_run_name(PAIR, environ)


def test_a_second_run_of_one_name_is_refused_and_damages_nothing(tmp_path: Path) -> None:
    """It is refused at its first point and at every later one, and each file of the first run stays as it is."""

    def settings() -> GrafterConfig:
        return GrafterConfig(enable=True, role="baseline", dump_filter="True", dir=str(tmp_path), run_name="one")

    first = Grafter(settings())
    first.dump("h", torch.ones(2))
    first.close()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.name == "run.json" for path in files) and any("summary" in path.name for path in files)
    second = Grafter(settings())
    second.attach(torch.nn.Linear(2, 2), ("*",))
    for _ in range(2):
        with pytest.raises(ConfigError, match="two runs would mix"):
            second.dump("other", torch.zeros(2))
    second.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    with pytest.raises(ConfigError, match="two runs would mix"):
        open_run(settings(), Place("baseline", 0, 1))


def test_a_lone_rank_says_where_its_points_lie_and_what_it_saw(tmp_path: Path, caplog: Any) -> None:
    """At close: the directory of its role, and with a filter that never matched the names that came."""
    config = {"enable": True, "role": "baseline", "dir": str(tmp_path), "run_name": "one"}
    grafter = Grafter(GrafterConfig(dump_filter="name == 'blok_out'", **config))
    with caplog.at_level("INFO", logger="grafter"):
        grafter.dump("block_out", torch.ones(2))
        grafter.dump("logits", torch.ones(2))
        grafter.close()
    assert f"closes: no point, in {tmp_path / 'one' / 'baseline'}; 2 calls matched no filter" in caplog.text
    assert "the filter dump: name == 'blok_out' never matched (points seen: block_out, logits)" in caplog.text


def test_a_wrong_layout_is_told_with_its_point(tmp_path: Path) -> None:
    """The character alone does not say which of a program's calls is meant."""
    config = {"enable": True, "role": "baseline", "dir": str(tmp_path), "run_name": "one"}
    grafter = Grafter(GrafterConfig(b2t_filter="True", record=True, **config))
    with pytest.raises(LayoutError, match=r"the point 'hidden': dims, character 5 .*as in `h\[tp\]`"):
        grafter.dump("hidden", torch.ones(2, 2), dims="b h[]")
    grafter.close()
