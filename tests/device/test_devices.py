"""A process that sees several GPUs: which one is its own."""

import pytest

pytestmark = pytest.mark.slow


def places_of_a_quantised_base() -> list[str]:
    """The device map that a 4-bit base is loaded with, where the library that quantises is not asked."""
    from unittest import mock

    import torch

    from preftune.models import loading

    base = loading.resolve_base("random:llama")
    open_model, asked = loading.open_model, []

    def opened(kind, path, *, device_map, quantization_config, **options):
        asked.append(device_map[""])
        return open_model(kind, path, **options)

    with (
        mock.patch.object(loading, "quantization_config", lambda *_, **more: None),
        mock.patch.object(loading, "open_model", opened),
    ):
        loading.load_model(base, quantization="4bit")
        torch.cuda.set_device(1)
        loading.load_model(base, quantization="4bit")
    return [str(each) for each in asked]


@pytest.mark.parametrize(
    "rank, places", [(None, ["cuda:0", "cuda:1"]), ("0", ["cuda:0"] * 2), ("1", ["cuda:1"] * 2), ("3", ["cuda:1"] * 2)]
)
def test_a_quantised_base_goes_to_its_own_process_gpu(device, rank: str | None, places: list[str]) -> None:
    launched = {} if rank is None else {"LOCAL_RANK": rank}
    assert device.call(places_of_a_quantised_base, {"SHADOW_N": "2", **launched}) == places


def batches() -> dict:
    """What PPO's trainer, made by hand, takes for one forward."""
    from datasets import Dataset

    from preftune import AdapterSet, LoraSpec, PPOConfig, PPOTrainer, load_model, load_tokenizer, resolve_base

    base = resolve_base("random:llama")
    trainer = PPOTrainer(
        model=AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4)),
        args=PPOConfig(output_dir="out", per_device_train_batch_size=2, report_to="none"),
        processing_class=load_tokenizer(base),
        train_dataset=Dataset.from_dict({"prompt": ["Hello there"]}),
        reward_funcs=lambda prompts, completions, **_: [0.0 for _ in completions],
    )
    return {
        "gpus": trainer.args.n_gpu,
        "rows": trainer.args.train_batch_size,
        "device": str(trainer.adapters.causal.device),
    }


def test_a_trainer_made_by_hand_uses_one_gpu_and_says_so(device) -> None:
    done = device.run(f"{__file__}::batches", SHADOW_N="2")
    assert done.report["returned"] == {"gpus": 1, "rows": 2, "device": "cuda:0"}
    assert "2 GPUs are visible" in done.err
    assert "accelerate launch" in done.err
