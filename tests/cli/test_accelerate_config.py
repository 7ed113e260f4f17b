"""What an accelerate config asks for and stages do not do is refused before anything trains."""

import json
from pathlib import Path

import pytest
import yaml

from preftune.cli import main as cli
from preftune.cli.launch import check_dtype, check_launch
from preftune.errors import UserError

PLAIN = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 4}


def write(folder: Path, **values: object) -> Path:
    file = folder / "asked.yaml"
    file.write_text(yaml.safe_dump(PLAIN | values))
    return file


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "tp_size 2: tensor .* on all linear layers"),
        ({"parallelism_config": {"tp_size": "two"}}, "tp_size two: tensor"),
        ({"parallelism_config": {"parallelism_config_cp_size": 2}}, "cp_size 2: context .* whole rows"),
        ({"parallelism_config": {"parallelism_config_sp_size": 4}}, "sp_size 4: sequence .* whole rows"),
        ({"parallelism_config": {"parallelism_config_pp_size": 4}}, "pp_size 4: pipeline"),
        ({"parallelism_config": {"parallelism_config_dp_replicate_size": 2}}, "dp_replicate_size 2: .* all processes"),
        ({"parallelism_config": {"parallelism_config_dp_shard_size": 4}}, r"dp_shard_size 4 of 4 .*\(MULTI_GPU\)"),
        (
            {"distributed_type": "FSDP", "parallelism_config": {"parallelism_config_dp_shard_size": 2}},
            r"dp_shard_size 2 of 4 processes \(FSDP\)",
        ),
    ],
)
def test_a_model_divided_in_another_way_is_refused(tmp_path: Path, asked: dict, said: str):
    with pytest.raises(UserError, match=f"asked.yaml: parallelism_config asks for .*{said}.*; --launch fsdp2 divides"):
        check_launch(write(tmp_path, **asked))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"distributed_type": "XLA"}, "distributed_type XLA is none that stages run in; use one of NO, MULTI"),
        ({"distributed_type": "MEGATRON_LM"}, "in; Megatron's tensor .*; use one .* --launch fsdp2"),
        ({"distributed_type": "MULTI_NPU"}, "MULTI_NPU is none that stages run in"),
        ({"distributed_type": "NO"}, "starts one process, and num_processes is 4; write MULTI_GPU"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "inductor: .* not compiled; leave dynamo_config out"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}, "offload_params: .*; leave it"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_activation_checkpointing": True}},
            "activation_checkpointing: .*; .* write train: {gradient_checkpointing: true}",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, asked: dict, said: str):
    with pytest.raises(UserError, match=f"--launch: .*asked.yaml: .*{said}"):
        check_launch(write(tmp_path, **asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"mixed_precision": "no", "dynamo_config": {}, "downcast_bf16": "no", "gpu_ids": "all"},
        {"distributed_type": "NO", "num_processes": 1},
        {"parallelism_config": {"parallelism_config_tp_size": 1}},
        {
            "distributed_type": "FSDP",
            "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False},
            "parallelism_config": {"parallelism_config_dp_shard_size": 4},
        },
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    ],
)
def test_what_accelerate_config_writes_for_stages_is_taken(tmp_path: Path, asked: dict):
    check_launch(write(tmp_path, **asked))


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size 2: tensor parallelism"),
        (None, "deepspeed_config_file .*ds.json: No such file"),
    ],
)
def test_a_file_of_deepspeeds_own_is_looked_into(tmp_path: Path, deepspeed: dict | None, said: str):
    file = tmp_path / "ds.json"
    if deepspeed is not None:
        file.write_text(json.dumps(deepspeed))
    config = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": str(file)})
    with pytest.raises(UserError, match=said):
        check_launch(config)


@pytest.mark.parametrize(
    ("precision", "dtype", "fits"),
    [
        ("no", "float32", True),
        ("no", "bfloat16", True),
        ("bf16", "bfloat16", True),
        ("fp16", "float16", True),
        ("bf16", "float32", False),
        ("fp8", "bfloat16", False),
    ],
)
def test_a_configs_precision_is_the_recipes(tmp_path: Path, precision: str, dtype: str, fits: bool):
    config = write(tmp_path, mixed_precision=precision)
    check_launch(config)
    if fits:
        check_dtype(config, dtype)
        return
    with pytest.raises(UserError, match=f"mixed_precision {precision}, and the recipe's model.dtype is {dtype}; write"):
        check_dtype(config, dtype)


def test_a_run_says_it_in_one_line_before_it_makes_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write(tmp_path, distributed_type="FSDP", parallelism_config={"parallelism_config_tp_size": 2})
    out = tmp_path / "run"
    code = cli.run_command(["run", "smoke", "--output-dir", str(out), "--launch", str(config)])
    assert code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (out / "sft").exists()
