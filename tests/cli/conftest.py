"""A tiny random run to talk to, and commands run in this process."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.cli import main as cli
from preftune.cli.policies import recipe_base, run_recipe, sampling_spec
from preftune.eval.chat.conversation import Conversation
from preftune.eval.workbench import Workbench
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .workshop import Workshop

POLICIES = ("sft", "dpo", "ipo")
EVAL = """\
eval:
  prompts: {path: prompts.jsonl}
  policies: [sft, dpo, ipo]
  reference: sft
  max_new_tokens: 6
  kl: false
  judges: [{kind: rubric, checks: [{kind: max_words, value: 2}]}]
"""
RECIPE = """\
name: t
seed: 3
model: {base: "random:llama", dtype: float32}
lora: {r: 2, alpha: 4}
data:
  demos: {path: demos.jsonl, system: Be kind.}
  pairs: {path: pairs.jsonl}
stages:
  sft: {data: demos}
  reward: {from: sft, data: pairs}
  dpo: {from: sft, data: pairs}
  ipo: {kind: dpo, from: sft, data: pairs, loss_type: ipo}
  kto: {from: sft, data: demos}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe has no evaluation, with three different policies and one that is not trained yet."""
    import torch

    root = tmp_path_factory.mktemp("made")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    for seed, name in enumerate(POLICIES):
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters.parameters("default"):
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        adapters.save("default", root / name)
    demos = [{"prompt": "Hi?", "completion": "Hello."}]
    pairs = [{"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}]
    prompts = [{"prompt": f"question {place}"} for place in range(4)]
    for name, rows in (("demos", demos), ("pairs", pairs), ("prompts", prompts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def judged(run: Path) -> Path:
    """A run with samples that differ between policies: four prompts."""
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    (run / "eval").mkdir()
    lines = [
        {
            "policy": policy,
            "prompt_index": place,
            "prompt": [user(f"question {place}")],
            "completion": f"{policy} {place}",
        }
        for policy in POLICIES
        for place in range(4)
    ]
    (run / "eval" / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return run


@pytest.fixture
def shop(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Workshop:
    # its stages hold no memory, and collecting takes longer than they do
    monkeypatch.setattr("preftune.cli.chain._free_memory", lambda: None)
    return Workshop(tmp_path, capsys)


class Shell:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object, typed: str = "") -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self.monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        self.capsys.readouterr()
        code = cli.run_command([str(each) for each in arguments])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def refused(self, *arguments: object, said: str) -> None:
        """The command is the user's mistake, and one line says which."""
        code, _, err = self(*arguments)
        assert code == 2, err
        assert len(err.strip().splitlines()) == 1, err
        assert re.search(said, err), err


@pytest.fixture
def shell(capsys, monkeypatch) -> Shell:
    return Shell(capsys, monkeypatch)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}


def talk(run: Path, max_new_tokens: int = 6) -> Conversation:
    """The run's policies, asked without the command."""
    recipe = run_recipe(run)
    spec = sampling_spec(recipe, recipe_base(recipe), run)
    policies = {name: run / name for name in POLICIES}
    return Conversation(Workbench.open(replace(spec, policies=policies, max_new_tokens=max_new_tokens, kl=False)))


def votes_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "votes.jsonl").read_text().splitlines()]
