"""Breaks the checklist's rules one at a time and says which tests notice.

    python tests/mutations.py            # every row; a Markdown table, exit code 1 if a break goes unnoticed
    python tests/mutations.py P17 P22    # some rows
    python tests/mutations.py --third 7  # every third break, by the number's remainder: what CI does, a third a commit

Each break is one small edit in a temporary copy of the package; the tests of its row, and only they, run against that
copy. Tests in several processes are left out: every rule must show in one.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "stages", "eval", "recipes", "cli", "api", "benchmarks", "tests")
SEVERAL_PROCESSES = (
    *("test_ppo_distributed.py", "test_ppo_resume.py", "test_group_processes.py", "test_reward_processes.py"),
    "test_distill_processes.py",
    "test_served_ahead_killed.py",
)


class Mutation(NamedTuple):
    """`old` stands exactly once in `file` (from the package's root) and becomes `new`."""

    row: str
    broken: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "P1", "training's log-probs are read at temperature 1", "stages/ppo/network.py",
        "temperature=self.temperature,", "temperature=1.0,",
    ),
    Mutation("P1", "a nucleus that nobody asked for", "stages/ppo/rollout.py", "top_p=config.top_p,", "top_p=0.9,"),
    Mutation(
        "P2", "the sampler's log-probs are taken for the old policy's", "stages/ppo/method.py",
        "(policy.logps_BR, ref.logps_BR, policy", "(part.sampler_logps_BR, ref.logps_BR, policy",
    ),
    Mutation(
        "P2", "the merged weights are 1% off", "models/lora.py",
        "layer.get_delta_weight(role).float()", "0.99 * layer.get_delta_weight(role).float()",
    ),
    Mutation(
        "P3", "the ratio is taken to the reference", "stages/ppo/method.py",
        "now.logps_BR, r.logps_BR, r.advantages_BR", "now.logps_BR, r.ref_logps_BR, r.advantages_BR",
    ),
    Mutation("P4", "dropout stays on", "stages/ppo/trainer.py", "        no_dropout(adapters.model)\n", ""),
    Mutation(
        "P5", "positions count the padding on the left", "models/prefill.py",
        "position_ids=(mask_BP.cumsum(-1) - 1).clamp(min=0),",
        "position_ids=torch.arange(ids_BP.size(1), device=device).expand_as(ids_BP),",
    ),
    Mutation(
        "P2", "a decoded token stands one position too far", "models/token_step.py",
        "position_ids=length_B[:, None] - 1)", "position_ids=length_B[:, None])",
    ),
    Mutation(
        "P2", "a token decoded on a GPU sees one column too many", "models/static_cache.py",
        "self.column_C[: self.seen] >= length_B[:, None]", "self.column_C[: self.seen] > length_B[:, None]",
    ),
    Mutation(
        "P6", "the mask goes by what equals EOS, not by length", "stages/ppo/rollout.py",
        "return (step_T < (self.start_B + self.length_B)[:, None]).long()",
        "return (step_T < 0) | (self.input_ids_BT != 2)",
    ),
    Mutation(
        "P7", "one token after the end counts", "models/logprobs.py",
        "mask_BR = step_R < length_B[:, None]", "mask_BR = step_R <= length_B[:, None]",
    ),
    Mutation(
        "P8", "the score lands one after EOS", "stages/losses.py",
        "last_B1 = mask_BR.long().sum(1, keepdim=True) - 1",
        "last_B1 = mask_BR.long().sum(1, keepdim=True).clamp(max=mask_BR.shape[1] - 1)",
    ),
    Mutation(
        "P9", "the penalty replaces the score", "stages/ppo/rewards.py",
        "torch.where(finished_B, scores_B, scores_B - penalty)", "torch.where(finished_B, scores_B, -penalty)",
    ),
    Mutation(
        "P10", "the KL penalty is clamped at 0", "stages/losses.py",
        "-kl_coef * delta_BR, 0.0)", "-kl_coef * delta_BR.clamp(min=0), 0.0)",
    ),
    Mutation(
        "P11", "k1 in the loss", "stages/losses.py", "0.5 * delta_BR.sum(1).square().sum()", "delta_BR.sum(1).sum()"
    ),
    Mutation(
        "P11", "k3 with delta's sign turned", "stages/losses.py",
        "torch.expm1(-delta_BR) + delta_BR", "torch.expm1(delta_BR) - delta_BR",
    ),
    Mutation(
        "P12", "the controller counts iterations, not episodes", "stages/kl_control.py",
        "error * episodes / self.horizon", "error / self.horizon",
    ),
    Mutation(
        "P12", "the controller's sign is turned", "stages/kl_control.py", "1.0 + error *", "1.0 - error *"
    ),
    Mutation(
        "P13", "values after the end are not zeroed", "stages/advantages.py",
        "    values_BR = torch.where(mask_BR, values_BR, 0.0)\n", "",
    ),
    Mutation(
        "P14", "the value's bias starts at 0", "stages/ppo/method.py",
        "head.bias.fill_(-start.mean * start.weight / start.std)", "head.bias.zero_()",
    ),
    Mutation(
        "P14", "the value starts as the policy", "stages/ppo/method.py",
        "adapters.copy(VALUE, source=start.role,", "adapters.copy(VALUE, source=DEFAULT,",
    ),
    Mutation(
        "P15", "the smaller of the two errors", "stages/losses.py",
        "torch.maximum(error_BR, clipped_error_BR)", "torch.minimum(error_BR, clipped_error_BR)",
    ),
    Mutation(
        "P16", "whitening per process", "stages/ppo/rollout.py",
        'mean_and_variance(reduce(masked_moments(x_BR, mask_BR), "sum"))',
        "mean_and_variance(masked_moments(x_BR, mask_BR))",
    ),
    Mutation("P16", "reward whitening takes the mean away", "stages/ppo/method.py", ", keep_mean=True)", ")"),
    Mutation(
        "P17", "each micro-batch is averaged over its own tokens", "stages/ppo/update.py",
        "method.backward(own, step, kl_coef)",
        "method.backward(own, Step(0, float(own.episodes.length_B.sum()), 0, own, 0, 0), kl_coef)",
    ),
    Mutation(
        "P17", "each process takes the whole minibatch", "stages/ppo/shared.py",
        "[torch.from_numpy(order)][process::processes]", "[torch.from_numpy(order)]",
    ),
    Mutation(
        "P18", "every epoch takes the same order", "stages/ppo/trainer.py",
        "loop.iteration, epoch, 0)", "loop.iteration, 0)",
    ),
    Mutation(
        "P19", "nothing is clipped", "stages/ppo/update.py",
        'limit = self.config.max_grad_norm or float("inf")', 'limit = float("inf")',
    ),
    Mutation("P20", "the brake comes ten times too late", "stages/ppo/update.py", "1.5 * target", "15 * target"),
    Mutation(
        "P20", "the controller's target stops the epochs", "stages/ppo/update.py",
        "target = config.target_approx_kl", "target = config.kl_target",
    ),
    Mutation(
        "P20", "an exploding ratio is not skipped", "stages/ppo/update.py",
        "config.max_ratio is not None and not ratio <= config.max_ratio", "False",
    ),
    Mutation(
        "P21", "all processes sample from one stream", "stages/ppo/trainer.py",
        "first = self.args.process_index * self.args.local_rollout_size()", "first = 0",
    ),
    Mutation(
        "P22", "the reference mean is not subtracted", "stages/ppo/rewards.py",
        "scores_B = (scores_B - mean) /", "scores_B = scores_B /",
    ),
    Mutation(
        "P22", "the constants are those of rejected responses", "stages/reward.py",
        'measured["chosen_ids"]', 'measured["rejected_ids"]',
    ),
    Mutation(
        "P23", "processes go on from unlike checkpoints", "stages/checkpoints.py",
        "if highest == -lowest:", "if highest:",
    ),
    Mutation(
        "P23", "the value is not restored", "stages/ppo/files.py",
        "parameter.copy_(saved[name])", 'parameter.copy_(saved[name] if "policy" in name else parameter)',
    ),
    Mutation(
        "P23", "the running reward scale is not restored", "stages/ppo/trainer.py",
        "RunningScale(*self.loop.running)", "RunningScale()",
    ),
    Mutation(
        "P23", "an evaluation that is due is forgotten in a checkpoint", "stages/ppo/files.py",
        "known = {each.name for each in fields(LoopState)}",
        'known = {each.name for each in fields(LoopState)} - {"eval_due"}',
    ),
    Mutation(
        "P24", "adding an adapter unfreezes the others", "models/adapters.py",
        "parameter.requires_grad_(before.get(id(parameter), trainable))", "parameter.requires_grad_(True)",
    ),
    Mutation(
        "P24", "the reward's adapter serves as the value", "stages/ppo/method.py",
        "value = list(adapters.heads[VALUE].parameters()) if shared else adapters.parameters(VALUE)",
        "value = [p.requires_grad_(True) for p in adapters.parameters(list(adapters.heads)[0])]",
    ),
    Mutation(
        "P25", "a minibatch's mean counts once, whatever its tokens", "stages/ppo/update.py",
        'totals[name] / max(totals["tokens"], 1.0)', 'totals[name] / totals["steps"]',
    ),
    Mutation(
        "P25", "the entropy is averaged over padding", "stages/ppo/rollout.py",
        "masked_mean(entropy_BR, mask_BR, 1)", "entropy_BR.mean(1)",
    ),
    Mutation(
        "D2", "the cache goes by the weights alone", "stages/reference_trainer.py",
        "            self._precompute_model_hash = self._reference_key\n", "",
    ),
    Mutation(
        "L1", "PiSSA's components pass over the scaling", "models/starts.py", "(s_R / scaling).sqrt()", "s_R.sqrt()",
    ),
    Mutation(
        "L2", "DoRA's magnitudes are left out of the merged weight", "models/lora.py",
        "if role in layer.lora_magnitude_vector:", "if False:",
    ),
    Mutation(
        "L3", "a DoRA goes on from a LoRA", "models/lora.py", "if ours.use_dora != theirs.use_dora:", "if False:",
    ),
    Mutation(
        "L4", "what is taken out of the base trains", "models/starts.py",
        "    parameter.register_hook(trained)\n", "",
    ),
    Mutation(
        "L5", "a pattern may match nothing", "models/lora_spec.py",
        "if not any(get_pattern_key([pattern], path) == pattern for path in (*paths, *stacked)):", "if False:",
    ),
    Mutation(
        "L6", "a stage that goes on draws its start anew", "models/lora.py",
        "    if parent is not None:\n        embed_parent(", "    if parent is None:\n        embed_parent(",
    ),
    Mutation(
        "L7", "the head's rows get no gradient", "models/logprobs.py",
        "if rows is None or not grads else (rows.index_K, rows.rows_KH)", "",
    ),
    Mutation(
        "L7", "a rollout speaks with the base's rows", "models/generate.py",
        "with rows_written(adapters.model, role), _laid_out(", "with rows_written(adapters.model, None), _laid_out(",
    ),
    Mutation(
        "L7", "the reference's KL goes by the policy's head", "eval/kl.py",
        "heads = adapters.head_under(policy), adapters.head_under(reference)",
        "heads = adapters.head_under(policy), adapters.head_under(policy)",
    ),
    Mutation(
        "L7", "DPO's reference has the base's rows", "stages/reference_trainer.py",
        "            copy_rows(self.model, DEFAULT, REF)\n", "",
    ),
    Mutation(
        "L8", "new tokens do not train", "models/lora_spec.py", "if base.added else self", "if False else self",
    ),
    Mutation(
        "L8", "the seed of new rows says nothing", "models/added_tokens.py",
        "torch.default_generator.manual_seed(asked.seed)", "torch.default_generator.manual_seed(0)",
    ),
    Mutation(
        "L8", "a child starts with the base's rows", "models/lora.py",
        "        embed_rows(state[name], has, tensor, had)\n", "",
    ),
    Mutation(
        "L8", "the tokens are no part of what the base is", "models/added_tokens.py",
        "base.sha256, list(asked.tokens), asked.seed]", "base.sha256, asked.seed]",
    ),
]  # fmt: skip

MUTATIONS += [
    Mutation(
        "F1", "the embedding stays as it is", "models/whole_model.py",
        "        model.requires_grad_(True)\n",
        "        model.requires_grad_(True)\n        model.get_input_embeddings().requires_grad_(False)\n",
    ),
    Mutation(
        "F1", "the head's gradient is lost", "models/logprobs.py",
        "head_trains = (weight_VH.requires_grad and rows is None)", "head_trains = (False and rows is None)",
    ),
    Mutation(
        "F2", "the policy is its own reference", "stages/reference_trainer.py",
        "policy.reference(tokenizer, packed=job.packed) if isinstance", "policy.model if isinstance",
    ),
    Mutation(
        "F2", "the weights are held in 16 bits", "models/whole_model.py",
        "load_model(base, dtype=torch.float32, task=task", "load_model(base, dtype=dtype, task=task",
    ),
    Mutation(
        "F3", "what trained is left in 16 bits", "models/whole_model.py",
        "                each.data = held[name]\n", "                pass\n",
    ),
    Mutation(
        "F3", "a base forgets what it was made from", "models/lineage.py",
        'entry["made_from"] = {', "ignored = {",
    ),
    Mutation(
        "F4", "a child starts from the base that its parent left", "recipes/graph.py",
        "    if _is_full(recipe, stage.parent):\n", "    if False:\n",
    ),
    Mutation(
        "F4", "a packed base is trained", "recipes/graph.py",
        "    if recipe.model.quantization is not None:\n        said = \"the weights",
        "    if False:\n        said = \"the weights",
    ),
]  # fmt: skip

MUTATIONS += [
    Mutation(
        "R1", "the head that never trained is saved", "models/reward_model.py",
        "inner.score.modules_to_save[DEFAULT]", "inner.score.original_module",
    ),
    Mutation(
        "R2", "the head starts at a width's own scale", "models/heads.py",
        "(linear.in_features + 1) ** -0.5", "0.02",
    ),
    Mutation(
        "R3", "EOS is taken for padding", "models/tokens.py",
        "config.eos_token_id = tokenizer.pad_token_id,", "config.eos_token_id = tokenizer.eos_token_id,",
    ),
    Mutation(
        "R4", "scores are not centred", "stages/kinds.py",
        'Annotated[float, Ge(0)],\n            0.01,', 'Annotated[float, Ge(0)],\n            0.0,',
    ),
    Mutation(
        "R4", "margins are left out", "stages/reward.py", 'if "margin" in pairs.column_names else', "if False else"
    ),
    Mutation("R5", "a tie counts as a win", "stages/metrics.py", "0.5 if good == bad", "1.0 if good == bad"),
    Mutation(
        "R6", "shorter wins as often as longer", "stages/metrics.py",
        '"shorter_wins": 1 - longer', '"shorter_wins": longer',
    ),
    Mutation("R7", "the row is drawn, not its prompt", "data/split.py", "{row.key}", "{row}"),
    Mutation(
        "D1", "the frozen reference keeps its dropout", "models/adapters.py", "config.lora_dropout = 0.0", "pass"
    ),
    Mutation("D1", "a wrong reference is not noticed", "stages/trainers.py", "abs(ratio) > tolerance", "False"),
    Mutation(
        "D3", "IPO averages over prompt and response", "stages/reference_trainer.py",
        "trl._compute_loss(model, inputs,",
        'trl._compute_loss(model, {**inputs, "completion_mask": inputs["attention_mask"]},',
    ),
    Mutation("D4", "a batch of one passes", "stages/method_problems.py", "batch_size < 2 or rows < 2", "rows < 2"),
    Mutation(
        "D5", "EOS does not train", "data/encode.py",
        "labels[start:end] = spans.ids[start:end]", "labels[start : end - 1] = spans.ids[start : end - 1]",
    ),
    Mutation("D5", "the prompt trains", "data/encode.py", "[IGNORED] * len(prompt) + trained", "prompt + trained"),
    Mutation(
        "D6", "a reply sees the other replies to its prompt", "models/prefix_tree.py",
        " & (index_T[:, None] < self.end_N[key_C])", "",
    ),
    Mutation(
        "D6", "on a GPU a square whose last key is seen is seen whole", "models/flex_tree.py",
        "(end_ST.min(1) >= first_Q[:, None] + SQUARE)", "(end_ST.max(1) >= first_Q[:, None] + SQUARE)",
    ),
    Mutation(
        "D7", "a prompt ends in a token that reaches into the reply", "data/spans.py",
        "if moved and (joined", "if not moved and (joined",
    ),
    Mutation(
        "D8", "each micro-batch is averaged over its own tokens", "stages/trainers.py", "evaluate_seconds = 0.0",
        "evaluate_seconds = 0.0\n    model_accepts_loss_kwargs = property(lambda _: False, lambda *_: None)",
    ),
    Mutation("D9", "a doubled BOS stays", "data/template.py", "while ids[:2] == [self.bos, self.bos]:", "while False:"),
    Mutation(
        "E1", "one order alone counts", "eval/statistics/winrate.py", "0.5 * (first + (1.0 - second))", "first"
    ),
    Mutation(
        "E1", "a missing verdict is a tie", "eval/statistics/winrate.py",
        "np.nan if verdict is None else verdict for verdict in policy_first",
        "0.5 if verdict is None else verdict for verdict in policy_first",
    ),
    Mutation("E2", "every outcome is drawn by itself", "eval/statistics/intervals.py", "if units is None:", "if True:"),
    Mutation(
        "E3", "the length difference is not bounded", "eval/statistics/length_control.py",
        "np.tanh(difference_N / spread)", "(difference_N / spread)",
    ),
    Mutation(
        "E3", "the length term stays in", "eval/statistics/length_control.py",
        "same_length=True)", "same_length=False)",
    ),
    Mutation("E4", "the KL runs the other way", "eval/kl.py", "(logp_CV.exp() *", "(logq_CV.exp() *"),
    Mutation(
        "E4", "the reference is read at temperature 1", "eval/kl.py",
        "reference_CV.float() / temperature", "reference_CV.float()",
    ),
    Mutation(
        "E5", "every policy has a random stream of its own", "eval/samples.py",
        "seed=seed,", "seed=seed + len(policy),",
    ),
    Mutation("E5", "every share of the prompts is drawn as the first", "eval/samples.py", "first=first,", "first=0,"),
    Mutation(
        "E6", "a person votes twice on the same replies", "eval/chat/votes.py",
        "if any(_choice(each) == mine for each in read_json_lines(path)):", "if False:",
    ),
    Mutation(
        "E6", "people who vote at the same time are not kept apart", "journal.py",
        'with FileLock(path.with_name(f".{path.name}.lock")):', "if True:",
    ),
    Mutation(
        "G1", "a group's spread is that of a population", "stages/advantages.py",
        "/ (count_P1 - 1)).sqrt()", "/ count_P1).sqrt()",
    ),
    Mutation(
        "G1", "nothing is added to the standard deviation", "stages/advantages.py",
        "GROUP_EPSILON = 1e-4", "GROUP_EPSILON = 1e-8",
    ),
    Mutation(
        "G2", "the groups with a spread are counted", "stages/groups.py",
        "flat = torch.isclose(std_B, torch.zeros_like(std_B)).double()", "flat = (std_B > 0).double()",
    ),
    Mutation(
        "G3", "a reply is its own baseline too", "stages/advantages.py",
        "baseline_PN = (scores_PN.nansum(1, keepdim=True) - scores_PN) / others_P1",
        "baseline_PN = scores_PN.nansum(1, keepdim=True) / (others_P1 + 1)",
    ),
    Mutation(
        "G4", "dapo's mean is over the step", "stages/losses.py",
        "factor = steps / max(rollout_tokens, 1.0)", "factor = 1.0 / max(tokens, 1.0)",
    ),
    Mutation(
        "G4", "a micro-batch has a mean over rows of its own", "stages/losses.py",
        "return 1.0 / (rows * mask_BR.sum(1, keepdim=True)",
        "return 1.0 / (len(mask_BR) * mask_BR.sum(1, keepdim=True)",
    ),
    Mutation(
        "G5", "the clip is as low above 1 as below", "stages/losses.py",
        "near_BX = weights_BX.clamp(1 - epsilon, 1 + epsilon_high)",
        "near_BX = weights_BX.clamp(1 - epsilon, 1 + epsilon)",
    ),
    Mutation(
        "G6", "delta bounds nothing", "stages/losses.py",
        "bounded_BX = weights_BX if delta is None else weights_BX.clamp(max=delta)", "bounded_BX = weights_BX",
    ),
    Mutation(
        "G7", "the KL's terms have no weight", "stages/losses.py",
        "return kl_BR if weights_BX is None else kl_BR * weights_BX", "return kl_BR",
    ),
    Mutation(
        "G7", "no gradient goes through the weight", "stages/losses.py",
        "else kl_BR * weights_BX", "else kl_BR * weights_BX.detach()",
    ),
    Mutation(
        "G8", "a row's ratio is the product of its tokens'", "stages/losses.py",
        "(log_ratio_BR.sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)).exp()",
        "log_ratio_BR.sum(1, keepdim=True).exp()",
    ),
    Mutation(
        "G9", "replies that were cut off train", "stages/groups.py",
        "return episodes.mask_BR & episodes.finished_B[:, None]", "return episodes.mask_BR",
    ),
    Mutation(
        "G9", "their tokens are in the step's count", "stages/ppo/method.py",
        "own.append((lengths_B * finished_B)[here].sum())", "own.append(lengths_B[here].sum())",
    ),
    Mutation(
        "G10", "the policy is its own old one", "stages/grpo.py",
        "torch.where(counted_BR, logps_BR - part.logps_BR, 0.0)",
        "torch.where(counted_BR, logps_BR - logps_BR.detach(), 0.0)",
    ),
    Mutation("G10", "beta counts twice", "stages/grpo.py", "+ config.beta * kl_BR", "+ 2 * config.beta * kl_BR"),
    Mutation(
        "G11", "the KL is added to the score", "stages/rloo.py",
        "scores.total_B - config.beta * kl_B", "scores.total_B + config.beta * kl_B",
    ),
    Mutation(
        "G11", "the loss is a sum over rows", "stages/losses.py",
        "near_B * advantages_B).sum() / rows", "near_B * advantages_B).sum()",
    ),
    Mutation(
        "G12", "the entropies of the rollout in flight are not kept", "stages/ppo/rollout.py",
        'for f in fields(self) if f.name != "episodes"}',
        'for f in fields(self) if f.name not in ("episodes", "entropy_BR")}',
    ),
    Mutation(
        "G13", "processes share a group", "stages/ppo/shared.py",
        "rows_PN = rows.view(-1, group)", "rows_PN = rows.view(-1, 1)",
    ),
    Mutation(
        "G13", "minibatches part groups", "stages/ppo/update.py",
        "rows = (order[:, None] * group + torch.arange(group)).flatten()", "rows = torch.randperm(size)",
    ),
    Mutation(
        "G14", "micro-batches part groups", "stages/ppo/rollout.py",
        "return [each.flatten() for each in rows_PN.split(size // group)]", "return list(rows.split(size))",
    ),
    Mutation(
        "G15", "a reference without beta", "stages/groups.py",
        "return self.kl_factor() != 0", "return self.kl_factor() >= 0"
    ),
    Mutation(
        "G16", "every source weighs the same", "stages/advantages.py",
        "sum_B = (weights_S[:, None] * normal_SB).nansum(0)", "sum_B = normal_SB.nansum(0)",
    ),
    Mutation(
        "G17", "the share is that of the tokens left out", "stages/grpo.py",
        "torch.quantile(entropy_N, 1 - self.config", "torch.quantile(entropy_N, self.config",
    ),
    Mutation(
        "G18", "the least of the last micro-batch is the step's", "stages/ppo/update.py",
        "largest = torch.maximum(largest, found[named:])", "largest = found[named:]",
    ),
    Mutation(
        "G18", "a step without replies that count has a least of 0", "stages/ppo/update.py",
        'totals.get(f"{name} steps", 0.0)', 'totals["steps"]',
    ),
    Mutation(
        "G18", "tokens are those that were written", "stages/ppo/trainer.py",
        "round(float(read) + tokens)", "round(tokens)",
    ),
    Mutation(
        "G19", "log-probs and entropies are one tensor", "stages/ppo/method.py",
        "{role: unknown_BR.clone() for role in (DEFAULT, *roles)}, unknown_BR.clone()",
        "{role: unknown_BR for role in (DEFAULT, *roles)}, unknown_BR",
    ),
    Mutation(
        "G19", "several steps leave it to the first", "stages/groups.py",
        "self.num_mini_batches == 1 and not", "not",
    ),
    Mutation(
        "T1", "the KLs are exchanged", "models/divergence.py",
        "    if beta == 0:\n        return _kl(teacher_CV, student_CV)",
        "    if beta == 0:\n        return _kl(student_CV, teacher_CV)",
    ),
    Mutation(
        "T1", "the mixture is the other way round", "models/divergence.py",
        "student_CV + math.log1p(-beta), teacher_CV + math.log(beta)",
        "student_CV + math.log(beta), teacher_CV + math.log1p(-beta)",
    ),
    Mutation(
        "T1", "the teacher speaks at temperature 1", "models/divergence.py",
        "(spec.teacher.logits(teacher_NH[rows]) / spec.temperature)", "spec.teacher.logits(teacher_NH[rows])",
    ),
    Mutation(
        "T2", "a token's weight does not reach its gradient", "models/divergence.py",
        "(grad_N[:, None] * gradient_NH)", "(grad_N.mean() * gradient_NH)",
    ),
    Mutation(
        "T2", "the teacher's states are a position off", "stages/distill.py",
        "teacher_BTH.flatten(0, 1)[tokens.before_N]", "teacher_BTH.flatten(0, 1)[tokens.token_N]",
    ),
    Mutation(
        "T3", "each micro-batch is a mean of its own", "stages/distill.py",
        "now.divergence_N.sum() / step.tokens", "now.divergence_N.mean()",
    ),
    Mutation(
        "T4", "the token that ends a reply is no part of it", "stages/ppo/rollout.py",
        "torch.tensor([len(tokens) for tokens in generation.tokens], device=device)",
        "torch.tensor([len(t) - f for t, f in zip(generation.tokens, generation.finished)], device=device)",
    ),
    Mutation(
        "T5", "the base answers in its adapter's place", "stages/teachers.py",
        "with self.trunk.adapters.using(self.role):", "with self.trunk.adapters.using(None):",
    ),
    Mutation(
        "T5", "a teacher beside holds gradients", "stages/teachers.py",
        "parameter.requires_grad_(False)", "parameter.requires_grad_(True)",
    ),
    Mutation("T6", "any ids will do", "stages/teachers.py", "if vocabularies[0] == vocabularies[1]:", "if True:"),
    Mutation(
        "T6", "vocabularies of other sizes are let through", "stages/teachers.py",
        "if _size(adapters) != _size(student.adapters):", "if False:",
    ),
    Mutation(
        "T7", "the first iterations are the student's own", "stages/distill.py",
        "return after > before", "return before < 1 or after > before",
    ),
    Mutation(
        "T7", "the student speaks in every iteration", "stages/distill.py",
        "        if self.speaks():\n            return super()._respond(prompts)",
        "        if True:\n            return super()._respond(prompts)",
    ),
    Mutation(
        "T8", "a resumed run draws the rollout in flight anew", "stages/ppo/trainer.py",
        "            if self.loop.slot:", "            if False:",
    ),
    Mutation(
        "T9", "a step is divided by this process' tokens", "stages/distill.py",
        "now.divergence_N.sum() / step.tokens\n", "now.divergence_N.sum() / part.episodes.length_B.sum()\n",
    ),
    Mutation(
        "T10", "the record says nothing of the teacher", "stages/run.py", "            | dict(made_of)\n", "",
    ),
    Mutation(
        "T10", "the teacher is in no key", "recipes/graph.py",
        "for each in (taught, data_stage(recipe, name))", "for each in (data_stage(recipe, name),)",
    ),
    Mutation(
        "S1", "a checkpoint's pickle is read whole", "models/pickles.py", "weights_only=True", "weights_only=False"
    ),
    Mutation(
        "S2", "everybody imports what lies beside a recipe", "own_code.py",
        "if fullname != self.asked and not self._is_own(_importer(inspect.currentframe())):", "if False:",
    ),
    Mutation(
        "S3", "a stage that goes on tells its trackers rows again", "stages/trackers.py",
        "if self._at <= self._told:", "if self._at < (0, 0):",
    ),
]  # fmt: skip

MUTATIONS += [
    Mutation(
        "W1", "a box ends at the first brace", "stages/scorers/answers.py",
        "            if depth == 0:\n                return text", "            if True:\n                return text",
    ),
    Mutation(
        "W1", "what was thought counts", "stages/scorers/answers.py",
        "    said = after_thinking(text)\n", "    said = text\n",
    ),
    Mutation(
        "W1", "the last number comes before what is in a box", "stages/scorers/verifiers.py",
        '"numeric": ("boxed", "hash", "answer", "last_number")',
        '"numeric": ("last_number", "boxed", "hash", "answer")',
    ),
    Mutation(
        "W2", "the sign is passed over", "stages/scorers/answers.py",
        'value = -size if "-" in before else size', "value = size",
    ),
    Mutation(
        "W2", "a comma stands between any digits", "stages/scorers/answers.py",
        "(?:[0-9]{{1,3}}(?:{group}[0-9]{{3}})+|[0-9]+)", "(?:[0-9]{{1,3}}(?:{group}[0-9]+)+|[0-9]+)",
    ),
    Mutation(
        "W2", "pi behind a number is a unit", "stages/scorers/answers.py",
        '_NO_UNITS = frozenset(("pi", "e", "i", *_POWERS))', "_NO_UNITS = frozenset(_POWERS)",
    ),
    Mutation(
        "W2", "0.3 is the float that it is kept as", "stages/scorers/verifiers.py",
        "else Fraction(repr(value))\n    found", "else Fraction(value)\n    found",
    ),
    Mutation(
        "W3", "case never counts", "stages/scorers/verifiers.py",
        "return text.casefold() if case else text", "return text.casefold()",
    ),
    Mutation(
        "W3", "white space counts", "stages/scorers/verifiers.py",
        'text = " ".join((re.sub(r"[^\\w\\s]", "", text) if marks else text).split())',
        'text = re.sub(r"[^\\w\\s]", "", text) if marks else text',
    ),
    Mutation(
        "W4", "a pattern that is found is right, whatever the column says", "stages/scorers/verifiers.py",
        'or (found[1] or "").strip() in wanted', "or True",
    ),
    Mutation(
        "W4", "one word too many is no matter", "stages/scorers/verifiers.py",
        "length <= high", "length <= high + 1",
    ),
    Mutation(
        "W4", "a schema's unknown words are passed over", "stages/scorers/json_shape.py",
        "            if key not in known:", "            if False:",
    ),
    Mutation(
        "W5", "a row without an answer makes a reply wrong", "stages/scorers/verifiers.py",
        "                why[place] = str(error)", "                del error",
    ),
    Mutation(
        "W6", "all checks or none", "stages/scorers/rubric.py",
        "return sum(self.results(text).values()) / len(self.checks)", "return float(all(self.results(text).values()))",
    ),
    Mutation(
        "W7", "a model's NaN is 0", "stages/ppo/rewards.py",
        "        if bool(scores_B.isfinite().all()):\n            return scores_B\n        scores",
        "        if True:\n            return scores_B.nan_to_num()\n        scores",
    ),
    Mutation(
        "W7", "a server's infinity is a number", "stages/scorers/replies.py",
        "return None if -LARGEST <= score <= LARGEST else", "return None if score == score else",
    ),
    Mutation(
        "W7", "a function's NaN says that it does not apply", "stages/reward_functions.py",
        "or not abs(float(score)) <= _LARGEST", "or abs(float(score)) > _LARGEST",
    ),
    Mutation(
        "W8", "whatever is to be skipped counts as 0", "stages/scorers/replies.py",
        'filled = math.nan if self.on_failure == "skip"', 'filled = 0.0 if self.on_failure == "skip"',
    ),
    Mutation(
        "W8", "a source that scores nothing goes on", "stages/scorers/replies.py",
        "        if len(why) == len(replies):", "        if False:",
    ),
    Mutation(
        "W8", "a failure never stops", "stages/scorers/replies.py",
        '        if self.on_failure == "stop":', "        if False:",
    ),
    Mutation(
        "W8", "the others wait for a first process that has failed", "stages/processes.py",
        "            except UserError as error:\n", "            except AssertionError as error:\n",
    ),
    Mutation(
        "W9", "a server may give more scores than replies", "stages/scorers/http_scores.py",
        "if len(scores) != count:", "if len(scores) < count:",
    ),
    Mutation(
        "W9", "a function may give more scores than replies", "stages/reward_functions.py",
        "if len(scores) != len(completions):", "if len(scores) < len(completions):",
    ),
    Mutation(
        "W10", "every source weighs the same", "stages/ppo/rewards.py",
        "return (weights_S[:, None] * scores_SB).nansum(0)", "return scores_SB.nansum(0)",
    ),
    Mutation(
        "W10", "the spread is that of a sample", "stages/ppo/rewards.py",
        "scores_SB.std(0, correction=0)", "scores_SB.std(0, correction=1)",
    ),
    Mutation(
        "W10", "a source that does not apply gives 0", "stages/ppo/rewards.py",
        "    mean_B = scores_SB.nanmean(0)\n", "    mean_B = scores_SB.nan_to_num(0.0).mean(0)\n",
    ),
    Mutation(
        "W11", "each source is clipped before the sum", "stages/ppo/rewards.py",
        "            parts.append(scores_B)\n",
        "            parts.append(scores_B if config.reward_clip is None"
        " else scores_B.clamp(-config.reward_clip, config.reward_clip))\n",
    ),
    Mutation(
        "W11", "sources without a mean are divided by their stage's deviation", "stages/ppo/rewards.py",
        'scores_B = (scores_B - mean) / (std if config.reward_scale == "std" else 1.0)',
        "scores_B = (scores_B - mean) / std",
    ),
    Mutation(
        "W11", "what is only looked at changes the running scale", "stages/ppo/rewards.py",
        "        if running and training:\n", "        if running:\n",
    ),
    Mutation(
        "W12", "a reply is shown with its verdict", "stages/scorers/endpoint_prompts.py",
        'return _LIKE_VERDICT.sub(r"[ [\\1] ]", framed)', "return framed",
    ),
    Mutation(
        "W12", "a rating may lie beyond its bounds", "stages/scorers/endpoint_prompts.py",
        "return value if value is not None and LOWEST <= value <= HIGHEST else None", "return value",
    ),
    Mutation(
        "W12", "what counts is the same in every row", "stages/scorers/endpoint_settings.py",
        "        if self.column is None:\n            return self.criteria",
        "        if True:\n            return self.criteria",
    ),
    Mutation(
        "W13", "verl's server is not told the truth", "stages/scorers/http_formats.py",
        '"ground_truth": each.label,', '"ground_truth": each.columns.get("ground_truth"),',
    ),
    Mutation(
        "W13", "OpenRLHF's server is asked about the reply alone", "stages/scorers/http_scores.py",
        "self.tokenizer.decode([*prompt, *reply])", "self.tokenizer.decode(reply)",
    ),
    Mutation(
        "W13", "OpenRLHF's `scores` train, not its `rewards`", "stages/scorers/http_formats.py",
        'for name in ("rewards", "scores") if name in answer', 'for name in ("scores", "rewards") if name in answer',
    ),
    Mutation(
        "W14", "the address of a server is no part of what is kept", "stages/scorers/http_scores.py",
        '{self.server.address}\\n{self.server.format}\\n{body}', "{self.server.format}\\n{body}",
    ),
    Mutation(
        "W14", "columns are no part of what is kept", "stages/scorers/http_scores.py",
        "json.dumps(self.server.shape.body([asked]), sort",
        'json.dumps(self.server.shape.body([asked]) | {"columns": 0}, sort',
    ),
    Mutation(
        "W14", "the model is no part of what is kept", "stages/scorers/endpoint_client.py",
        "asked = [self.url, self.model, messages, self.parameters]", "asked = [self.url, messages, self.parameters]",
    ),
    Mutation(
        "W14", "the instruction is no part of what is kept", "stages/scorers/endpoint_client.py",
        "asked = [self.url, self.model, messages, self.parameters]",
        "asked = [self.url, self.model, messages[1:], self.parameters]",
    ),
    Mutation(
        "W14", "equal replies are asked about each time", "stages/scorers/http_scores.py",
        "        keys = [self._key(each) for each in asked]\n",
        "        keys = [f\"{self._key(each)}{place}\" for place, each in enumerate(asked)]\n",
    ),
    Mutation(
        "W14", "each process asks by itself", "stages/ppo/rewards.py",
        "these.count > 1 and source.kind in SERVERS", "False",
    ),
    Mutation(
        "W15", "a busy server is not asked again", "stages/scorers/posting.py",
        "if status not in (408, 429) and status < 500:", "if status < 600:",
    ),
    Mutation(
        "W15", "a reply fails with those that it was sent with", "stages/scorers/http_scores.py",
        "if again := [[key] for key in why]:", "if again := []:",
    ),
    Mutation(
        "W15", "a server that is not there is its replies' failure", "stages/scorers/http_scores.py",
        "            if not error.reached:\n                raise error\n", "",
    ),
    Mutation(
        "W16", "what a server says is shown with the key in it", "stages/scorers/posting.py",
        'else text.replace(key, "***")', "else text",
    ),
    Mutation(
        "W17", "patience is part of a stage's key", "stages/scorers/kinds.py",
        "for key, value in entry.items() if key not in _IDLE}", "for key, value in entry.items()}",
    ),
    Mutation(
        "W17", "what counts is not", "stages/scorers/kinds.py",
        '_IDLE = ("concurrency",', '_IDLE = ("criteria", "concurrency",',
    ),
    Mutation(
        "K1", "the base speaks", "stages/sample/stage.py",
        "            self.adapters,\n            self.role,", "            self.adapters,\n            None,",
    ),
    Mutation(
        "K1", "`top_k` is not heard", "stages/sample/stage.py", "top_k=settings.top_k,", "top_k=0,"
    ),
    Mutation(
        "K2", "the replies to a prompt are one", "stages/sample/stage.py",
        '"sample", first + i // n, i % n)', '"sample", first + i // n, 0)',
    ),
    Mutation(
        "K2", "each piece draws as the first", "stages/sample/stage.py",
        '"sample", first + i // n, i % n)', '"sample", i // n, i % n)',
    ),
    Mutation(
        "K3", "replies of one score are a pair", "stages/sample/keep.py",
        "if most == least or best.text == worst.text:", "if False:",
    ),
    Mutation(
        "K3", "a tie goes to the last", "stages/sample/keep.py",
        "(most, best), (least, worst) = max(scored,", "(most, best), (least, worst) = max(scored[::-1],",
    ),
    Mutation(
        "K3", "the margin is enough", "stages/sample/keep.py",
        "if not most - least > margin:", "if most - least < margin:",
    ),
    Mutation(
        "K4", "the threshold itself is below it", "stages/sample/keep.py",
        "if score < threshold:", "if score <= threshold:",
    ),
    Mutation(
        "K4", "a text is kept as often as it was drawn", "stages/sample/keep.py", "found[reply.text] = reply",
        "found[f\"{reply.draw} {reply.text}\"] = reply",
    ),
    Mutation(
        "K5", "a reply that was cut is chosen from", "stages/sample/keep.py",
        'UNFINISHED: not reply.finished and settings.unfinished == "drop",', "UNFINISHED: False,",
    ),
    Mutation(
        "K5", "a reply without text is chosen from", "stages/sample/keep.py",
        "EMPTY: not reply.text.strip(),", "EMPTY: not reply.text,",
    ),
    Mutation(
        "K6", "what was cut is written down as ended", "stages/sample/stage.py",
        "len(generation.tokens[i]), generation.finished[i])", "len(generation.tokens[i]), True)",
    ),
    Mutation(
        "K7", "scores are centred", "stages/sample/stage.py", "normalize_rewards=False,", "normalize_rewards=True,",
    ),
    Mutation(
        "K7", "a reply without a score has 0", "stages/sample/stage.py",
        "return [None if none else score for", "return [score if none else score for",
    ),
    Mutation(
        "K8", "a damaged piece is taken as it is", "stages/sample/drawn.py",
        "if written == _sha256(content) else None", "if written else None",
    ),
    Mutation(
        "K8", "what was drawn is drawn again", "stages/sample/stage.py",
        "done = pieces[-1].end if pieces else 0", "pieces, done = [], 0",
    ),
    Mutation(
        "K9", "a column takes a reply's place", "stages/sample/keep.py",
        "for name, value in prompt.columns.items() if name not in _OURS}", "for name, value in prompt.columns.items()}",
    ),
    Mutation(
        "K9", "another format is not noticed", "stages/sample/keep.py",
        "        if not _reads_back(row, prompt, kinds[0]):", "        if False:",
    ),
    Mutation(
        "K10", "the lineage names a policy by its folder", "stages/sample/stage.py",
        '"sha256": sha256_of(file),', '"sha256": str(file),',
    ),
    Mutation(
        "K11", "the rows that were sampled are no part of a later stage's key", "cli/keys.py",
        'parts |= {f"stage {parent}": known[parent], f"adapter {parent}": content(self.run_dir / parent)}', "pass",
    ),
    Mutation(
        "Q1", "the scales' mean is left out", "models/quantised.py", "absmax_B = absmax_B + self.offset", "pass",
    ),
    Mutation(
        "Q1", "eight bits have 128 steps", "models/quantised.py", "(self.absmax / 127)", "(self.absmax / 128)",
    ),
    Mutation(
        "Q1", "bitsandbytes' own layers compute", "models/quantised.py",
        "    if not _replace(model, kinds, ours):", "    if True:",
    ),
    Mutation(
        "Q2", "the scales are no part of the base", "models/quantised.py", "_frozen(state.absmax)", "state.absmax",
    ),
    Mutation(
        "Q3", "the lineage does not say that the base was packed", "stages/run.py",
        '            "quantization": job.quantization,\n', "",
    ),
    Mutation(
        "Q4", "beside a packed base the bare base speaks", "models/generate.py",
        "with adapters.using(role):\n            yield\n        return",
        "with adapters.using(None):\n            yield\n        return",
    ),
    Mutation(
        "Q5", "the base is merged as it lies", "models/merging.py", "    if packed is None:\n", "    if True:\n",
    ),
    Mutation(
        "Q6", "a packed layer is not divided", "models/sharded.py", " or id(each) in packed)", ")",
    ),
    Mutation(
        "V1", "the first policy answers for all", "stages/ppo/served.py",
        "if self.known is None or self.known.digest != digest:", "if self.known is None:",
    ),
    Mutation(
        "V1", "the adapter that is replaced stays", "stages/ppo/served.py",
        "            self.server.unload(self.known.name)\n", "            pass\n",
    ),
    Mutation(
        "V1", "a name says nothing of the content", "stages/ppo/served.py", "-{digest[:8]}-step-", "-step-",
    ),
    Mutation(
        "V1", "another adapter of that name will do", "stages/serving/server.py",
        "if held is None or Path(held) != Path(wanted):", "if held is None:",
    ),
    Mutation(
        "V2", "a stale answer is taken", "stages/serving/server.py",
        "whose: drawn.model not in (None, name),", "whose: False,",
    ),
    Mutation(
        "V2", "a reply may end as the server likes", "stages/serving/server.py",
        "drawn.ended and not ends,", "False,",
    ),
    Mutation(
        "V2", "a log-prob may be missing", "stages/serving/server.py",
        "len(drawn.logprobs) != len(tokens),", "False,",
    ),
    Mutation(
        "V3", "any base will do", "stages/ppo/served.py", "        if not gap <= tolerance:", "        if False:",
    ),
    Mutation(
        "V3", "a base's content is not looked at", "stages/ppo/served.py",
        "        if held.sha256 != base.sha256:", "        if False:",
    ),
    Mutation(
        "V3", "an adapter may be loaded and not used", "stages/ppo/served.py",
        "        if not missed <= _WITHIN * change:", "        if False:",
    ),
    Mutation(
        "V4", "every reply has the first one's seed", "stages/ppo/served.py",
        'seed_of(seed, "reply", first + place)', 'seed_of(seed, "reply", first)',
    ),
    Mutation(
        "V4", "log-probs at temperature 1 are taken for any", "stages/serving/server.py",
        "self._scaled = scaled * _SCALED**0.5 < plain", "self._scaled = True",
    ),
    Mutation(
        "V4", "replies end where the server's base does as well", "stages/serving/engines.py",
        '            "ignore_eos": True,\n', "",
    ),
    Mutation(
        "V5", "what a server drew counts as the policy's", "stages/ppo/off_policy.py",
        "advantages_BR=rollout.advantages_BR * weights_BX", "advantages_BR=rollout.advantages_BR",
    ),
    Mutation(
        "V5", "the weight is upside down", "stages/ppo/off_policy.py",
        "rollout.logps_BR - episodes.sampler_logps_BR", "episodes.sampler_logps_BR - rollout.logps_BR",
    ),
    Mutation(
        "V5", "a masked weight is cut to its bound", "stages/losses.py",
        'if beyond == "truncate":', 'if True:',
    ),
    Mutation(
        "V5", "what becomes likelier is left out", "stages/losses.py", "(~falls_B1 | (mean", "(falls_B1 | (mean",
    ),
    Mutation(
        "V6", "a server that is back is not given the adapter", "stages/serving/server.py",
        "                if again is not None:\n                    again()\n", "",
    ),
    Mutation(
        "V6", "a server may come back with another base", "stages/ppo/served.py",
        "            self.probe.base_is_ours(self.server)\n", "            pass\n",
    ),
    Mutation(
        "V6", "a server that is gone is not waited for", "stages/serving/server.py",
        "                if not self._may_come_back(error):", "                if True:",
    ),
    Mutation(
        "V7", "a run without its server keeps nothing", "stages/ppo/trainer.py",
        "if own.plan is not None and self.state.global_step > 0:", "if False:",
    ),
]  # fmt: skip

MUTATIONS += [
    Mutation(
        "V8", "log-probs of a server are those of temperature 1", "stages/serving/command.py",
        '["--logprobs-mode", "processed_logprobs"],', '["--logprobs-mode", "raw_logprobs"],',
    ),
    Mutation(
        "V8", "a policy is served with the base's tokenizer", "cli/serve.py",
        'tokenizer = folder if any(folder.glob("tokenizer*")) else base.path', "tokenizer = base.path",
    ),
    Mutation("V8", "the last policy's rank will do", "cli/serve.py", "max(ranks, default=8)", "ranks[0]"),
    Mutation(
        "V9", "a reward model is served as a policy", "cli/serve.py",
        'if config.get("task_type") == "SEQ_CLS":', "if False:",
    ),
    Mutation(
        "V9", "any kind of adapter is served", "stages/serving/command.py",
        'if (said := not_served({"peft_type": None} | dict(config))) is not None:', "if (said := None) is not None:",
    ),
    Mutation(
        "V10", "a command may name another base or port", "stages/serving/command.py",
        "if taken := [option for option in _OURS if option in given]:", "if taken := list[str]():",
    ),
    Mutation(
        "V10", "ours hold before the user's own words", "stages/serving/command.py",
        "options = [words for words in build(serving) if words[0] not in given]", "options = build(serving)",
    ),
    Mutation(
        "V11", "a server outlives who started it", "stages/serving/watchman.py",
        "not asked and os.getppid() == parent", "not asked",
    ),
    Mutation(
        "V11", "what a server started outlives it", "stages/serving/watchman.py",
        "        os.killpg(0, signal.SIGTERM)", "        child.terminate()\n        return 0",
    ),
    Mutation(
        "V12", "the base speaks for every policy", "stages/serving/finished.py",
        "return self.server.sample(name, prompts,", "return self.server.sample(self.base, prompts,",
    ),
    Mutation(
        "V12", "a finished adapter is not held against ours", "stages/serving/finished.py",
        "                self.check(folder, name)\n", "",
    ),
    Mutation(
        "V13", "every prompt has the first one's seed", "eval/served.py",
        'seed_of(spec.seed, "evaluation reply", place)', 'seed_of(spec.seed, "evaluation reply", 0)',
    ),
    Mutation(
        "V14", "replies of a server pass for those drawn here", "eval/workbench.py",
        '{} if spec.rollout is None else {"server": spec.rollout.rollout_engine}', "{}",
    ),
    Mutation(
        "V15", "a server that has ended is waited for", "stages/serving/server.py",
        "            self.own.revive()", "            pass",
    ),
    Mutation(
        "V15", "an evaluation leaves its server behind", "eval/run.py", "        bench.close()", "        pass",
    ),
    Mutation(
        "V16", "a server draws beside a quantised base", "eval/decoding.py",
        "    if quantization is not None:\n        said = f\"a server", "    if False:\n        said = f\"a server",
    ),
    Mutation(
        "V16", "a policy that servers do not take is found when it is to speak", "recipes/served.py",
        "        check_kind(values,", "        check_kind({},",
    ),
    Mutation(
        "V17", "every reply to a prompt has one seed", "stages/sample/stage.py",
        'seed_of(self.job.seed, "sample", first + i // n, i % n)', 'seed_of(self.job.seed, "sample", first + i // n)',
    ),
    Mutation(
        "V17", "the base samples for the parent", "stages/sample/stage.py",
        "policies.sample(self.job.parent, *asked", "policies.sample(None, *asked",
    ),
    Mutation(
        "V18", "what was drawn ahead is drawn again, by the newest policy", "stages/ppo/trainer.py",
        "            if served is None or not served.awaited:\n", "            if True:\n",
    ),
    Mutation(
        "V18", "the replies are two iterations old", "stages/ppo/trainer.py",
        "                served.put(step)\n", "                pass\n",
    ),
    Mutation(
        "V18", "the prompts of this iteration are drawn ahead once more", "stages/ppo/trainer.py",
        "served.start(self._prompts_at(iteration + 1)", "served.start(self._prompts_at(iteration)",
    ),
    Mutation(
        "V18", "a resumed run draws with the policy as it is", "stages/ppo/trainer.py",
        "            found = served.restore(Path(checkpoint))", "            found = False",
    ),
    Mutation(
        "V18", "a checkpoint keeps the policy that the server has, not the one that draws", "stages/ppo/served.py",
        "shutil.copytree(self.drawer.folder, checkpoint", "shutil.copytree(self.known.folder, checkpoint",
    ),
    Mutation(
        "V18", "an adapter goes while it draws", "stages/ppo/served.py",
        "        if self.awaited:", "        if False:",
    ),
    Mutation(
        "V18", "a draw goes on after its run", "stages/ppo/ahead.py", "        self._thread.join()\n", "        pass\n",
    ),
    Mutation(
        "V18", "an older policy's replies are held to the bound", "stages/ppo/trainer.py",
        "(asked is not None or not metrics.get(STALENESS))", "True",
    ),
]  # fmt: skip

MUTATIONS += [
    Mutation(
        "B1", "rows that repeat a prompt stay in the file", "data/stream.py",
        "rows if all(keep) else rows.filter(pa.array(keep))", "rows",
    ),
    Mutation("B1", "what lies behind a limit counts", "data/stream.py", "self.ended.add(source)", "pass"),
    Mutation("B2", "rows go by their sources alone", "stages/encoded.py", '        "data": asdict(task.spec),\n', ""),
    Mutation("B2", "a file goes by its name", "stages/encoded.py", '        "sources": contents,\n', ""),
    Mutation("B2", "the code that encodes does not count", "stages/encoded.py", '        "code": _code(),\n', ""),
    Mutation(
        "B3", "a folder that is there is taken to be whole", "stages/encoded.py",
        "whole=lambda each: open_stored(each) is not None", "whole=Path.is_dir",
    ),
    Mutation(
        "B3", "a file may change while it is read", "stages/encoded.py", "_contents(job) != contents", "False"
    ),
    Mutation(
        "B4", "the classifier's rows are copied to memory", "stages/reward.py",
        'derived(pairs, "with-prompts", tables)', "Dataset(pa.concat_tables(tables()))",
    ),
    Mutation("B5", "the place of every row is kept", "data/stream.py", "task.spec, named=False", "task.spec"),
    Mutation(
        "B6", "a dataset on the hub is copied first", "data/sources.py",
        '{"streaming": True} if source.streaming else {}', "{}",
    ),
    Mutation(
        "B7", "words end at every blank", "data/pieces.py",
        "words if plain else _WORD.split(piece)", "words",
    ),
]  # fmt: skip


def copy_package(folder: Path) -> Path:
    """A copy that `import preftune` finds before any installed one, with `folder` on PYTHONPATH."""
    package = folder / "preftune"
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, package)
    return package


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)


def red_tests(package: Path, rows: list[str]) -> list[str]:
    """Which of these rows' tests fail in that copy."""
    marks = [f'checklist("{row}")' for row in rows]
    files = [
        str(file)
        for file in sorted((package / "tests").rglob("test_*.py"))
        if file.name not in SEVERAL_PROCESSES and any(mark in file.read_text(encoding="utf-8") for mark in marks)
    ]
    names = " or ".join(f"test_{row[0].lower()}{int(row[1:]):02d}_" for row in rows)
    options = ["-m", "checklist", "-k", names, "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    done = python(package, "-m", "pytest", *files, *options)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run the tests of {', '.join(rows)}:\n{done.stdout}\n{done.stderr}")
    return re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)


def apply(package: Path, mutation: Mutation) -> str:
    """Break the rule; returns the file's text as it was."""
    file = package / mutation.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise SystemExit(f"{mutation.row}: {mutation.old!r} stands {count} times in {mutation.file}, expected once")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return text


def chosen(rows: list[str], third: int | None) -> list[Mutation]:
    """The breaks of these rows (all of them if none is named), or every third of those."""
    found = [each for each in MUTATIONS if not rows or each.row in rows]
    return found if third is None else found[third % 3 :: 3]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=str.upper, help="rows of the checklist; all of them if none is named")
    parser.add_argument("--third", type=int, metavar="N", help="every third break, from N modulo 3 on")
    given = parser.parse_args()
    mutations = chosen(given.rows, given.third)
    with tempfile.TemporaryDirectory() as folder:
        package = copy_package(Path(folder))
        found = python(package, "-c", "import preftune; print(preftune.__file__)").stdout.strip()
        if Path(found) != package / "__init__.py":
            raise SystemExit(f"preftune is imported from {found}, expected the copy {package}")
        if already := red_tests(package, list(dict.fromkeys(each.row for each in mutations))):
            raise SystemExit(f"{', '.join(already)} fails before anything is broken")
        unnoticed = 0
        print("| row | what was broken | tests that went red |\n|---|---|---|")
        for mutation in mutations:
            text = apply(package, mutation)
            red = red_tests(package, [mutation.row])
            (package / mutation.file).write_text(text, encoding="utf-8")
            unnoticed += not red
            names = ", ".join(f"`{name}`" for name in red) or "**none**"
            print(f"| {mutation.row} | {mutation.broken} | {names} |", flush=True)
        print(f"\nmutations: {len(mutations) - unnoticed} passed, {unnoticed} failed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
