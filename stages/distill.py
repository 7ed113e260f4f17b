"""Distillation: the student learns a teacher's distributions at every token of its own replies.

Source: Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649). Names, defaults and the
loss are those of TRL's DistillationTrainer (1.16), which samples every reply; `lmbda`, the share of those, is
GKDTrainer's.

Legend of shape suffixes: B episodes, T positions of prompt + response, R response positions, N response tokens, H
hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..data.encode import encode_prompts, encode_replies
from ..data.rows import Row, text_message
from ..data.spec import DataSpec, SourceSpec
from ..errors import UserError
from ..models.adapters import DEFAULT, AdapterSet
from ..models.divergence import Divergences, divergences
from ..models.generate import Generation
from ..models.lora import LoraSpec
from ..models.tokens import check_vocabulary, end_token_ids
from ..models.transfer import to_device
from .groups import length_metrics
from .job import StageJob
from .kl_control import FixedKL, KLController
from .losses import ratio_sums
from .ppo.config import OnPolicyConfig
from .ppo.method import Forwards, Method, PolicyMethod, Step, policy_forwards
from .ppo.network import Trunk
from .ppo.rewards import RewardSource, Scorer, Scores
from .ppo.rollout import Episodes, Prompts, PromptText, Reduce, Rollout, make_episodes
from .ppo.settings import DistillSettings
from .ppo.stage import run_on_policy
from .ppo.trainer import OnPolicyTrainer
from .ppo.trl_names import DISTILLATION
from .teachers import Teacher, TeacherSource, check_teachers_context, open_teacher


@dataclass
class DistillationConfig(DistillSettings, OnPolicyConfig):
    """Everything that `OnPolicyConfig` takes, and the settings of distillation (`DistillSettings`)."""

    method = "distillation"
    settings = DistillSettings
    epochs_field = None
    names = DISTILLATION

    def _check_method(self) -> None:
        if self.rollout_ahead:
            raise ValueError(
                f"rollout_ahead is {self.rollout_ahead}, expected 0: nothing in a distillation makes up for replies of "
                "an older student"
            )

    @property
    def kl_in_reward(self) -> bool:
        return False

    def kl_control(self, coef: float | None = None) -> KLController:
        """None: nothing is measured against a reference."""
        return FixedKL(0.0)

    def measures_kl(self) -> bool:
        return False

    def speaks(self, iteration: int) -> bool:
        """Whether the student answers the prompts of that iteration (from 0), `lmbda` of all of them, evenly spread."""
        before, after = (math.floor(round(each * self.lmbda, 9)) for each in (iteration, iteration + 1))
        return after > before


class Distillation(PolicyMethod):
    """The divergence from the teacher, the mean over the tokens of the optimiser step."""

    statistics: tuple[str, ...] = ("loss", "ratio", "approx_kl", "abs_log_ratio", "entropy")
    samples_per_prompt: int = 1

    def __init__(self, config: DistillationConfig, trunk: Trunk, teacher: Teacher, reduce: Reduce) -> None:
        super().__init__(config, trunk, reduce)
        self.config, self.teacher = config, teacher

    def compare(self, hidden_BTH: torch.Tensor, teacher_BTH: torch.Tensor, episodes: Episodes) -> Divergences:
        """Of each response token, row by row, from the last hidden states of both."""
        tokens = episodes.tokens
        return divergences(
            hidden_BTH.flatten(0, 1)[tokens.before_N],
            teacher_BTH.flatten(0, 1)[tokens.before_N],
            episodes.input_ids_BT.flatten()[tokens.token_N],
            student=self.trunk.adapters.head_under(DEFAULT),
            teacher=self.teacher.head,
            beta=self.config.beta,
            temperature=self.config.temperature,
        )

    def forwards(self, episodes: Episodes) -> Forwards:
        """The student's alone: the teacher's are made when they are compared, as nobody can hold its distributions."""
        return policy_forwards(self.trunk, episodes)

    def rollout(self, episodes: Episodes, forwards: Forwards, rewards_BR: torch.Tensor, scores: Scores) -> Rollout:
        """Nothing but the replies: there are no advantages."""
        return Rollout(episodes, forwards.logps_BR, None, torch.zeros_like(rewards_BR), scores.total_B)

    def rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Lengths, under TRL's names."""
        return length_metrics(rollout.episodes, self.reduce)

    def backward(self, part: Rollout, step: Step, kl_coef: float) -> torch.Tensor:
        """See `Method.backward`."""
        del kl_coef
        episodes, trunk = part.episodes, self.trunk
        teacher_BTH = self.teacher.hidden(episodes)
        # Backward inside `using`: recomputed layers must meet the adapter of the forward.
        with trunk.adapters.using(DEFAULT):
            now = self.compare(trunk.hidden(episodes), teacher_BTH, episodes)
            loss = now.divergence_N.sum() / step.tokens
            loss.backward()
        log_ratio_N = now.logps_N - part.logps_BR[episodes.mask_BR]
        ratio = ratio_sums(log_ratio_N, torch.ones_like(log_ratio_N, dtype=torch.bool))
        found = (loss * step.tokens, *ratio, now.entropy_N.sum())
        return torch.stack([x.detach().double() for x in found])

    def update_metrics(self, mean: dict[str, float]) -> dict[str, float]:
        """TRL's names, and the loop's."""
        return {
            "loss": mean["loss"],
            "entropy": mean["entropy"],
            "policy/entropy_avg": mean["entropy"],
            "policy/approxkl_avg": mean["approx_kl"],
            "val/ratio": mean["ratio"],
        }

    @torch.no_grad()
    def measured(self, episodes: Episodes) -> dict[str, torch.Tensor]:
        """Divergence and entropy, summed over each response's tokens [B]."""
        device = episodes.start_B.device
        out = {name: torch.zeros(len(episodes), device=device) for name in ("loss", "entropy")}
        for rows in self.trunk.batches(episodes):
            part = episodes.rows(rows)
            with self.trunk.adapters.using(DEFAULT):
                hidden_BTH = self.trunk.hidden(part)
            found, tokens = self.compare(hidden_BTH, self.teacher.hidden(part), part), part.tokens
            for name, x_N in (("loss", found.divergence_N), ("entropy", found.entropy_N)):
                zeros = torch.zeros(tokens.shape, device=device).flatten()
                out[name][to_device(rows, device)] = zeros.index_copy(0, tokens.place_N, x_N).view(tokens.shape).sum(1)
        return out


class DistillationTrainer(OnPolicyTrainer):
    """On-policy distillation on adapters; arguments have the names and the order of TRL's DistillationTrainer.

    Args:
        teacher_model: whose distributions are learned: a stage's folder, a hub id or another base spec, or a model in
            memory, with the student's vocabulary. An adapter of the student's own base lives on that base.
        train_dataset: as of `OnPolicyTrainer`; where `lmbda` is below 1, each row has a reply as well: `completion`
            (text, or messages), or `completion_ids` made beforehand.
        the others: as of `OnPolicyTrainer`.

    Raises:
        UserError: no teacher, one with another vocabulary, a row without a reply that needs one; or as
            `OnPolicyTrainer`.
    """

    args: DistillationConfig  # pyright: ignore[reportIncompatibleVariableOverride]: it is never set to another
    config = DistillationConfig
    rewarded = False
    order = "model, teacher_model, args, train_dataset, eval_dataset, processing_class"

    def __init__(
        self,
        model: AdapterSet | PeftModel | PreTrainedModel | str,
        teacher_model: TeacherSource | AdapterSet | PeftModel | PreTrainedModel | str | Path | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        lora: LoraSpec | None = None,
        peft_config: LoraConfig | None = None,
        quiet: bool = False,
        **others: object,
    ) -> None:
        self.given_teacher = _teacher(teacher_model, type(self).__name__, others)
        super().__init__(
            model,
            None,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            lora=lora,
            peft_config=peft_config,
            quiet=quiet,
            **others,  # pyright: ignore[reportArgumentType]: what names a reward was refused
        )
        if self.args.lmbda < 1:
            self._read_replies()
        longest = max(len(ids) + self.args.max_new_tokens * (self.args.lmbda > 0) for ids in self.prompts.ids)
        pairs = zip(self.prompts.ids, self.prompts.replies, strict=True)
        longest = max(longest, *(len(ids) + len(reply or ()) for ids, reply in pairs))
        assert isinstance(self.method, Distillation)
        check_teachers_context(self.method.teacher, longest, _where(self.given_teacher))

    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> Method:
        """The divergence from the teacher, which is opened here."""
        del sources, scorers
        given = self.given_teacher
        teacher = open_teacher(given, self.trunk, self.tokenizer, self.args.device)
        self.made_of = {"teacher": dict(teacher.record)}
        if isinstance(given, TeacherSource) and given.adapter is not None:
            self.sources = (given.adapter,)
        return Distillation(self.args, self.trunk, teacher, self.reduce)

    def speaks(self) -> bool:
        return self.args.speaks(self.loop.iteration)

    def measured(self, episodes: Episodes) -> dict[str, torch.Tensor]:
        assert isinstance(self.method, Distillation)
        return self.method.measured(episodes)

    def _respond(self, prompts: Prompts) -> Episodes:
        """The student's replies, or in their turn the data's."""
        if self.speaks():
            return super()._respond(prompts)
        replies = [reply for reply in prompts.replies if reply is not None]
        ends = end_token_ids(self.tokenizer, self.adapters.model)
        said = Generation(replies, [[0.0] * len(each) for each in replies], [each[-1] in ends for each in replies])
        pad = self.tokenizer.pad_token_id
        return make_episodes(prompts.ids, said, pad if isinstance(pad, int) else ends[0], self.args.device)

    def _read_replies(self) -> None:
        """The data's own replies, as ids."""
        prompts, where = self.prompts, "train_dataset"
        for row, known in enumerate(prompts.replies):
            if known is None:
                reply = prompts.columns[row].get("completion")
                said = f"{where} row {row}"
                if not isinstance(reply, str | list) or not reply:
                    words = f"lmbda is {self.args.lmbda:g}, and the row has no reply of the data"
                    raise UserError(said, words, "give each row a completion, or set lmbda to 1")
                prompts.ids[row], prompts.replies[row] = _encoded(prompts.prompts[row], reply, self.tokenizer, said)
            elif not known:
                raise UserError(f"{where} row {row}", "the reply is empty", "remove the row")
        size = self.adapters.causal.config.get_text_config().vocab_size
        check_vocabulary([each or [] for each in prompts.replies], self.tokenizer, size, where)


def _where(teacher: object) -> str:
    return teacher.where if isinstance(teacher, TeacherSource) else "teacher_model"


def _teacher(given: Any, name: str, others: dict[str, object]) -> Any:
    """The teacher as it was given, a source where a string names one.

    Raises:
        UserError: there is none, or something else stands in its place; a reward.
    """
    for each in ("reward_funcs", "rewards", "reward_adapter"):
        if each in others:
            raise UserError(name, f"{each!r} is no argument of it", "leave it out: the teacher says what is learned")
    if isinstance(given, TrainingArguments):
        said = f"teacher_model is a {type(given).__name__}, expected a model, or a string"
        raise UserError(name, said, f"the order is {DistillationTrainer.order}")
    if given is None:
        raise UserError(name, "no teacher is given", "pass teacher_model: a stage's folder, a hub id or a model")
    return TeacherSource.named(given) if isinstance(given, str | Path) else given


def _encoded(
    prompt: PromptText, reply: PromptText, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    """Prompt and reply as ids: a text is gone on with and ends in EOS, messages go through the template."""
    if isinstance(prompt, str) and isinstance(reply, str):
        eos = tokenizer.eos_token_id
        assert isinstance(eos, int)
        found = Prompts.of([{"prompt": prompt}], tokenizer, where).ids[0]
        return found, [*tokenizer(reply, add_special_tokens=False)["input_ids"], eos]
    if isinstance(prompt, str):
        raise UserError(where, "the prompt is text and its completion messages", "write both in the same way")
    turns = [text_message("assistant", reply)] if isinstance(reply, str) else reply
    spec = DataSpec((SourceSpec(where),), max_length=None)
    row: Any = encode_replies([Row(prompt, turns, origin=where)], tokenizer, spec)[0][0]
    return row["prompt_ids"], row["completion_ids"]


def run_distill(job: StageJob) -> dict[str, Any]:
    """Run a distillation stage (see `run_on_policy`): the student goes on from the parent's adapter."""
    if job.teacher is None:
        raise UserError(f"stages.{job.name}.teacher", "no teacher is given", "name a stage, a folder or a hub id")
    encode = encode_replies if job.rows == "demo" else encode_prompts
    return run_on_policy(job, DistillationTrainer, encode, teacher_model=job.teacher)
