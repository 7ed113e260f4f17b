"""What used to be found after hours of training is found by `validate` and before the first stage trains.

Settings are tried in this process without any data; what depends on the rows is tried with them.
"""

import importlib.util
import json
import tracemalloc
from pathlib import Path

import pytest

from preftune.cli.output import Output
from preftune.cli.validate import DataCheck, check_settings, data_uses
from preftune.errors import UserError, UserErrors
from preftune.models.loading import resolve_base
from preftune.models.tokens import load_tokenizer
from preftune.recipes.graph import order
from preftune.recipes.load import load_recipe

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  pairs: {path: pairs.jsonl}
  some: {path: pairs.jsonl, held_out: 0.3}
stages:
  sft: {data: pairs}
  dpo: {data: pairs}
  kto: {data: pairs}
  ppo: {data: pairs, reward: {function: "early_rewards:good"}, rollout_batch_size: 4, num_mini_batches: 2}
eval:
  prompts: pairs
  max_new_tokens: 4
  judges: [{kind: rubric, checks: [{kind: max_words, value: 3}]}]
"""
FUNCTIONS = """\
def good(prompts, completions): return [0.0 for _ in completions]
def blind(prompts): return [1.0]
def needs(prompts, completions, answer): return [0.0 for _ in completions]
"""
GRPO = 'stages.grpo={data: pairs, reward: {function: "early_rewards:good"}, rollout_batch_size: 8}'
EVALUATING = ("stages.dpo.data=some", "stages.dpo.train.eval_strategy=steps", "stages.dpo.train.eval_steps=1")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": "Bad."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "early_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "early_rewards", raising=False)
    (tmp_path / "t.yaml").write_text(RECIPE)
    return tmp_path / "t.yaml"


def check(recipe: Path, *overrides: str, processes: int = 1) -> None:
    loaded = load_recipe(recipe, overrides)
    check_settings(loaded, resolve_base("random:llama"), order(loaded), Path("runs/t"), processes=processes)


def check_data(recipe: Path, *overrides: str, output: Output | None = None, brief: bool = False) -> None:
    loaded, base = load_recipe(recipe, overrides), resolve_base("random:llama")
    data = DataCheck(loaded, base, load_tokenizer(base), output, brief=brief)
    for use in data_uses(loaded):
        list(data.rows(*use))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.dpo.loss_type=[]"], r"dpo\.loss_type: names no loss"),
        (["stages.dpo.loss_weights=[0]"], r"dpo\.loss_weights: is \[0"),
        (["stages.dpo.beta=0"], r"dpo\.beta: is 0"),
        (["stages.dpo.loss_type=discopop", "stages.dpo.discopop_tau=0"], r"dpo\.discopop_tau: is 0"),
        (["stages.kto.desirable_weight=0", "stages.kto.undesirable_weight=0"], "no reply would count"),
        (["stages.dpo.train.save_strategy=best"], r"dpo\.train\.save_strategy: is best"),
        (["stages.dpo.train.eval_on_start=true"], r"dpo\.train\.eval_on_start: has no effect"),
        ([*EVALUATING, "stages.dpo.train.metric_for_best_model=accuracy"], r"metric_for_best_model: is 'accuracy'"),
        (
            ["stages.dpo.train.gradient_checkpointing=true", "stages.dpo.train.gradient_checkpointing_kwargs={foo: 1}"],
            r"gradient_checkpointing_kwargs: 'foo'",
        ),
        (
            ["stages.dpo.train.lr_scheduler_type=polynomial", "stages.dpo.train.lr_scheduler_kwargs={power: -1}"],
            r"dpo\.train\.lr_scheduler_type",
        ),
        (["stages.ppo.reward=[{function: 'early_rewards:good', weight: 0}]"], r"ppo\.reward: every weight is 0"),
        (["stages.ppo.reward=[{function: 'early_rewards:blind'}]"], r"ppo\.reward\.0: it takes prompts, and no compl"),
        (["stages.ppo.reward=[{model: ./none}]"], r"ppo\.reward\.0\.model: no folder './none'"),
        (
            ["stages.ppo.reward=[{model: nobody/none-such}]"],
            r"ppo\.reward\.0\.model: 'nobody/none-such' cannot be load",
        ),
        ([GRPO, "stages.grpo.loss_type=cispo"], r"grpo\.loss_type: epsilon_high is None with loss_type 'cispo'"),
        ([GRPO, "stages.grpo.num_generations=3"], r"rollout_batch_size is 8, expected a multiple of num_generations"),
        (
            [GRPO, "stages.grpo.loss_type=cispo", "stages.grpo.epsilon_high=5", "stages.grpo.epsilon=0.1"],
            r"grpo\.epsilon: has no effect without a loss_type that clips on both sides",
        ),
        (
            [GRPO, "stages.grpo.beta=0", "stages.grpo.use_bias_correction_kl=true"],
            r"grpo\.use_bias_correction_kl: has no effect without beta",
        ),
        (
            [GRPO, "stages.grpo.multi_objective_aggregation=normalize_then_sum", "stages.grpo.reward_clip=1"],
            r"grpo\.reward_clip: has no effect with normalize_then_sum",
        ),
        (
            [GRPO, "stages.grpo.reward=[{function: 'early_rewards:good', weight: 0}]"],
            r"grpo\.reward: every weight is 0",
        ),
        (["eval.temperature=0"], r"eval\.kl: greedy decoding"),
        (["eval.judges=[{kind: rubric, checks: [{kind: [a]}]}]"], r"checks\[0\]: kind is \['a'\]"),
        (["eval.judges=[{kind: rubric, checks: [{kind: regex, pattern: '^(a|aa)+$'}]}]"], "takes more than"),
        (["eval.judges=[{kind: reward, adapter: /none}]"], r"judges\[0\]\.adapter: '/none' holds no adapter"),
        (["eval.judges=[{kind: model, model: nobody/none-such}]"], r"judges\[0\]\.model: 'nobody/none-such' cannot be"),
        (
            ["eval.judges=[{kind: function, function: 'early_rewards:blind'}]"],
            r"judges\[0\]\.function: it takes prompts",
        ),
        (["eval.judges=[{kind: endpoint, url: 'http://x/v1', model: x, cache: t.yaml}]"], r"cache: .*is no folder"),
    ],
)
def test_wrong_settings(recipe: Path, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("preftune.stages.scorers.rubric._PATIENCE", 0.05)
    with pytest.raises(UserError, match=said) as error:
        check(recipe, *overrides)
    assert not isinstance(error.value, UserErrors)


def test_what_is_right_is_let_through(recipe: Path):
    check(recipe)
    check(
        recipe, *EVALUATING, "stages.dpo.train.metric_for_best_model=eval_loss", "eval.temperature=0", "eval.kl=false"
    )
    check_data(recipe)


def test_a_quantised_base_needs_bitsandbytes(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    check(recipe, "model.quantization=8bit")
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(UserError, match=r"model\.quantization: 8bit needs bitsandbytes"):
        check(recipe, "model.quantization=8bit")


def test_no_target_modules_are_no_list(recipe: Path):
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        load_recipe(recipe, ["lora.target_modules=[]"])


def test_sizes_must_divide_among_the_processes_of_a_launch(recipe: Path):
    check(recipe, processes=2)
    with pytest.raises(UserError, match=r"ppo\.rollout_batch_size: is 4, expected a multiple of .* = 2 x 3"):
        check(recipe, processes=3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.ppo.reward=[{function: 'early_rewards:needs'}]", r"ppo\.reward\.0: it needs 'answer'"),
        (
            "eval.judges=[{kind: function, function: 'early_rewards:needs'}]",
            r"judges\[0\]\.function: it needs 'answer'",
        ),
        ("data.pairs.held_out=0.999", r"data\.pairs\.held_out: 0\.999 of 12 rows leaves none for training"),
        (
            "stages.dpo.train={dataloader_drop_last: true, per_device_train_batch_size: 64}",
            r"dpo\.train\.dataloader_drop_last: leaves out every batch",
        ),
    ],
)
def test_what_the_rows_do_not_fit(recipe: Path, override: str, said: str):
    with pytest.raises(UserError, match=said):
        check_data(recipe, override)


def test_problems_are_counted_above_the_first_twenty(shell, recipe: Path):
    pairs = recipe.parent / "pairs.jsonl"
    pairs.write_text("{\n" * 30 + pairs.read_text())
    code, _, err = shell("validate", recipe, "eval=null")
    lines = err.strip().splitlines()
    assert code == 2
    assert "t.yaml:5: data.pairs: 30 of 42 rows have a problem: 30 malformed" in lines[0]
    assert len(lines) == 22 and lines[-1].startswith("... and ")
    drop = [f"{entry}.on_problem={{malformed: drop}}" for entry in ("data.pairs", "data.some")]
    code, out, err = shell("validate", recipe, *drop, "eval=null")
    assert code == 0, err
    assert "dropped, malformed (cannot be read as a row): 30 (" in out


def test_a_run_says_which_rows_it_leaves_out(recipe: Path, capsys: pytest.CaptureFixture[str]):
    pairs = recipe.parent / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + json.dumps({"prompt": "x", "chosen": "y" * 3000, "rejected": "z"}) + "\n")
    check_data(recipe, output=Output(), brief=True)
    out = capsys.readouterr().out
    assert "data pairs as pairs, in tokens: dropped, longer than max_length: 1 (" in out
    assert "rows used of" not in out


def test_rows_are_not_kept(recipe: Path):
    """A row and its ids take 3,000 bytes and more; what is kept of one takes some tens."""

    def peak(rows: int) -> int:
        row = {"chosen": "Good day to you.", "rejected": "Go away."}
        lines = (json.dumps({"prompt": f"Question {i}?", **row}) + "\n" for i in range(rows))
        (recipe.parent / "pairs.jsonl").write_text("".join(lines))
        tracemalloc.start()
        check_data(recipe, "stages={dpo: {data: pairs}}", "eval=null")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(9000) < 9000 * 1000
