"""The chain with stages that only write files: for tests of what runs, what is kept, and what stands in a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.cli.chain import Chain, Options
from preftune.cli.output import Output
from preftune.models.base import Base
from preftune.recipes.load import load_recipe

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl}
stages:
  ppo: {from: sft, reward: reward, data: demos}
  sft: {data: demos}
  reward: {from: sft, data: pairs}
  dpo: {from: sft, data: pairs, beta: 0.1}
eval: {prompts: demos, policies: [sft, dpo], reference: sft}
"""

ALL = ["sft", "reward", "ppo", "dpo", "eval"]


class Workshop:
    """A recipe in a folder, and stages that note when they ran."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.recipe, self.path, self.capsys = folder / "t.yaml", folder / "run", capsys
        self.recipe.write_text(RECIPE)
        (folder / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        self.ran: list[str] = []
        self.during: Callable[[str, Path], None] = lambda name, output: None

    def run(self, *overrides: str, **options) -> list[str]:
        """The steps that ran."""
        self.ran = []
        chain = Chain(
            load_recipe(self.recipe, overrides),
            Options(output_dir=self.path, **options),
            Output(),
            run_stage=self.stage,
            run_eval=self.evaluate,
            resolve=lambda spec, revision: Base(spec, self.path, None, "b" * 64),
        )
        chain.run()
        return self.ran

    def stage(self, job) -> dict[str, float]:
        self.ran.append(job.name)
        self.during(job.name, job.output_dir)
        (job.output_dir / "result").write_text(json.dumps({"beta": job.method.get("beta")}))
        (job.output_dir / "metrics.json").write_text("{}")
        return {"train_loss": 1.0}

    def evaluate(self, spec, run_dir: Path) -> None:
        self.ran.append("eval")
        (run_dir / "eval").mkdir(exist_ok=True)
        (run_dir / "eval" / "results.json").write_text("[]\n")

    def states(self) -> dict[str, str]:
        stages = json.loads((self.path / "run.json").read_text())["stages"]
        return {name: entry["state"] for name, entry in stages.items()}

    def said(self) -> str:
        return self.capsys.readouterr().out
