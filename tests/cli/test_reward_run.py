"""A run whose policy trains on verifiers, a rubric and a server: refused, cut off, continued, without its key."""

import json
from pathlib import Path

import pytest

from preftune.cli.commands import say_self_judged
from preftune.cli.output import Output
from preftune.recipes.load import load_recipe
from preftune.stages.scorers import posting

from ..eval.chat_server import ChatServer
from .test_main import assert_refused, preftune

SECRET = "rm-key-0123456789abcdef"
RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 2, alpha: 4}
checkpoints: {share: 0.05}
data:
  sums: {path: sums.jsonl}
stages:
  ppo:
    data: sums
    from: base
    rollout_batch_size: 4
    num_mini_batches: 1
    num_ppo_epochs: 1
    total_episodes: 16
    max_new_tokens: 4
    reward:
      - {kind: verifier, check: numeric, column: answer, weight: 2}
      - {kind: rubric, checks: style.yaml}
      - {kind: http, url: "URL", api_key_env: RM_TEST_KEY, retries: 1, format: openrlhf, column: answer}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(posting, "pause", lambda seconds, stop: None)
    monkeypatch.setenv("RM_TEST_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{place} + 1?", "answer": place + 1} for place in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "style.yaml").write_text("- {kind: max_words, value: 3}\n")
    return tmp_path


def write(folder: Path, server: ChatServer) -> Path:
    (folder / "t.yaml").write_text(RECIPE.replace("URL", server.url))
    return folder / "t.yaml"


def holds(folder: Path, text: str) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_a_run_is_cut_off_by_its_reward_and_continues(folder: Path, capsys: pytest.CaptureFixture[str]):
    dies = {"after": 2}

    def respond(body, n):
        assert len(body["query"]) == len(body["labels"]) and {*body["labels"]} <= {1, 2, 3, 4}
        if n > dies["after"]:
            return 500, {}, {"error": f"no room for {SECRET}"}
        return 200, {}, {"rewards": [len(each) / 100 for each in body["query"]]}

    with ChatServer(respond) as server:
        recipe = write(folder, server)
        code, out, _ = preftune(capsys, "validate", recipe)
        assert code == 0 and "nothing wrong found" in out and not server.bodies
        cut = preftune(capsys, "run", recipe, "--output-dir", folder / "run")
        assert_refused(cut, "reward", "prompt", "reply", "answered 500 (no room for ***), after 1 retries")
        kept = sorted(each.name for each in (folder / "run").rglob("checkpoint-*"))
        assert kept, "a checkpoint that continues"
        before, dies["after"] = len(server.bodies), 10**9
        code, out, err = preftune(capsys, "run", recipe, "--output-dir", folder / "run")
        assert code == 0, err
        # the first two rollouts were not drawn and asked about again
        assert len(server.bodies) - before <= 2
        assert set(server.keys) == {f"Bearer {SECRET}"}
        asked = len(server.bodies)
        code, out, _ = preftune(capsys, "run", recipe, "--output-dir", folder / "run")
        assert code == 0 and len(server.bodies) == asked
        (folder / "style.yaml").write_text("- {kind: max_words, value: 2}\n")
        code, out, err = preftune(capsys, "run", recipe, "--output-dir", folder / "run")
        assert code == 0 and "reward.1.checks" in out + err
    assert not holds(folder / "run", SECRET)
    lineage = json.loads((folder / "run" / "ppo" / "lineage.json").read_text())
    numeric, rubric, server_said = lineage["config"]["rewards"]
    assert numeric == {"kind": "verifier", "target": "numeric", "weight": 2.0,
                       "settings": {"check": "numeric", "column": "answer"}}  # fmt: skip
    assert rubric["settings"]["checks"] == [{"kind": "max_words", "value": 2}]
    assert server_said["settings"]["api_key_env"] == "RM_TEST_KEY"


def test_what_is_wrong_is_said_before_anything_trains(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("RM_TEST_KEY")
    with ChatServer(lambda body, n: (200, {}, [])) as server:
        recipe = write(folder, server)
        for command in (("validate", recipe), ("run", recipe, "--output-dir", folder / "run")):
            found = preftune(capsys, *command)
            assert_refused(found, "t.yaml:19: stages.ppo.reward.2.api_key_env: $RM_TEST_KEY is not set")
        (folder / "sums.jsonl").write_text('{"prompt": "1 + 1?", "answer": "two"}\n{"prompt": "2?", "answer": 3}\n')
        monkeypatch.setenv("RM_TEST_KEY", SECRET)
        found = preftune(capsys, "run", recipe, "--output-dir", folder / "run")
        assert_refused(found, "stages.ppo.reward.0:", "sums.jsonl:1: the answer to compare with is 'two'")
        assert not server.bodies and not (folder / "run" / "ppo").exists()


def test_the_table_of_results_says_which_judge_was_a_reward(folder: Path, capsys: pytest.CaptureFixture[str]):
    judges = (
        "eval: {prompts: sums, policies: [ppo], reference: base, max_new_tokens: 4, judges: ["
        "{kind: verifier, check: numeric, column: answer, name: sums}, {kind: rubric, checks: style.yaml}, "
        "{kind: rubric, name: brief, checks: [{kind: max_words, value: 2}]}]}\n"
    )
    (folder / "t.yaml").write_text(RECIPE.replace("URL", "http://127.0.0.1:9") + judges)
    recipe = load_recipe(folder / "t.yaml")
    rows = [{"policy": policy, "judge": judge} for policy in ("base", "ppo") for judge in ("sums", "rubric", "brief")]
    say_self_judged(recipe, rows, folder / "run", Output())
    why = "learnt from: a policy may have learnt to please it alone, so that it is no independent judge."
    said = [f"{judge} is word for word a reward that ppo {why}" for judge in ("sums", "rubric")]
    assert capsys.readouterr().out.splitlines() == said
    say_self_judged(recipe, rows[:1], folder / "run", Output(json=True))
    assert capsys.readouterr() == ("", "")
