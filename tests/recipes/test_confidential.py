"""Keys and passwords: refused in a recipe before anything is written, and never shown, wherever they come from."""

import json
from pathlib import Path

import pytest
import yaml

from preftune.cli import main as cli
from preftune.errors import UserErrors
from preftune.recipes.load import load_recipe

HEAD = (
    "name: x\nmodel: {base: 'random:llama'}\ndata: {d: {path: quickstart/demos.jsonl}}\n"
    "stages:\n  sft: {data: d, train: {max_steps: 1}}\neval:\n  prompts: d\n  judges:\n"
    "  - {kind: rubric, checks: [{kind: max_words, value: 3}]}\n"
)
SECRET = "hf_" + "aBcD1234" * 4
UNLIKE = "correct horse battery"
IN = {
    "hub token": ("stages.sft.train.hub_token", UNLIKE, "HF_TOKEN"),
    "another field": ("stages.sft.train.run_name", SECRET, "environment"),
    "password of an address": ("eval.judges.0.url", "https://me:pass-word@host.example/v1", "api_key_env"),
    "login of an address": ("data.d.path", "https://abcdef@host.example/rows.jsonl", "environment"),
    "cookie": ("eval.judges.0.parameters", "{extra_headers: {Cookie: " + UNLIKE + "}}", "api_key_env"),
    "query of an address": ("eval.judges.0.url", "https://host.example/v1?api_key=abcdef", "api_key_env"),
    "key of a judge": ("eval.judges.0.api_key", UNLIKE, "api_key_env"),
    "key in a header": ("eval.judges.0.parameters", "{extra_headers: {Authorization: " + UNLIKE + "}}", "api_key_env"),
    "base": ("model.base", "https://me:pass-word@host.example/model", "environment"),
    "path": ("data.d.path", "https://me:pass-word@host.example/rows.jsonl", "environment"),
}


@pytest.mark.parametrize("name", IN)
@pytest.mark.parametrize("how", ["in the file", "on the command line"])
def test_a_key_is_refused_before_anything_is_written(tmp_path: Path, capfd, monkeypatch, name: str, how: str):
    monkeypatch.chdir(tmp_path)
    key, value, remedy = IN[name]
    file = tmp_path / "r.yaml"
    file.write_text(HEAD)
    words = [f"{key}={value}" if value.startswith("{") else f"{key}={json.dumps(value)}"]
    if how == "in the file":
        values = yaml.safe_load(HEAD)
        place = values
        *above, last = (int(part) if part.isdigit() else part for part in key.split("."))
        for part in above:
            place = place[part]
        place[last] = yaml.safe_load(value) if value.startswith("{") else value
        file.write_text(yaml.safe_dump(values))
        words = []
    assert cli.run_command(["run", str(file), *words, "--output-dir", str(tmp_path / "run")]) == 2
    out, err = capfd.readouterr()
    assert remedy in err and key.replace(".0.", ".0.") in err and len(err.strip().splitlines()) == 1
    assert not any(secret in out + err for secret in (UNLIKE, SECRET, "pass-word", "abcdef"))
    assert not (tmp_path / "run").exists()


def test_what_only_looks_alike_is_none(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(HEAD)
    fine = [
        "stages.sft.train.hub_token=null",
        "data.d.system='The bearer of this token, a password holder, mails me@home: see https://host.example/a?b=c@d'",
        "eval.judges=[{kind: endpoint, url: 'https://host.example/v1', model: m, api_key_env: MY_KEY}]",
        "data.d.path=task-risk-of-something-rather-long.jsonl",
    ]
    load_recipe(file, fine)


def test_all_keys_of_a_recipe_are_said_at_once(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(HEAD.replace("max_steps: 1", f"hub_token: {UNLIKE}, run_name: {SECRET}"))
    with pytest.raises(UserErrors) as errors:
        load_recipe(file)
    assert [each.where.rpartition(".")[2] for each in errors.value.errors] == ["hub_token", "run_name"]
