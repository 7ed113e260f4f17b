"""The records of the kinds: they agree with the configs that they name, and import nothing heavy."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from transformers import TrainingArguments
from trl.trainer.grpo_config import GRPOConfig as TrlGRPO
from trl.trainer.rloo_config import RLOOConfig as TrlRLOO

from preftune.errors import UserError
from preftune.stages.grpo import GRPOConfig
from preftune.stages.kinds import DPO, GRPO, KINDS, PPO, RLOO, StageKind, stage_kind
from preftune.stages.losses import KL_ESTIMATORS
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.settings import PPOSettings, RewardedSettings
from preftune.stages.rloo import RLOOConfig


def names(config: type) -> set[str]:
    return {each.name for each in dataclasses.fields(config)}


def test_records_are_read_without_torch_or_trl() -> None:
    code = "import sys, preftune.stages.kinds; print([x for x in ('torch', 'trl', 'transformers') if x in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_parameters_are_fields_of_the_config_with_its_defaults(kind: StageKind) -> None:
    fields = {each.name: each for each in dataclasses.fields(kind.config_class())}
    for parameter in kind.parameters:
        assert parameter.help.endswith(".") and "\n" not in parameter.help, parameter.name
        if not parameter.of_config:
            assert parameter.name not in fields
            continue
        field = fields[parameter.name]
        default = field.default
        if default is dataclasses.MISSING:
            assert field.default_factory is not dataclasses.MISSING
            default = field.default_factory()
        if (kind.name, parameter.name) == ("reward", "center_rewards_coefficient"):
            default = 0.01  # ours, as TRL's documentation recommends; TRL's own is None
        assert parameter.default == default, parameter.name
    assert callable(kind.runner())


def test_every_setting_of_ppo_is_a_parameter_but_for_its_places() -> None:
    own = names(PPOConfig) - names(TrainingArguments)
    assert own == {each.name for each in PPO.parameters} | {"samples_file", "policies_dir", "rollout_place"}


@pytest.mark.parametrize(("config", "kind"), [(GRPOConfig, GRPO), (RLOOConfig, RLOO)])
def test_groups_have_nothing_of_ppos_and_their_defaults_are_trls(config: type, kind: StageKind) -> None:
    theirs = {each.name: each.default for each in dataclasses.fields({"grpo": TrlGRPO, "rloo": TrlRLOO}[kind.name])}
    own = {each.name: each.default for each in kind.parameters}
    assert not own.keys() & (names(PPOSettings) - names(RewardedSettings))
    fields = names(config) - names(TrainingArguments)
    assert fields == own.keys() | {"samples_file", "policies_dir", "rollout_place", "reward_weights"}
    shared = own.keys() & theirs.keys() - {"beta"}
    assert {"num_generations", "num_iterations", "epsilon", "epsilon_high", "mask_truncated_completions"} <= shared
    assert {name: own[name] for name in shared} == {name: theirs[name] for name in shared}
    assert own["beta"] == {"grpo": 0.04, "rloo": theirs["beta"]}[kind.name]


def test_kl_estimators_of_the_losses_are_those_that_a_recipe_may_name() -> None:
    named = get_args(get_args(PPO.parameter("kl_estimator").type)[0])
    assert sorted(named) == sorted(each for those in KL_ESTIMATORS.values() for each in those)


def test_grouped_parameters_exist_and_stand_in_one_group_only() -> None:
    for kind in KINDS.values():
        grouped = [name for keys in kind.groups.values() for name in keys.values()]
        assert len(grouped) == len(set(grouped))
        assert {each.name for each in kind.alone()} == {each.name for each in kind.parameters} - set(grouped)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("dop", ["'dop' is no kind of stage", "did you mean 'dpo'?"]),
        ("ipo", ["write kind: dpo and loss_type: ipo"]),
        ("there_is_no_such_module:KIND", ["there_is_no_such_module cannot be imported"]),
        ("/no/such/file.py:KIND", ["/no/such/file.py cannot be imported"]),
        ("preftune.stages.kinds:PATH", ["'PATH' in preftune.stages.kinds is nothing, expected a StageKind"]),
        ("preftune.stages.kinds:KINDS", ["is a dict, expected a StageKind"]),
        ("preftune.stages.kinds:DPO", ["'dpo', as a kind of preftune's own"]),
    ],
)
def test_what_is_no_kind_is_said(word: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        stage_kind(word, "stages.x.kind")
    assert caught.value.where == "stages.x.kind"
    for part in parts:
        assert part in str(caught.value)


def test_a_method_that_does_not_import_says_why(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import there_is_no_such_module\n")
    with pytest.raises(UserError, match=r"broken.py cannot be imported: .*broken.py:1 .*No module named 'there_is_no"):
        stage_kind(f"{file}:KIND")


def test_an_unknown_parameter_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError, match="a dpo stage has no parameter 'kl_coef'"):
        DPO.parameter("kl_coef")
