"""`preftune eval benchmarks`: lm-eval's numbers, for every policy on one base, and what each gained or lost."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.cli.policies import recipe_base, run_recipe, sampling_spec
from preftune.eval.harness.influence import influences, standard_error
from preftune.eval.spec import Benchmarks
from preftune.eval.workbench import Workbench
from preftune.models.merging import merge_adapter

from .conftest import POLICIES, Shell

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
TASKS = {
    "colours": """\
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "says": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
GROUP = "group: mix\ntask: [colours, says]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
ROWS = [
    {"question": f"What colour is thing {i}?", "choices": ["red", "blue", "green" + "ish" * (i % 3)], "answer": i % 3}
    for i in range(9)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(data=data)}{text}")
    (folder / "mix.yaml").write_text(GROUP)
    yield folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def bench(run: Path, *policies: str, **changes: Any) -> Workbench:
    recipe = run_recipe(run)
    spec = sampling_spec(recipe, recipe_base(recipe), run)
    return Workbench.open(replace(spec, policies={name: run / name for name in policies}, kl=False, **changes))


def answers(speaker: Any, folder: Path, **options: Any) -> dict[str, list[Any]]:
    """What lm-eval had from a speaker for each document of each task."""
    from lm_eval.evaluator import evaluate

    from preftune.eval.harness.tasks import load_tasks, quiet

    loaded = load_tasks(Benchmarks(tasks=tuple(TASKS), include_path=folder, num_fewshot=options.pop("num_fewshot", 0)))
    with quiet():
        for task in loaded.tasks.values():
            task.set_fewshot_seed(seed=1)
        found: Any = evaluate(speaker, loaded.whole, bootstrap_iters=0, **options)
    return {name: [each["resps"] for each in found["samples"][name]] for name in TASKS}


# The merged model's rounding is not that of the adapter beside its base.
@pytest.mark.parametrize("way", ["plain", "examples", "cut", "chat"])
def test_a_policys_answers_are_those_of_lm_evals_own_class_on_the_merged_model(
    way: str, run: Path, tasks: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from preftune.eval.harness.policy_lm import PolicyLM

    merge_adapter(run / "dpo", tmp_path / "merged")
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4}
    own: Any = HFLM
    theirs: Any = own(str(tmp_path / "merged"), **options)
    speaker = PolicyLM(bench(run, "dpo"), "dpo")
    if way == "cut":
        theirs._max_length = speaker.max_length = 30
    options = {"examples": {"num_fewshot": 2}, "chat": {"apply_chat_template": True}}.get(way, {})
    ours, wanted = answers(speaker, tasks, **options), answers(theirs, tasks, **options)
    assert (speaker.cut > 0) is (way == "cut")
    assert ours["says"] == wanted["says"] and len({str(each) for each in ours["says"]}) > 1
    flat = [[[pair for (pair,) in each] for each in found["colours"]] for found in (ours, wanted)]
    assert [[top for _, top in each] for each in flat[0]] == [[top for _, top in each] for each in flat[1]]
    mine, other = (np.array([[logp for logp, _ in each] for each in found]) for found in flat)
    np.testing.assert_allclose(mine, other, rtol=0, atol=2e-3)
    mine, other = (np.array(found["text"]).ravel() for found in (ours, wanted))
    np.testing.assert_allclose(mine, other, rtol=0, atol=5e-3)


def test_the_command_writes_and_shows_every_policy_beside_the_base(shell: Shell, run: Path, tasks: Path) -> None:
    code, out, err = shell("eval", "benchmarks", run, "--tasks", "mix,text", "--include-path", tasks, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert list(dict.fromkeys(row["policy"] for row in rows)) == ["base", *POLICIES]
    assert {row["task"] for row in rows} == {"colours", "says", "text", "mix"}
    content = json.loads((run / "eval/benchmarks.json").read_text())
    assert content["rows"] == rows and content["policies"].keys() == {"base", *POLICIES}
    assert content["policies"]["base"] is None and content["settings"]["tasks"] == ["mix", "text"]
    of = {(row["policy"], row["task"], row["metric"]): row for row in rows}
    text, before = of["dpo", "text", "bits_per_byte"], of["base", "text", "bits_per_byte"]
    assert text["difference"] == pytest.approx(text["value"] - before["value"]) and text["paired"]
    # what makes a document hard for both is no noise: far less than if the two were independent
    assert 0 < text["difference_se"] < 2 * np.hypot(text["stderr"], before["stderr"])
    assert of["dpo", "mix", "acc"]["n"] == len(ROWS) and text["higher_is_better"] is False
    assert "What was forgotten" in (run / "report.html").read_text()


def test_an_evaluation_keeps_what_was_measured_by_itself(run: Path) -> None:
    from preftune.eval.results import Evaluation, write_evaluation

    (run / "eval").mkdir()
    (run / "eval" / "benchmarks.json").write_text('{"rows": [1]}')
    write_evaluation(run, Evaluation([], {}, {}, {}, []))
    assert json.loads((run / "eval/benchmarks.json").read_text()) == {"rows": [1]}
    write_evaluation(run, Evaluation([], {}, {}, {}, [], None, {"rows": [2]}))
    assert json.loads((run / "eval/benchmarks.json").read_text()) == {"rows": [2]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--tasks": "colors"}, "lm-eval has no task 'colors'.*colours"),
        ({"--tasks": "nosuchfile.yaml"}, "lm-eval has no task"),
        ({"--tasks": "says", "--include-path": "nowhere"}, "nowhere is no folder"),
        ({"--tasks": "lost"}, "lost cannot be loaded: .*correct the task"),
        ({"--tasks": "beams"}, "beams sets num_beams of its generation, which has no effect here"),
        ({}, "--tasks: not given, and the recipe has no eval.benchmarks"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    change: dict[str, str], said: str, shell: Shell, run: Path, tasks: Path, tmp_path: Path, monkeypatch
) -> None:
    own = Path(shutil.copytree(tasks, tmp_path / "own"))
    (own / "lost.yaml").write_text(f"task: lost\n{COMMON.format(data='/no/such/file.jsonl')}{TASKS['text']}")
    beams = TASKS["says"].replace("do_sample: false", "num_beams: 4")
    (own / "beams.yaml").write_text(f"task: beams\n{COMMON.format(data=own / 'colours.jsonl')}{beams}")
    # lm-eval's own fourteen thousand take long to list
    import lm_eval.tasks as home

    whole = home.TaskManager
    monkeypatch.setattr(home, "TaskManager", lambda **given: whole(**{**given, "include_defaults": False}))
    options = {"--include-path": str(own), **change} if change else {}
    shell.refused("eval", "benchmarks", run, *(word for pair in options.items() for word in pair), said=said)
    assert not (run / "eval").exists()


def test_without_lm_eval_the_remedy_is_said(shell: Shell, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError, version

    def lacking(name: str) -> str:
        if name == "lm_eval":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", lacking)
    shell.refused(
        "eval", "benchmarks", run, "--tasks", "piqa", said=r"not installed.*pip install 'preftune\[lm-eval\]'"
    )


def test_influences_are_the_jackknifes() -> None:
    """Leaving a document out moves a metric by its influence, up to 1 / N^2."""
    rng = np.random.default_rng(0)
    pairs = np.stack([-rng.uniform(5, 9, 40), rng.integers(2, 9, 40)], 1)
    made = {
        "mean": (pairs[:, 0], lambda x: x.mean()),
        "perplexity": (pairs[:, 0], lambda x: np.exp(-x.mean())),
        "bits": (pairs, lambda x: -x[:, 0].sum() / x[:, 1].sum() / np.log(2)),
        "word perplexity": (pairs, lambda x: np.exp(-x[:, 0].sum() / x[:, 1].sum())),
    }
    for name, (values, metric) in made.items():
        found = influences(values.tolist(), float(metric(values)))
        assert found is not None, name
        left = np.array([metric(np.delete(values, i, 0)) for i in range(40)])
        jackknife = np.sqrt(39 / 40 * ((left - left.mean()) ** 2).sum())
        assert standard_error(found) == pytest.approx(jackknife, rel=0.15), name
    few = influences([0.0, 1.0, 1.0, 1.0], 0.75)
    assert few is not None and standard_error(few) == pytest.approx(0.25)
    assert influences([0.0, 1.0], 0.7) is None and influences(["a"], 1.0) is None and influences([], 1.0) is None
