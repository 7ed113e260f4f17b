"""Every code block of README.md and docs/ does what it says: each document is followed from top to bottom.

A document's blocks run in their order, in a copy of a folder that holds `my.yaml`, its data and its finished run
`runs/x` (stages sft, reward, dpo and ppo of `random:llama`, evaluated). What becomes of a block goes by its language:

- `sh`: commands of preftune alone run in this process; a block with anything else runs in bash.
- `python`: runs in this process; the blocks of a document share their names.
- `yaml`: a recipe is validated on `random:llama`; a part of one is put into my.yaml first.
- any other, `text` say: is only shown.

A comment on the line before a block says what is special about it: `<!-- not run: REASON -->` where nothing of the sort
can run here (it is parsed all the same, and preftune's command lines in it by preftune's own parser);
`<!-- file: NAME -->` where it is a file's content, which later blocks then find.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preftune.cli import main as cli

from .doc_blocks import RUN, Block, Session, blocks

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{each.relative_to(ROOT / 'docs')}" for each in (ROOT / "docs").rglob("*.md"))]
SLOW = {"README.md", *(f"docs/{name}.md" for name in ("api", "evaluation", "faq", "gpu", "quickstart"))}
"""Documents whose blocks train, or plan, more than a tiny stage."""
RECIPE = """\
name: x
model: {base: "random:llama"}
lora: {r: 4, alpha: 8}
data:
  demos:   {path: demos.jsonl}
  pairs:   {path: pairs.jsonl, held_out: 0.25}
  prompts: {path: prompts.jsonl}
stages:
  sft:    {data: demos, train: {max_steps: 2}}
  reward: {data: pairs, train: {max_steps: 2}}
  dpo:    {data: pairs, train: {max_steps: 2}}
  ppo:    {reward: reward, data: prompts, rollout_batch_size: 4, total_episodes: 8, num_mini_batches: 2,
           max_new_tokens: 8, keep_every: 1}
eval:
  prompts: {path: questions.jsonl}
  policies: [base, sft, dpo, ppo]
  reference: sft
  max_new_tokens: 8
  judges: [{kind: reward, stage: reward}, {kind: rubric, checks: [{kind: max_words, value: 2}]}]
  over_optimisation: {gold: rubric, best_of: 2, prompts: 2}
"""
NAMES = ("kettle", "lamp", "coat", "tent", "drill", "globe", "mug", "rug")
THINGS = [f"{colour} {name}" for colour in ("red", "old") for name in NAMES]


def data_files() -> dict[str, str]:
    """What a reader's own data is like: sixteen rows of each kind, few of questions."""
    rows: dict[str, list[str]] = {"demos": [], "pairs": [], "prompts": [], "questions": [], "labels": []}
    for thing in THINGS:
        ask, good, bad = f"Where is my {thing}?", f"Sorry! Your {thing} is on its way.", "No idea."
        rows["demos"].append(f'{{"prompt": "{ask}", "completion": "{good}"}}')
        rows["pairs"].append(f'{{"prompt": "{ask}", "chosen": "{good}", "rejected": "{bad}"}}')
        rows["prompts"].append(f'{{"prompt": "My {thing} is broken."}}')
        rows["questions"].append(f'{{"prompt": "May I send the {thing} back?"}}')
        rows["labels"] += [
            f'{{"prompt": "{ask}", "completion": "{good}", "label": true}}',
            f'{{"prompt": "{ask}", "completion": "{bad}", "label": false}}',
        ]
    rows["questions"] = rows["questions"][:4]
    lengths = '"baseline_length": 100, "model_length": 120'
    rows["annotations"] = [f'{{"prompt": {i}, {lengths}, "preference": {1 + i % 2}}}' for i in range(8)]
    return {f"{name}.jsonl": "".join(f"{row}\n" for row in each) for name, each in rows.items()}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every document starts from."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in {"my.yaml": RECIPE, **data_files()}.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run_command(["run", "my.yaml"]) == 0
    return folder


@pytest.fixture
def session(prepared: Path, tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Follows a text: what goes wrong, each with the block's line."""
    with pytest.MonkeyPatch.context() as patch:
        reader = Session(Path(shutil.copytree(prepared, tmp_path / "reader")), patch)

        def follow(text: str) -> list[str]:
            found = ((block, reader.problem(block)) for block in blocks(text))
            return [f"line {block.line}: {problem}" for block, problem in found if problem]

        yield follow


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in DOCUMENTS]
)
def test_every_block_of_a_document_works(document: str, session: Callable[[str], list[str]]):
    problems = session((ROOT / document).read_text(encoding="utf-8"))
    assert not problems, f"{document}\n" + "\n\n".join(problems)


def test_blocks_that_are_not_run_are_few_and_say_why():
    found = [(name, block) for name in DOCUMENTS for block in blocks((ROOT / name).read_text(encoding="utf-8"))]
    ours = [(name, block) for name, block in found if block.language in RUN]
    unrun = [(name, block.line) for name, block in ours if block.unrun]
    assert not [name for name, block in ours if block.unrun is not None and len(block.unrun.split()) < 3]
    assert len(unrun) <= 1 + len(ours) / 4, unrun
    assert not [(name, block.line) for name, block in found if block.language == ""], "a block without a language"


def test_marks_and_languages_are_read():
    text = "a\n\n<!-- not run: no such machine -->\n```sh\ndo\n```\n- b\n  ```python\n  x = 1\n  ```\n```text\n```\n"
    assert blocks(text) == [
        Block("sh", "do\n", 4, unrun="no such machine"),
        Block("python", "x = 1\n", 8),
        Block("text", "", 11),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        "```sh\npreftune status runs/none\n```",
        "```sh\nfalse | cat\n```",
        "```python\nimport preftune.no_such_module\n```",
        "```yaml\nstages: {dpo: {betta: 1}}\n```",
        "<!-- not run: needs a GPU -->\n```sh\npreftune run my.yaml --lunch ddp\n```",
        "<!-- not run: needs a GPU -->\n```sh\nif true\n```",
        "<!-- not run: needs a GPU -->\n```python\nx = = 1\n```",
    ],
)
def test_a_block_that_is_wrong_is_found(wrong: str, session: Callable[[str], list[str]]):
    assert session(f"{wrong}\n")


def test_blocks_follow_one_another(session: Callable[[str], list[str]], capfd: pytest.CaptureFixture[str]):
    text = (
        "<!-- file: mine.yaml -->\n```yaml\nname: mine\nmodel: {base: some/model}\n"
        "data: {d: {path: demos.jsonl}}\nstages: {sft: {data: d}}\n```\n"
        "```sh\npreftune validate mine.yaml > said.txt\n```\n```sh\ngrep mine said.txt\n```\n"
        "```python\nx = 1\n```\n```python\nassert x == 1\n```\n"
    )
    assert session(text) == []
