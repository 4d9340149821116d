"""What a job is started with: its environment, its settings, its command."""

from __future__ import annotations

import os
import shlex

import pytest

from grafter import errors
from grafter.rank.job_environment import job_environment, parse_settings
from grafter.tools.launch.job import keep_off_shared_port, split_command


@pytest.mark.parametrize(
    ("command", "message"), [("", "is empty"), ("python 'a", "No closing quotation"), ("A=1 python", "env NAME=value")]
)
def test_bad_commands_are_explained(command: str, message: str) -> None:
    """Commands that no shell would see are told apart by what is wrong with them."""
    with pytest.raises(errors.UsageError, match=message):
        split_command("target", command, os.environ)


def test_the_environment_of_a_job() -> None:
    """What belongs to another world or run is taken away, what makes this run is set, the rest is inherited."""
    inherited = {
        "PATH": "/bin",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GRAFTER_ROLE": "target",
        "GRAFTER_RANK": "4",
        "DUMPER_GRAFTER_RUN_NAME": "old",
        "DUMPER_GRAFTER_T2B_FILTER": "name == 'old'",
        "GRAFTER_TIMEOUT": "7",
        "GRAFTER_SECRET": "s",
        "TORCH_CPP_LOG_LEVEL": "INFO",
    }
    assert job_environment(
        inherited, "baseline", {"t2b_filter": "name == 'x'"}, master=("127.0.0.1", 5), directory="/out", run_name="r"
    ) == {
        "PATH": "/bin",
        "GRAFTER_ENABLE": "1",
        "GRAFTER_ROLE": "baseline",
        "GRAFTER_MASTER_ADDRESS": "127.0.0.1",
        "GRAFTER_MASTER_PORT": "5",
        "GRAFTER_STORE_HOST": "launcher",
        "GRAFTER_RUN_NAME": "r",
        "GRAFTER_DIR": "/out",
        "GRAFTER_T2B_FILTER": "name == 'x'",
        "GRAFTER_TIMEOUT": "7",
        "GRAFTER_SECRET": "s",
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("timeout", "FIELD=VALUE"),
        ("secret=abc", "list of processes"),
        ("SECRET=abc", "list of processes"),
        ("dir=x", "--out"),
        ("role=target", "--role"),
        ("master_port=1", "--host-store"),
    ],
)
def test_settings_that_set_refuses(assignment: str, message: str) -> None:
    """What `--set` cannot set is refused with what to use instead, and a secret's value is not repeated."""
    with pytest.raises(errors.UsageError, match=message) as caught:
        parse_settings([assignment])
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc-per-node 2 a.py --standalone",
        "python3.11 -u -m torch.distributed.run a.py",
        "env A=1 torchrun a.py",
    ],
)
def test_a_torchrun_without_port_is_kept_off_the_other(command: str) -> None:
    """torchrun commands that would meet at port 29500 are started with --standalone, before their other arguments."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(("torchrun", "distributed.run"))) + 1
    assert keep_off_shared_port(words) == [*words[:start], "--standalone", *words[start:]]


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --standalone a.py",
        "torchrun --rdzv-endpoint localhost:0 --rdzv-backend c10d a.py",
        "torchrun --master-port 1234 a.py",
        "torchrun --master_port=29500 a.py",
        "torchrun --nnodes 2 --node-rank 0 a.py",
        "torchrun --no-such-option a.py",
        "python torchrun",
        "python -m mine torchrun a.py",
        "env",
        "sleep 1",
    ],
)
def test_other_commands_are_left_as_they_are(command: str) -> None:
    """A torchrun that says where it meets, and what is no torchrun, is started as it was given."""
    assert keep_off_shared_port(shlex.split(command)) == shlex.split(command)
