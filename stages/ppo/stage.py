"""On-policy stages, PPO's first: from a `StageJob` to a folder with the policy's adapter."""

from pathlib import Path
from typing import Any

from ...data.encode import encode_prompts
from ...files import LOGS
from ...models.lineage import check_lineage
from ...models.memory import peak_memory_bytes
from ..activations import settle_checkpointing
from ..callbacks import clock_of, keep_event_files
from ..job import StageJob, no_reward
from ..options import stage_config
from ..run import Encode, finish, load_data, open_adapters, open_tokenizer
from ..trackers import closing_trackers
from ..trainers import stage_callbacks, take_up
from .files import POLICIES
from .trainer import OnPolicyTrainer, PPOTrainer

_LAST = (
    "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "objective/kl_coef",
    "rollout/length", "rollout/eos_rate", "rollout/logprob_mismatch", "rollout/logprob_mismatch_mean",
    "rollout/sampler_kl", "value/explained_variance", "reward", "reward_std", "frac_reward_zero_std", "loss",
)  # fmt: skip


_EVALUATED = "eval_rollout/length"


def run_ppo(job: StageJob) -> dict[str, Any]:
    """Run a PPO stage (see `run_on_policy`)."""
    return run_on_policy(job, PPOTrainer)


def run_on_policy(
    job: StageJob, trainer_class: type[OnPolicyTrainer], encode: Encode = encode_prompts, **own: Any
) -> dict[str, Any]:
    """Run an on-policy stage (see `run_stage`): the parent's adapter is policy and reference, `job.rewards` score.

    Args:
        encode: of its rows. own: the trainer's arguments that not every method has.

    An interrupted run leaves checkpoints in `output_dir/checkpoints`; running the job again continues from the newest.
    """
    # 1. tokenizer, data, config
    if trainer_class.rewarded:
        if not job.rewards:
            raise no_reward(job)
        own |= {"rewards": job.rewards}
    tokenizer = open_tokenizer(job)
    stages = [Path(str(source.target)) for source in job.rewards if source.kind == "stage"]
    for folder in stages:
        check_lineage(folder, job.base, tokenizer)
    data = load_data(job, encode, tokenizer)
    args = stage_config(
        trainer_class.config,
        job,
        held_out=data.held is not None,
        logging_steps=1,
        samples_file=str(job.output_dir / "rollouts.jsonl"),
        policies_dir=str(job.output_dir / POLICIES),
        rollout_place=f"stages.{job.name}.rollout",
    )
    settle_checkpointing(job, args, data.train)
    # 2. the base with policy, reference, reward, and a value where there is one
    trainer = trainer_class(
        adapters := open_adapters(job, tokenizer),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held,
        processing_class=tokenizer,
        callbacks=stage_callbacks(job),
        quiet=True,
        **own,
    )
    keep_event_files(trainer, job.output_dir / LOGS)
    # 3. train, save
    trainer.skips.allowed = job.nonfinite_skips
    with closing_trackers(trainer):
        trainer.train(take_up(trainer))
        if data.held is not None and not _evaluated_last(trainer):
            trainer.evaluate()
    adapters.save("default", job.output_dir, write=trainer.is_world_process_zero())
    parents = tuple(folder for folder in (job.parent, *stages, *trainer.sources) if folder is not None)
    return finish(
        job, tokenizer, data, args, _metrics(trainer),
        backbone=adapters.backbone, parents=parents, made_of=trainer.made_of,
    )  # fmt: skip


def _metrics(trainer: OnPolicyTrainer) -> dict[str, float | None]:
    """The required measures and the last iteration's numbers."""
    seconds = max(clock_of(trainer).seconds - trainer.evaluate_seconds, 1e-9)
    iterations = [entry for entry in trainer.state.log_history if "rollout/length" in entry]
    last = iterations[-1] if iterations else {}
    held = next((entry for entry in reversed(trainer.state.log_history) if _EVALUATED in entry), {})
    episodes = trainer.loop.iteration * trainer.args.rollout_batch_size
    return {
        "train_seconds": seconds,
        "examples_per_second": trainer.episodes / seconds,
        "tokens_per_second": trainer.tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "steps": trainer.state.global_step,
        "episodes": episodes,
        **{name: last[name] for name in _LAST if name in last},
        **{name: value for name, value in held.items() if name.startswith("eval_") and name != "eval_runtime"},
    }


def _evaluated_last(trainer: OnPolicyTrainer) -> bool:
    """Whether the policy at hand was evaluated last."""
    steps = [entry["step"] for entry in trainer.state.log_history if _EVALUATED in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step
