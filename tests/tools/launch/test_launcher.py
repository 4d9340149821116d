"""`grafter run` as functions: real small processes, real signals, and a store that only remembers."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_store import FakeStore

from grafter import errors
from grafter.tools.launch import launcher
from grafter.tools.launch.job_keeper import descendants
from grafter.tools.launch.launcher import PairResult, find_unreached, run_pair, run_side

SETTINGS = {"b2t_filter": "name == 'x'"}
FAKE_GRAFTER = [sys.executable, str(Path(__file__).parents[2] / "parts" / "fake_store.py")]
# Long enough for any test; found by its number, so that a leftover is known to be of this test.
_SLEEPS = iter(range(1_000_000 + os.getpid() * 100, 2_000_000_000))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """The store that the launcher of this test hosts; closed at the end of each run, which is checked."""
    fake = FakeStore()
    monkeypatch.setattr(launcher, "host_store", lambda address, port, **kinds: fake)
    yield fake
    assert fake.closed, "the launcher left its store open"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def long_sleep() -> tuple[str, Callable[[], bool]]:
    """(a shell command that sleeps for ever, whether a process of it is alive)."""
    number = str(next(_SLEEPS))

    def lives() -> bool:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[:2] == [b"sleep", number.encode()]:
                    return True
        return False

    return f"sleep {number}", lives


def wait_until(condition: Callable[[], bool], seconds: float = 250) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def run(baseline: list[str] | str, target: list[str] | str, out: Path, **options: object) -> tuple[PairResult, str]:
    output = io.StringIO()
    result = run_pair(baseline, target, settings=SETTINGS, out=out, output=output, **options)  # type: ignore[arg-type]
    return result, output.getvalue()


# Output.


def test_every_line_carries_its_job(store: FakeStore, tmp_path: Path) -> None:
    """Each line of both outputs, of stdout and stderr, is printed once with its job's name, a last partial one too."""
    code = "import sys; print('one'); print('two', file=sys.stderr, flush=True); print('three', end='')"
    _, text = run(python(code), python("print('hello')"), tmp_path)
    assert sorted(line for line in text.splitlines() if not line.startswith("[grafter]")) == [
        "[baseline] one",
        "[baseline] three",
        "[baseline] two",
        "[target] hello",
    ]
    assert "\x1b" not in text


def test_no_output_is_lost_at_exit(store: FakeStore, tmp_path: Path) -> None:
    """Two jobs that write a megabyte each and exit at once are printed whole, and in order."""
    code = "import sys; sys.stdout.write(''.join('%06d\\n' % i for i in range(150000))); sys.stdout.flush()"
    _, text = run(python(code), python(code), tmp_path)
    lines = text.splitlines()
    for role in ("baseline", "target"):
        assert [line for line in lines if line.startswith(f"[{role}] ")] == [f"[{role}] {i:06d}" for i in range(150000)]


def test_a_chatty_job_does_not_block_the_other(store: FakeStore, tmp_path: Path) -> None:
    """While one job writes without end, the other starts, speaks and ends; then the first is ended."""
    chatty = python("import sys\nwhile True: sys.stdout.write('x' * 4000 + '\\n')")
    result, text = run(chatty, python("print('spoken'); raise SystemExit(4)"), tmp_path, grace_seconds=0.2)
    assert "[target] spoken" in text
    assert result.exit_codes["target"] == 4


def test_a_wait_is_printed_in_a_pipe(store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the store's summary is what is printed, with grafter's prefix."""
    monkeypatch.setattr("grafter.tools.launch.supervision._TELL_WAIT_AFTER_SECONDS", 0.0)
    store.waiting = "target rank 0 waits for 'layer' (layer_id=3) since 12 s"
    _, text = run(["sleep", "0.2"], ["sleep", "0.2"], tmp_path)
    assert f"[grafter] {store.waiting}\n" in text


# Ends.


def test_exit_codes_are_the_jobs_own(store: FakeStore, tmp_path: Path) -> None:
    """Exit codes and signals are told per role and to the waiting ranks; the first to fail is named."""
    result, text = run(
        python("import time; time.sleep(0.3); import os; os.kill(os.getpid(), 9)"), ["sh", "-c", "exit 3"], tmp_path
    )
    assert result.exit_codes == {"baseline": -9, "target": 3}
    assert result.failed_role == "target"
    assert result.ended_roles == ()
    assert sorted(store.exits) == [("baseline", "was killed by SIGKILL"), ("target", "exited with code 3")]
    assert "[grafter] the target job exited with code 3." in text


def test_a_job_that_ends_well_lets_the_other_run_on(store: FakeStore, tmp_path: Path) -> None:
    """Exit code 0 of one job starts no grace period for the other."""
    result, _ = run(["true"], ["sleep", "0.6"], tmp_path, grace_seconds=0.1)
    assert result.exit_codes == {"baseline": 0, "target": 0}
    assert result.failed_role is None
    assert result.ended_roles == ()


def test_a_failure_ends_the_other_after_the_grace(store: FakeStore, tmp_path: Path) -> None:
    """The other job is ended when its time is up, is not called a failure, and nothing of it is left."""
    sleep, lives = long_sleep()
    result, _ = run(["false"], sleep, tmp_path, grace_seconds=0.2)
    assert result.exit_codes == {"baseline": 1, "target": -signal.SIGTERM}
    assert result.failed_role == "baseline"
    assert result.ended_roles == ("target",)
    assert not lives()


def test_what_ignores_sigterm_is_killed(store: FakeStore, tmp_path: Path) -> None:
    """A job that ignores SIGTERM, with a child in a session of its own that does so too, is gone after the 5 s."""
    sleep, lives = long_sleep()
    stubborn = ["bash", "-c", f"trap '' TERM; setsid {sleep} & wait; wait"]
    begun = time.monotonic()
    result, _ = run(stubborn, ["sh", "-c", "sleep 0.3; exit 1"], tmp_path, grace_seconds=0.0)
    assert result.exit_codes["baseline"] == -signal.SIGKILL
    assert time.monotonic() - begun >= 5.0
    assert not lives()


def test_what_a_job_leaves_behind_is_ended(store: FakeStore, tmp_path: Path) -> None:
    """Daemons of a job, twice forked and in sessions of their own, do not outlive it, whatever they ignore."""
    sleep, lives = long_sleep()
    stubborn, stubborn_lives = long_sleep()
    command = f"setsid bash -c '{sleep} & disown' ; setsid bash -c \"trap '' TERM; {stubborn} & disown\"; exit 0"
    result, text = run(["bash", "-c", command], ["true"], tmp_path)
    assert result.exit_codes == {"baseline": 0, "target": 0}
    assert not lives() and not stubborn_lives()
    assert "the baseline job left 1 process behind; killed." in text


def test_other_children_of_this_process_are_left_alone(store: FakeStore, tmp_path: Path) -> None:
    """The launcher ends what belongs to its jobs, and no other process that its own process started."""
    own = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        run(["false"], ["sleep", "60"], tmp_path, grace_seconds=0.1)
        assert own.poll() is None
    finally:
        own.kill()
        own.wait()


def test_no_descriptor_is_left(store: FakeStore, tmp_path: Path) -> None:
    """A run gives back every file descriptor that it opened."""
    run(["true"], ["true"], tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    run(["true"], ["true"], tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_left_when_the_launcher_fails(
    store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error inside of the launcher kills the jobs before it is raised."""
    sleep, lives = long_sleep()

    def fail() -> str:
        assert wait_until(lives)
        raise ZeroDivisionError

    monkeypatch.setattr(store, "waiting_summary", fail)
    with pytest.raises(ZeroDivisionError):
        run(sleep, sleep, tmp_path)
    assert not lives()


def test_descendants_are_found_through_all_generations() -> None:
    """Children of children are found, others are not."""
    assert sorted(descendants(1, {2: 1, 3: 2, 4: 3, 5: 0, 6: 5})) == [2, 3, 4]


# Signals.


def start_grafter(baseline: str, target: str, out: Path, **environment: str) -> subprocess.Popen[str]:
    command = [
        *FAKE_GRAFTER,
        "run",
        "--baseline",
        baseline,
        "--target",
        target,
        "--b2t",
        "name == 'x'",
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_both_jobs_and_leaves_nothing(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end both jobs, sessions of their own too, print the summary and give the shell's exit code."""
    sleep, lives = long_sleep()
    other, other_lives = long_sleep()
    process = start_grafter(sleep, f"bash -c 'setsid {other} & wait'", tmp_path / "out")
    assert wait_until(lambda: lives() and other_lives())
    process.send_signal(number)
    text, _ = process.communicate(timeout=250)
    assert process.returncode == exit_code
    assert not lives() and not other_lives()
    assert f"{number.name}: ending what runs" in text
    assert "no points" in text
    assert not (tmp_path / "out").exists()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    """Jobs that ignore SIGTERM have 5 s; a second Ctrl-C does not let them work on for so long."""
    refused, worked = tmp_path / "refused", tmp_path / "worked"
    stubborn = f"trap 'echo > {refused}' TERM; while true; do sleep 0.1; echo >> {worked}; done"
    process = start_grafter(shlex.join(["bash", "-c", stubborn]), "sleep 60", tmp_path / "out")
    assert wait_until(worked.exists)
    process.send_signal(signal.SIGINT)
    assert wait_until(refused.exists)
    before = len(worked.read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=250)
    assert len(worked.read_text()) - before < 40
    assert process.returncode == 130


def test_sigkill_of_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    """When the launcher is killed, both jobs end, and so does a grandchild in a session of its own."""
    sleep, lives = long_sleep()
    other, other_lives = long_sleep()
    process = start_grafter(sleep, f"bash -c 'setsid {other} & wait'", tmp_path)
    assert wait_until(lambda: lives() and other_lives())
    process.kill()
    process.communicate(timeout=250)
    assert wait_until(lambda: not lives() and not other_lives())


def test_sigkill_of_a_keeper_is_told_and_ends_its_job(store: FakeStore, tmp_path: Path) -> None:
    """A job whose keeper is killed ends with it, and the run says that its end was not seen."""
    sleep, lives = long_sleep()
    command = ["sh", "-c", f"kill -9 $PPID; exec {sleep}"]
    result, _ = run(command, ["sleep", "0.5"], tmp_path, grace_seconds=0.1)
    assert wait_until(lambda: not lives())
    assert result.exit_codes["baseline"] is None
    assert result.failed_role == "baseline"
    assert ("baseline", "was lost: its keeper process was killed from outside") in store.exits


def test_a_reader_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    """`grafter run | head` ends both jobs once nobody reads any more."""
    sleep, lives = long_sleep()
    chatty = shlex.join(python("import time\nwhile True: print('x', flush=True); time.sleep(0.01)"))
    process = start_grafter(chatty, sleep, tmp_path)
    assert wait_until(lives)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=250) == 128 + signal.SIGPIPE
    assert not lives()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_stay_ignored(number: signal.Signals, tmp_path: Path) -> None:
    """Under nohup a hang-up, and in a script's background job Ctrl-C, ends neither the launcher nor its jobs."""
    code = f"import os, signal; os.kill(os.getpid(), {int(number)}); print(signal.getsignal({int(number)}).name)"
    job = shlex.join(python(code))
    command = [*FAKE_GRAFTER, "run", "--baseline", job, "--target", "sleep 1", "--b2t", "name == 'x'"]
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' {number.name[3:]}; exec " + shlex.join([*command, "--out", str(tmp_path)])],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    text, _ = process.communicate(timeout=250)
    assert number.name not in text
    assert "SIG_IGN" in text
    assert process.returncode == 1  # nothing was grafted


# Before anything starts.


def test_a_program_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    """A misspelt program is named with its role, and the other job is not started."""
    mark = tmp_path / "started"
    with pytest.raises(errors.UsageError, match=r"the target command starts with 'no-such-program'.*PATH"):
        run(["touch", str(mark)], "no-such-program --x", tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_bad_setting_is_told_before_anything_starts(tmp_path: Path) -> None:
    """Settings are read as the jobs will read them; the message names the filter's fault."""
    with pytest.raises(errors.FilterError, match="GRAFTER_B2T_FILTER"):
        run_pair(["true"], ["true"], settings={"b2t_filter": "name ="}, out=tmp_path)


def test_a_used_name_is_refused(tmp_path: Path) -> None:
    """A second run of one name would append to the first one's ledgers."""
    (tmp_path / "mine" / "target").mkdir(parents=True)
    (tmp_path / "mine" / "target" / "rank0.ledger.jsonl").touch()
    with pytest.raises(errors.UsageError, match="already holds a run"):
        run(["true"], ["true"], tmp_path, run_name="mine")


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    """`run_side` on a taken port raises before its job starts; the real store says so."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.JoinError, match="in use"):
            run_side(
                "baseline", ["touch", str(tmp_path / "x")], settings=SETTINGS, host=taken.getsockname(), out=tmp_path
            )
    assert not (tmp_path / "x").exists()


# Environment and commands.


def test_a_job_gets_that_environment(store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A started job sees its role and no inherited rank, has its own session, and an empty stdin."""
    monkeypatch.setenv("RANK", "5")
    code = "import os, sys; e = os.environ; own = os.getsid(0) == os.getpid()"
    code += "; print(e.get('RANK'), e['GRAFTER_ROLE'], own, sys.stdin.read())"
    _, text = run(python(code), ["true"], tmp_path)
    assert "[baseline] None baseline True \n" in text


def test_two_real_torchruns_on_one_host(store: FakeStore, tmp_path: Path) -> None:
    """Two plain torchrun commands run side by side, each with a free port of its own, and see only their own world."""
    script = tmp_path / "rank.py"
    # One write per line: unbuffered, `print` writes each part by itself, and lines of ranks may mix.
    script.write_text(
        'import os; e = os.environ; os.write(1, f\'world {e["WORLD_SIZE"]} {e["MASTER_PORT"]}\\n\'.encode())'
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    result, text = run([*command, "1", str(script)], [*command, "2", str(script)], tmp_path / "out")
    assert result.exit_codes == {"baseline": 0, "target": 0}
    worlds = [line.split() for line in text.splitlines() if "] world" in line]
    assert sorted(words[2] for words in worlds) == ["1", "2", "2"]
    assert len({words[3] for words in worlds}) == 2


def test_a_quiet_run_prints_nothing_and_keeps_the_last_lines(store: FakeStore, tmp_path: Path) -> None:
    """`quiet` is for callers with a table of their own; what a job said last is in the result."""
    result, text = run(["sh", "-c", "echo why; exit 1"], ["true"], tmp_path, quiet=True)
    assert text == ""
    assert result.last_lines == {"baseline": ["why"], "target": []}


def test_runs_of_one_second_have_names_of_their_own(store: FakeStore, tmp_path: Path) -> None:
    """Each run has a directory that no other has, and keeps it if something was written into it."""
    code = "import os; e = os.environ; open(os.path.join(e['GRAFTER_DIR'], e['GRAFTER_RUN_NAME'], 'x'), 'w')"
    directories = [run(python(code), ["true"], tmp_path)[0].run_directory for _ in range(2)]
    assert len(set(directories)) == 2
    assert all((directory / "x").exists() for directory in directories)


def test_one_side_each_on_two_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The side that hosts has the store's port and the run's name; the other side is given the master's place."""
    store = FakeStore()
    monkeypatch.setattr(launcher, "host_store", lambda address, port, **kinds: store)
    monkeypatch.setattr(launcher, "_LINGER_SECONDS", 0.0)
    code = "import os; e = os.environ; print(e['GRAFTER_ROLE'], e['GRAFTER_MASTER_PORT'], 'GRAFTER_RUN_NAME' in e)"
    texts = []
    for role, place in (("baseline", {"host": ("127.0.0.1", 0)}), ("target", {"master": ("127.0.0.1", 77)})):
        output = io.StringIO()
        result = run_side(role, python(code), settings=SETTINGS, out=tmp_path, output=output, **place)  # type: ignore[arg-type]
        assert result.exit_codes == {role: 0}
        texts.append(output.getvalue())
    assert "[baseline] baseline 1 True" in texts[0]
    assert "start the other side with --role target --master HOST:1" in texts[0]
    assert "[target] target 77 False" in texts[1]
    assert store.exits == [("baseline", "exited with code 0")]
    with pytest.raises(errors.UsageError, match="--host-store"):
        run_side("target", ["true"], settings=SETTINGS, out=tmp_path)


def test_only_jobs_that_had_their_chance_are_called_unreached() -> None:
    """A target cannot announce itself before the baseline, and a job that failed may not have come to its model."""
    assert find_unreached(["baseline", "target"], []) == ()
    assert find_unreached(["baseline"], []) == ("target",)
    assert find_unreached(["baseline"], ["target"]) == ()
    assert find_unreached([], []) == ("baseline",)
    assert find_unreached([], ["baseline"]) == ()


def test_a_used_recording_is_told_by_its_own_option(tmp_path: Path) -> None:
    """`--record DIR` takes the place of `--name`."""
    (tmp_path / "mine" / "target").mkdir(parents=True)
    (tmp_path / "mine" / "target" / "rank0.dumps.jsonl").touch()
    with pytest.raises(errors.UsageError, match="Give --record another directory, or move"):
        run_side("target", ["true"], settings={"b2t_filter": "True", "record": "1"}, out=tmp_path, run_name="mine")
