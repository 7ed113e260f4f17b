"""`preftune export`, and to verl: a run's stage for another program to train on."""

import inspect
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import RECIPE
from ..printed import printable
from ..recipes.build import stage_job
from ..recipes.schema import Recipe
from . import verl_reward
from .arguments import ExportTarget
from .commands import the_stage
from .export_model import export_model
from .folder import holds_adapter
from .merge import beside, check_new
from .policies import recipe_base, run_recipe
from .verl_overrides import VERSION, Override, Sizes, left_out, overrides, run_settings, served

if TYPE_CHECKING:
    from ..stages.job import StageJob
    from ..stages.ppo.config import PPOConfig

_KIND, _VERL = "ppo", "verl"
_MODEL, _REWARD, _VALUE, _TOKENIZER = "model", "reward_model", "value_adapter", "tokenizer"
_ROWS = "train.parquet"
_REWARD_FILE, _REWARD_SETTINGS, _SCRIPT, _README = "reward.py", "reward.json", "run.sh", "README.md"
_HERE = "$HERE"
"""In the script: the folder that it lies in."""


@dataclass(frozen=True)
class _Export:
    """What is written: the stage, its config, the exported rows' sizes, and where the policy starts."""

    recipe: Recipe
    job: "StageJob"
    args: "PPOConfig"
    sizes: Sizes
    model: str
    served: str | None


def export_to(
    source: Path, to: ExportTarget, stage: str | None, out: Path | None, output_dir: Path | None, dtype: str | None
) -> None:
    """`preftune export`: to verl a stage that is to be trained, to every other program a policy that is.

    Raises:
        UserError: no folder to write to, or two; and as `export_stage` and `export_model`.
    """
    if (out is None) == (output_dir is None):
        said = "says no folder to write to" if out is None else "says two folders to write to"
        raise UserError("preftune export", said, f"write preftune export {source} OUT --to {to}")
    folder = out or output_dir
    assert folder is not None
    if to != _VERL:
        export_model(source, to, stage, folder, dtype)
        return
    if dtype is not None:
        raise UserError("--dtype", "verl takes the recipe's", "leave it out")
    if stage is None and not (source / RECIPE).is_file() and (source.parent / RECIPE).is_file():
        source, stage = source.parent, source.name
    export_stage(source, to, stage, folder)


def export_stage(run: Path, to: ExportTarget, stage: str | None, out: Path) -> None:
    """Write a folder from which verl trains a run's PPO stage: data, models, reward, script, and what differs.

    The policy's parent is merged into the base, because verl's reference is its model without the adapter: with the
    parent as verl's adapter the reference would be the bare base, in silence. What is written appears whole or not at
    all.

    Args:
        run: a run's folder, with the stages that the PPO stage needs finished.
        stage: which, where the recipe has several PPO stages.
        out: a folder that does not exist yet or is empty.

    Raises:
        UserError: another kind of stage, a parent that is not finished, or what verl could only do wrongly.
    """
    check_new(out)
    recipe = run_recipe(run)
    name = _ppo_stage(recipe, stage)
    job = stage_job(recipe, name, recipe_base(recipe), run.resolve(), out)
    _check_parents(recipe, name, job, run)
    with beside(out) as folder:
        export = _fill(folder, recipe, job)
    differs = left_out(export.args, job, any(each.kind == "stage" for each in job.rewards))
    print(printable(f"{out}: {name} for {to} {VERSION}; start it with {out / _SCRIPT}"))
    print(printable(f"done otherwise there, or not at all ({len(differs)}; {_README} has them too):"))
    for each in differs:
        print(printable(f"- {each}"))


def _ppo_stage(recipe: Recipe, stage: str | None) -> str:
    """The PPO stage that is meant."""
    found = recipe.stages.get(stage) if stage is not None else None
    if found is not None and found.record.name != _KIND:
        said = f"{stage} is a {found.record.name} stage, and only PPO is handed to verl"
        mine = [name for name, each in recipe.stages.items() if each.record.name == _KIND]
        remedy = f"name one of {', '.join(mine)}" if mine else f"train it here: preftune run {recipe.name}"
        raise UserError("--stage", said, remedy)
    return the_stage(recipe, _KIND, stage)


def _check_parents(recipe: Recipe, name: str, job: "StageJob", run: Path) -> None:
    """Raises UserError where a stage that is needed is not finished, or more models score than verl serves."""
    needed = [job.parent, *(Path(str(each.target)) for each in job.rewards if each.kind == "stage")]
    for folder in needed:
        if folder is not None and not holds_adapter(folder):
            remedy = f"train it: preftune run {run / 'recipe.yaml'} --until {folder.name}"
            raise UserError(str(folder), "holds no adapter", remedy)
    where = f"stages.{name}.reward"
    for each in job.rewards:
        if each.kind not in ("stage", "model", "function"):
            said = f"a source of kind {each.kind}, which is not written out for verl"
            raise UserError(where, said, "write it as a Python function, or train here")
        if each.on_failure != "stop":
            raise UserError(where, "on_failure is none of verl's", "leave it out")
    models = [each.name for each in job.rewards if each.kind != "function"]
    if len(models) > 1:
        said = f"{len(models)} reward models, and verl serves one"
        raise UserError(where, said, "name one of them, beside functions if need be")
    if job.method_value("reward_combination") == "ensemble":
        raise UserError(f"stages.{name}.reward_combination", "ensemble is none of verl's", "write sum")


def _fill(folder: Path, recipe: Recipe, job: "StageJob") -> _Export:
    """Write everything into an empty folder."""
    from ..models.lineage import check_lineage
    from ..stages.options import stage_config
    from ..stages.ppo.config import PPOConfig
    from ..stages.run import open_tokenizer

    # 1. what the stage says, and its rows
    tokenizer = open_tokenizer(job)
    for each in job.rewards:
        if each.kind == "stage":
            check_lineage(Path(str(each.target)), job.base, tokenizer)
    args = stage_config(PPOConfig, job, held_out=False)
    sizes = _write_rows(folder, job, tokenizer, args.rollout_batch_size)
    # 2. models
    model = _write_policy(folder, job, tokenizer)
    served_model = _write_reward(folder, job, tokenizer, args)
    targets = _write_value(folder, job, args)
    # 3. script and words
    export = _Export(recipe, job, args, sizes, model, served_model)
    found = overrides(args, job, sizes, targets)
    if served_model is not None:
        found += served(job, sizes, args.max_new_tokens)
    found += run_settings(f"{recipe.name}-{job.name}", recipe.checkpoints.share, args.num_rollouts(sizes.rows))
    places = _places(export)
    script = folder / _SCRIPT
    script.write_text(_script(found, places), encoding="utf-8")
    script.chmod(0o755)
    (folder / _README).write_text(_readme(export, found, places), encoding="utf-8")
    return export


def _write_rows(folder: Path, job: "StageJob", tokenizer: Any, batch: int) -> Sizes:
    """The prompts in verl's columns.

    Raises:
        UserError: too few rows for a batch, or a row that verl would read as other tokens than preftune does.
    """
    import pyarrow
    from pyarrow import parquet

    from ..data.encode import encode_prompts
    from ..stages.run import load_data

    data = load_data(job, encode_prompts, tokenizer)
    rows, longest = [], 0
    row: Any  # a Dataset's is not typed
    for number, (row, origin) in enumerate(zip(data.train, data.origins, strict=True)):
        messages, text = _messages(row, tokenizer, origin, job.data_name)
        longest = max(longest, len(row["prompt_ids"]))
        known = {"index": number, "prompt_text": text, "messages": json.dumps(messages), "columns": row["columns"]}
        rows.append({
            "data_source": job.data_name,
            "prompt": messages,
            "ability": "preference",
            "reward_model": {"style": "model" if job.rewards[0].kind != "function" else "rule", "ground_truth": ""},
            "extra_info": known,
        })  # fmt: skip
    if len(rows) < batch:
        said = f"{len(rows)} prompts, and a rollout takes {batch}: verl leaves an incomplete one out"
        raise UserError(f"data.{job.data_name}", said, "add prompts, or lower rollout_batch_size")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / _ROWS)
    return Sizes(len(rows), longest)


def _messages(row: dict[str, Any], tokenizer: Any, origin: str, data: str) -> tuple[list[dict[str, str]], str]:
    """A prompt as verl's messages, and the text that its tokens are of.

    Raises:
        UserError: the tokens that verl makes of them are not those that preftune answers.
    """
    messages = [{"role": each["role"], "content": each["content"]} for each in row["prompt"]]
    ids = list(row["prompt_ids"])
    text = str(tokenizer.decode(ids))
    seen = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    if list(seen) != ids or list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
        said = "verl would make other tokens of it (it is cut to a limit, or has tools or parts that are no text)"
        remedy = f"leave the row out, or write data.{data}.overflow: drop"
        raise UserError(origin, said, remedy)
    return messages, text


def _write_policy(folder: Path, job: "StageJob", tokenizer: Any) -> str:
    """The model that policy and reference start from; its path, in the script's words."""
    from ..models.merging import merge_adapter

    tokenizer.save_pretrained(folder / _TOKENIZER)
    if job.parent is None:
        return str(job.base.path)
    merge_adapter(job.parent, folder / _MODEL)
    return f"{_HERE}/{_MODEL}"


def _write_reward(folder: Path, job: "StageJob", tokenizer: Any, args: "PPOConfig") -> str | None:
    """reward.py with its settings, and the reward model; the path of the model that verl serves, or None."""
    from ..models.lineage import read_lineage
    from ..models.merging import merge_adapter
    from ..stages.reward_functions import check_signature, import_function

    sources: list[dict[str, Any]] = []
    paths, model = [], None
    for each in job.rewards:
        said: dict[str, Any] = {"kind": each.kind, "weight": each.weight, "mean": 0.0, "std": 1.0}
        if each.kind == "function":
            where = f"stages.{job.name}.reward"
            function = import_function(str(each.target), where)
            check_signature(function, where)
            if "completion_ids" in inspect.signature(function).parameters:
                raise UserError(
                    where, f"{each.target} takes completion_ids, which verl does not give", "take completions"
                )
            said["target"] = each.target
            paths.append(str(Path(str(inspect.getsourcefile(function))).resolve().parent))
        elif each.kind == "stage":
            target = Path(str(each.target))
            merge_adapter(target, folder / _REWARD)
            known = read_lineage(target).reward
            if known and args.normalize_rewards:
                said |= {"mean": known["mean"], "std": known["std"] if args.reward_scale == "std" else 1.0}
            said["eos"] = tokenizer.eos_token
            model = _REWARD
        else:
            model = str(each.target)
        sources.append(said)
    settings = {"model": model, "paths": paths, "clip": args.reward_clip, "sources": sources}
    (folder / _REWARD_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / _REWARD_FILE).write_text(inspect.getsource(verl_reward), encoding="utf-8")
    return f"{_HERE}/{model}" if model == _REWARD else model


def _write_value(folder: Path, job: "StageJob", args: "PPOConfig") -> list[str]:
    """The value's adapter, with the head that it starts from; the names of the modules that adapters are on.

    verl would make one of a causal model's kind for it, which PEFT refuses (verl's issue 4620).
    """
    from ..models.lineage import read_lineage
    from ..models.value_adapter import reward_head, write_value_adapter

    first = next((each for each in job.rewards if each.kind == "stage"), None)
    head, bias = None, 0.0
    if first is not None:
        target = Path(str(first.target))
        known = read_lineage(target).reward if args.normalize_rewards else None
        factor = first.weight / (known["std"] if known and args.reward_scale == "std" else 1.0)
        head, bias = reward_head(target) * factor, -known["mean"] * factor if known else 0.0
    (folder / _VALUE).mkdir()
    return write_value_adapter(job.base.path, folder / _VALUE, job.lora, head, bias, job.seed)


def _places(export: _Export) -> list[Override]:
    """Where verl finds the files, in the script's words."""
    value = f"{_HERE}/{_REWARD}" if any(each.kind == "stage" for each in export.job.rewards) else export.model
    here = {
        "data.train_files": _ROWS,
        "data.val_files": _ROWS,
        "reward.custom_reward_function.path": _REWARD_FILE,
        "trainer.default_local_dir": "checkpoints",
        "actor_rollout_ref.model.tokenizer_path": _TOKENIZER,
        "critic.model.tokenizer_path": _TOKENIZER,
        "critic.model.lora_adapter_path": _VALUE,
    }
    places = [Override(key, f"{_HERE}/{file}") for key, file in here.items()]
    places += [Override("actor_rollout_ref.model.path", export.model, "from"), Override("critic.model.path", value)]
    if export.served is not None:
        places.append(Override("reward.reward_model.model_path", export.served, "reward"))
    return places


_SETTINGS = {
    "trainer.nnodes": ("NNODES", "1"),
    "trainer.n_gpus_per_node": ("GPUS_PER_NODE", "8"),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": ("ROLLOUT_GPUS", "${GPUS_PER_NODE}"),
}
"""What is the machine's and not the recipe's: verl's key, the environment's word, what holds without it."""


def _script(found: Sequence[Override], places: Sequence[Override]) -> str:
    """The shell script that starts verl."""
    machine = dict(_SETTINGS)
    if any(each.key == "reward.reward_model.enable" for each in found):
        machine["reward.reward_model.rollout.tensor_model_parallel_size"] = ("REWARD_GPUS", "${GPUS_PER_NODE}")
    lines = [
        "#!/usr/bin/env bash",
        f"# A PPO stage of preftune's for verl {VERSION}: README.md says what differs. Settings of verl's may follow.",
        "set -euo pipefail",
        'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"',
        *(f'{name}="${{{name}:-{default}}}"' for name, default in machine.values()),
        "exec python3 -m verl.trainer.main_ppo \\",
        *(f"  {_word(each)} \\" for each in found),
        *(f"  {_path_word(each)} \\" for each in places),
        *(f'  {key}="${name}" \\' for key, (name, _) in machine.items()),
        '  "$@"',
    ]
    return "\n".join(lines) + "\n"


def _word(each: Override) -> str:
    """`key=value` for the shell, the value as Hydra reads it."""
    value = each.value
    if isinstance(value, list):
        value = f"[{','.join(str(part) for part in value)}]"
    return shlex.quote(f"{each.key}={str(value).lower() if isinstance(value, bool) else value}")


def _path_word(each: Override) -> str:
    """The same of a path: within Hydra's quotes, and where it lies here within the shell's double ones."""
    value = str(each.value).replace("\\", "\\\\").replace("'", "\\'")
    if not value.startswith(_HERE):
        return shlex.quote(f"{each.key}='{value}'")
    return f"\"{each.key}='{value}'\""


_WORDS = """\
# {recipe}, stage {stage}, for verl {version}

Start it with `NNODES=2 GPUS_PER_NODE=8 ./run.sh` on the head node of a Ray cluster, with this folder on a disk that all
nodes share. The names are those of `pip install 'verl[vllm,fsdp]=={version}'`, and were held against its configuration;
nothing was trained with it. Every GPU takes a share of a rollout and of a minibatch: their sizes are multiples of the
number of GPUs. Look at `actor/ppo_kl` and at the scores of the first steps.

- Policy and reference start from {start}. A new adapter on it trains,
  which begins at zero, because verl's reference is its model without the adapter.
- `value_adapter/`: what the critic trains on {value}; its head starts {head}.
- `train.parquet`: {rows} prompts. verl makes the very tokens of them that preftune answers; that was checked.
- `reward.py` scores a reply as the recipe says (`reward.json`){through}.

## Mapped

| recipe | verl | value |
|---|---|---|
{mapped}

Set besides: {fixed}.

## Otherwise in verl, or not at all

{otherwise}
"""


def _readme(export: _Export, found: Sequence[Override], places: Sequence[Override]) -> str:
    """What the folder holds, what was mapped, what verl does otherwise."""
    job, every = export.job, (*found, *places)
    reward_stage = any(each.kind == "stage" for each in job.rewards)
    merged = f"`{_MODEL}/` ({job.base.spec} with {job.parent} merged into it)"
    return _WORDS.format(
        recipe=export.recipe.name,
        stage=job.name,
        version=VERSION,
        start=f"{job.base.spec} itself" if job.parent is None else merged,
        value=f"`{_REWARD}/`" if reward_stage else "the policy's model",
        head="as the reward model's, centred and weighted as the recipe's rewards are" if reward_stage else "at zero",
        rows=export.sizes.rows,
        through=f", through verl's server of `{_REWARD}/`" if reward_stage else "",
        mapped="\n".join(f"| {each.ours} | `{each.key}` | {each.value} |" for each in every if each.ours),
        fixed=", ".join(f"`{each.key}={each.value}`" for each in every if not each.ours),
        otherwise="\n".join(f"- {each}" for each in left_out(export.args, job, reward_stage)),
    )
