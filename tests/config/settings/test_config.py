"""The configuration: every field from each source, errors in the order a person can act on, secrets kept."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafter.config.settings.config import SETTING_FIELDS, GrafterConfig
from grafter.errors import ConfigError, FilterError

# One legal value of every field, other than its default: as text, and as the value that it becomes.
EXAMPLES: dict[str, tuple[str, Any]] = {
    "enable": ("yes", True),
    "role": ("target", "target"),
    "b2t_filter": ("layer_id == 3", "layer_id == 3"),
    "t2b_filter": ("layer_id == 4", "layer_id == 4"),
    "compare_filter": ("name == 'x'", "name == 'x'"),
    "master_address": ("10.0.0.1", "10.0.0.1"),
    "master_port": ("29500", 29500),
    "baseline_world_size": ("2", 2),
    "target_world_size": ("4", 4),
    "rank": ("3", 3),
    "backend": ("gloo", "gloo"),
    "group_name": ("pair-2", "pair-2"),
    "timeout": ("1.5", 1.5),
    "join_timeout": ("60", 60.0),
    "stats": ("light", "light"),
    "log_level": ("DEBUG", "debug"),
    "key": ("layer_id, expert", "layer_id, expert"),
    "transform_path": ("cook.py:transform", "cook.py:transform"),
    "on_transform_error": ("raise", "raise"),
    "on_peer_loss": ("detach", "detach"),
    "write": ("return", "return"),
    "gradient": ("cut", "cut"),
    "wait": ("job", "job"),
    "one_sided": ("skip", "skip"),
    "outbox_bytes": ("64MiB", "64MiB"),
    "outbox_seconds": ("1.5", 1.5),
    "dir": ("out/here", "out/here"),
    "run_name": ("monday", "monday"),
    "record": ("on", True),
    "peer": ("runs/good", "runs/good"),
    "store_host": ("launcher", "launcher"),
    "baseline_axes": ("dp=2 tp=4", "dp=2 tp=4"),
    "target_axes": ("tp=4", "tp=4"),
    "check_replicas": ("on", True),
    "partial_target": ("first", "first"),
    "gradients": ("on", True),
    "attach": ("model.layers.* !*.norm", "model.layers.* !*.norm"),
    "step": ("forward", "forward"),
    "baseline_models": ("policy=policy, ref_model=ref", "policy=policy, ref_model=ref"),
    "target_models": ("actor=", "actor="),
    "baseline_warm_up": ("1", 1),
    "target_warm_up": ("2", 2),
    "weight_gradients": ("optimizer_step", "optimizer_step"),
    "dump_filter": ("tp_rank == 0", "tp_rank == 0"),
    "dump_level": ("checksum", "checksum"),
    "windows": ("off", False),
    "start": ("512", 512),
    "new_rows_only": ("on", True),
    "dump_steps": ("0-3,10,20-", "0-3,10,20-"),
    "dump_max_bytes": ("10 GiB", "10 GiB"),
    "dump_max_points": ("1000", 1000),
    "dump_queue_bytes": ("64MiB", "64MiB"),
    "dump_exclude": ("none", "none"),
}
# These have tests of their own.
OTHERS = {"plan", "secret"}

WORKING = {
    "GRAFTER_ENABLE": "1",
    "GRAFTER_ROLE": "baseline",
    "GRAFTER_MASTER_PORT": "29500",
    "GRAFTER_B2T_FILTER": "layer_id == 3",
}


def read(**environ: str) -> GrafterConfig:
    return GrafterConfig.from_environment(environ)


def fault(**environ: str) -> str:
    with pytest.raises(ConfigError) as raised:
        read(**environ)
    message = str(raised.value)
    for word in ("validation error", "pydantic", "input_value", "type="):
        assert word not in message
    return message


# ---- sources


def test_the_examples_cover_every_field() -> None:
    """No field of the configuration goes untested here."""
    assert set(EXAMPLES) | OTHERS == set(SETTING_FIELDS)


@pytest.mark.parametrize("prefix", ["GRAFTER_", "DUMPER_GRAFTER_"])
@pytest.mark.parametrize("field", EXAMPLES)
def test_every_field_is_read_under_its_name_and_its_old_name(prefix: str, field: str) -> None:
    """GRAFTER_<FIELD> and DUMPER_GRAFTER_<FIELD> set the field; blanks around the value do not matter."""
    text, value = EXAMPLES[field]
    config = read(
        **{**WORKING, "GRAFTER_KEY": "layer_id, name"} | _without(field) | {prefix + field.upper(): f" {text}\n"}
    )
    assert getattr(config, field) == value


def _without(field: str) -> dict[str, str]:
    # A blank value unsets what WORKING sets; only the filter may read other tags than `key` lists.
    return {f"GRAFTER_{field.upper()}": " "}


@pytest.mark.parametrize("field", EXAMPLES)
def test_every_field_is_read_from_the_plan_file_and_the_environment_wins(field: str, tmp_path: Path) -> None:
    """Environment before plan file before default, for each field that a plan file may hold."""
    text, value = EXAMPLES[field]
    plan = tmp_path / "plan.yaml"
    plan.write_text(f'{field}: "{text}"\n')
    if field == "enable":
        assert "GRAFTER_ENABLE" in fault(GRAFTER_PLAN=str(plan))
        return
    default = getattr(read(), field)
    assert default != value
    assert getattr(read(GRAFTER_PLAN=str(plan)), field) == value
    assert getattr(GrafterConfig(plan=str(plan)), field) == value
    if default is not None:
        config = read(**{"GRAFTER_PLAN": str(plan), f"GRAFTER_{field.upper()}": str(default)})
        assert getattr(config, field) == default


def test_blank_variables_are_unset() -> None:
    """Variables of white space alone are as if they were not there, misspelt ones too."""
    assert read(GRAFTER_ROLE=" \t", GRAFTER_PLAN="", GRAFTER_TIMEOUT="\n", GRAFTER_ROL=" ") == read()


def test_both_names_of_a_setting_may_not_differ() -> None:
    """The old and the new name together are accepted only where they agree."""
    assert read(GRAFTER_TIMEOUT="5", DUMPER_GRAFTER_TIMEOUT=" 5 ").timeout == 5
    message = fault(GRAFTER_SECRET="hush", DUMPER_GRAFTER_SECRET="hush2")
    assert "GRAFTER_SECRET and DUMPER_GRAFTER_SECRET" in message
    assert "hush" not in message


def test_variables_of_others_are_left_alone() -> None:
    """Only GRAFTER_ and DUMPER_GRAFTER_ variables are looked at."""
    assert read(DUMPER_ENABLE="1", GRAFT="2", PATH="/bin", MY_GRAFTER_ROLE="x") == read()


# ---- errors


def test_misspelt_variables_are_told_first_all_at_once_with_suggestions() -> None:
    """Whatever else is wrong, unknown variables come first, each with the name that was probably meant."""
    message = fault(
        GRAFTER_ENABLE="1",
        GRAFTER_ROL="baseline",
        DUMPER_GRAFTER_MASTER_PROT="1",
        GRAFTER_role="x",
        GRAFTER_XYZZY="1",
        GRAFTER_TIMEOUT="abc",
    )
    assert "GRAFTER_ROL: did you mean GRAFTER_ROLE?" in message
    assert "DUMPER_GRAFTER_MASTER_PROT: did you mean DUMPER_GRAFTER_MASTER_PORT?" in message
    assert "GRAFTER_role: did you mean GRAFTER_ROLE?" in message
    assert "GRAFTER_XYZZY: no setting" in message
    assert "TIMEOUT" not in message
    assert "plan file" in fault(GRAFTER_RULES="[]")


def test_what_is_missing_is_told_second_all_at_once_with_what_sets_it() -> None:
    """Role, port and a filter are required once grafting is on; illegal values wait."""
    message = fault(GRAFTER_ENABLE="on", GRAFTER_TIMEOUT="abc")
    for words in ("GRAFTER_ROLE", "baseline", "target", "GRAFTER_B2T_FILTER", "GRAFTER_T2B_FILTER"):
        assert words in message
    assert "GRAFTER_COMPARE_FILTER" in message
    assert "GRAFTER_MASTER_PORT" in message
    assert "TIMEOUT" not in message
    with pytest.raises(ConfigError, match="set role= to baseline"):
        GrafterConfig(enable=1)


def test_a_missing_role_alone_asks_for_no_port() -> None:
    """Whether a port is needed is decided by the filters, and not by what else is missing."""
    message = fault(GRAFTER_ENABLE="on", GRAFTER_DUMP_FILTER="True")
    assert "GRAFTER_ROLE" in message and "GRAFTER_MASTER_PORT" not in message
    assert "GRAFTER_MASTER_PORT" in fault(GRAFTER_ENABLE="on", GRAFTER_B2T_FILTER="True")


@pytest.mark.parametrize("name", ["GRAFTER_B2T_FILTER", "GRAFTER_T2B_FILTER", "GRAFTER_COMPARE_FILTER"])
def test_any_one_filter_is_enough(name: str) -> None:
    """One of the three filters suffices."""
    environ = {key: value for key, value in WORKING.items() if "FILTER" not in key}
    config = read(**environ, **{name: "True"})
    assert [f"GRAFTER_{direction.upper()}_FILTER" for direction in config.filters] == [name]


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("enable", "maybe", "1, true, yes, on or 0, false, no, off"),
        ("role", "basline", "baseline, target; did you mean baseline?"),
        ("master_port", "0", "at least 1"),
        ("master_port", "65536", "at most 65535"),
        ("master_port", "a", "whole number"),
        ("rank", "-1", "at least 0"),
        ("rank", "1.5", "whole number"),
        ("baseline_world_size", "0", "at least 1"),
        ("timeout", "0", "above 0"),
        ("timeout", "nan", "above 0"),
        ("timeout", "inf", "finite"),
        ("join_timeout", "five", "a number"),
        ("backend", "mpi", "auto, gloo, nccl"),
        ("stats", "no", "full, light, off"),
        ("attach", "model.*, a.{b", "'a.{b' of attach, at character 10"),
        ("attach", "!", "at character 1, is no pattern"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("on_transform_error", "ignore", "skip, raise"),
        ("on_peer_loss", "skip", "raise, detach"),
        ("write", "inplace", "did you mean in_place?"),
        ("gradient", "none", "straight_through, cut, strict"),
        ("store_host", "me", "rank0, launcher, peer"),
        ("group_name", "a/b", "name of letters"),
        ("run_name", "../up", "name of letters"),
        ("run_name", "..", "name of letters"),
        ("key", "layer id", "layer_id,expert"),
        ("key", "layer_id,tp_rank", "tp_rank differs between ranks"),
        ("dump_level", "all", "full, statistics, checksum"),
        ("dump_steps", "3-1", "ends before it begins"),
        ("dump_steps", "first", "neither a step nor a range"),
        ("dump_max_bytes", "10 GB", "10GiB"),
        ("dump_max_bytes", "0", "at least one byte"),
        ("dump_max_points", "0", "at least 1"),
        ("dump_queue_bytes", "much", "10GiB"),
    ],
)
def test_an_illegal_value_is_shown_with_its_variable_and_what_is_legal(field: str, text: str, words: str) -> None:
    """The message has the variable under the name that was used, the value, and the legal ones."""
    message = fault(**{f"GRAFTER_{field.upper()}": text})
    assert f"GRAFTER_{field.upper()}={text!r}: " in message
    assert words in message
    assert f"DUMPER_GRAFTER_{field.upper()}={text!r}: " in fault(**{f"DUMPER_GRAFTER_{field.upper()}": text})
    with pytest.raises(ConfigError) as raised:
        GrafterConfig(**{field: text})
    assert f"{field}={text!r}: " in str(raised.value)


def test_illegal_values_are_told_together_and_with_faulty_filters() -> None:
    """All illegal values, filters among them, come in one message."""
    message = fault(**{**WORKING, "GRAFTER_TIMEOUT": "x", "GRAFTER_RANK": "y", "GRAFTER_B2T_FILTER": "a = 3"})
    assert "GRAFTER_TIMEOUT='x'" in message
    assert "GRAFTER_RANK='y'" in message
    assert "GRAFTER_B2T_FILTER: a single `=`" in message


def test_an_illegal_value_of_the_plan_file_is_shown_at_its_place(tmp_path: Path) -> None:
    """A value of the plan file is checked as the environment's, and found by file, line and column."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("stats: full\ntimeout: abc\nb2t_filter: layer_id = 3\n")
    message = fault(GRAFTER_PLAN=str(plan))
    assert f"{plan}:2:10: timeout='abc': it must be a number" in message
    assert f"{plan}:3:13: b2t_filter: a single `=`" in message


def test_a_rank_outside_of_its_job_is_refused() -> None:
    """Where the world size is given, the rank must lie in it."""
    sizes = {"GRAFTER_BASELINE_WORLD_SIZE": "2", "GRAFTER_TARGET_WORLD_SIZE": "9"}
    assert "GRAFTER_RANK=2: baseline has 2 ranks" in fault(**WORKING, **sizes, GRAFTER_RANK="2")
    assert read(**WORKING, **sizes, GRAFTER_RANK="1").rank == 1


def test_unknown_arguments_are_refused_with_a_suggestion() -> None:
    """The constructor knows no other field."""
    with pytest.raises(ConfigError, match=r"rol: did you mean role\?"):
        GrafterConfig(rol="target")


# ---- filters


def test_filters_are_compiled_and_work() -> None:
    """`filters` holds those that are set, by direction, and each is the same object every time."""
    config = read(**WORKING, GRAFTER_COMPARE_FILTER="name == 'x'")
    assert set(config.filters) == {"b2t", "compare"}
    assert config.filters["b2t"]({"layer_id": 3}) is True
    assert config.filters["b2t"].source == "layer_id == 3"
    assert config.filters is config.filters


@pytest.mark.parametrize(
    ("source", "key", "words"),
    [
        ("rank == 0", None, "`rank` differs between ranks"),
        ("name == 'x' and local_rank == 0", None, "`local_rank` differs"),
        ("role_rank in (0, tp_rank)", None, "`tp_rank` differs"),
        ("occurrence == 0", None, "counted for points that match"),
        ("dims == 'b'", None, "argument of `grafter.dump`"),
        ("layer_id == 3", "expert", "not among the tags that `key` lists (expert, name, phase, step)"),
    ],
)
def test_filters_may_only_read_tags_that_identify(source: str, key: str | None, words: str) -> None:
    """A tag on which ranks or jobs may disagree is refused when the configuration is read."""
    message = fault(GRAFTER_T2B_FILTER=source, GRAFTER_KEY=key or "")
    assert message.startswith("GRAFTER_T2B_FILTER: ")
    assert words in message


def test_name_step_and_phase_identify_whatever_the_key_says() -> None:
    """The key adds to name, step and phase."""
    config = read(GRAFTER_KEY="expert", GRAFTER_B2T_FILTER="name == 'x' and step > 2 and phase == 'forward' and expert")
    assert config.key_tags == {"expert"}
    assert read().key_tags is None


def test_faults_of_filters_alone_are_a_filter_error() -> None:
    """FilterError tells faulty filters from other settings; it has all of them."""
    with pytest.raises(FilterError) as raised:
        read(**{**WORKING, "GRAFTER_B2T_FILTER": "a = 3", "GRAFTER_T2B_FILTER": "b = 4"})
    assert "GRAFTER_B2T_FILTER" in str(raised.value)
    assert "GRAFTER_T2B_FILTER" in str(raised.value)


# ---- rules


RULES: list[dict[str, Any]] = [
    {"match": "attn*", "write": "return"},
    {"match": "attn_out", "write": "in_place", "gradient": "cut"},
    {"match": "raw", "transform": ""},
    {"match": "*", "transform": "cook.py:f", "gradient": "strict"},
]


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("write", "attn_out", "return"),
        ("gradient", "attn_out", "cut"),
        ("gradient", "attn_in", "strict"),
        ("write", "mlp", "in_place"),
        ("transform", "mlp", "cook.py:f"),
        ("transform", "raw", None),
        ("on_transform_error", "mlp", "skip"),
    ],
)
def test_the_first_rule_that_has_the_field_wins(field: str, name: str, value: str | None) -> None:
    """For each field alone: the first matching rule that has it, else the run's own value; again from the cache."""
    config = GrafterConfig(rules=RULES)
    assert config.rule_value(field, name) == value
    assert config.rule_value(field, name) == value


def test_a_rule_value_falls_back_to_the_runs_own_and_then_to_the_default() -> None:
    """Without a rule, `transform` is `transform_path`; without that, the caller's default."""
    assert GrafterConfig(transform_path="a.b.c").rule_value("transform", "x") == "a.b.c"
    assert GrafterConfig().rule_value("transform", "x", "d") == "d"
    with pytest.raises(KeyError):
        GrafterConfig().rule_value("wirte", "x")


def test_rules_of_the_plan_file_reach_the_configuration(tmp_path: Path) -> None:
    """GRAFTER_PLAN's rules are in force."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("rules: [{match: 'a.*', write: return}]")
    assert read(GRAFTER_PLAN=str(plan)).rule_value("write", "a.b") == "return"


# ---- the object


def test_the_secret_is_in_no_repr_dump_or_message() -> None:
    """The secret is only what `get_secret_value` gives."""
    config = read(**WORKING, GRAFTER_SECRET="hush")
    assert config.secret is not None
    assert config.secret.get_secret_value() == "hush"
    for text in (repr(config), str(config), config.model_dump_json(), json.dumps(config.public_dict())):
        assert "hush" not in text
    with pytest.raises(ConfigError) as raised:
        GrafterConfig(secret=["hush"])
    assert "hush" not in str(raised.value)


def test_the_public_dict_has_every_other_field_as_json() -> None:
    """run.json can hold the whole configuration but the secret."""
    config = GrafterConfig(role="target", secret="hush", rules=RULES)
    public = json.loads(json.dumps(config.public_dict()))
    assert set(public) == set(GrafterConfig.model_fields) - {"secret"}
    assert public["rules"][0]["write"] == "return"


def test_copies_are_equal_and_the_original_is_frozen() -> None:
    """A configuration survives pickling and rebuilding from its fields, used or unused, and cannot be changed."""
    config = GrafterConfig(b2t_filter="a == 3", rules=RULES, secret="hush")
    assert config.filters["b2t"]({"a": 3})
    config.rule_value("write", "x")
    assert pickle.loads(pickle.dumps(config)) == config
    assert GrafterConfig(**config.model_dump()) == config
    assert pickle.loads(pickle.dumps(config)).filters["b2t"]({"a": 3})
    with pytest.raises(ValueError, match="frozen"):
        config.role = "target"  # type: ignore[misc]


def test_reading_the_configuration_imports_no_yaml_until_there_is_a_plan() -> None:
    """A run without a plan file does not pay for a YAML parser."""
    program = (
        "import sys; from grafter.config.settings.config import GrafterConfig; GrafterConfig(); "
        "print('ruamel.yaml' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


@given(
    st.dictionaries(
        st.sampled_from([f"GRAFTER_{name.upper()}" for name in SETTING_FIELDS if name != "plan"]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
        | st.sampled_from([text for text, _ in EXAMPLES.values()]),
    )
)
def test_any_environment_is_a_configuration_or_a_config_error(environ: dict[str, str]) -> None:
    """Whatever the variables hold, the outcome is ConfigError or a configuration whose filters work."""
    try:
        config = GrafterConfig.from_environment(environ)
    except ConfigError as error:
        assert "pydantic" not in str(error)
        return
    assert all(compiled({}) in (True, False) for compiled in config.filters.values())
