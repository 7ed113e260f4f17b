"""The Python that a recipe names is found beside it, with what it imports; nothing else is imported from there."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preftune import own_code
from preftune.cli.process import leave_working_folder
from preftune.errors import UserError
from preftune.models.fingerprints import code_sha256
from preftune.models.wheels import fetch_wheel
from preftune.stages.kinds import stage_kind
from preftune.stages.reward_functions import import_function

OPTIONAL = ("triton", "pynvml", "cuda", "wandb", "tensorboard", "flash_attn", "bitsandbytes", "nobody_knows_this_one")


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe's folder, full of files and folders that are called like optional packages."""
    monkeypatch.setattr(own_code, "_FINDER", own_code._Finder())
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    for number, name in enumerate(OPTIONAL):
        body = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nscore = len\n"
        if number % 2:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(body)
        else:
            (tmp_path / f"{name}.py").write_text(body)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def named(folder: Path, spec: str, **files: str) -> Any:
    """A function of the recipe in that folder, where files (`pack__module`: one in a package) lie."""
    for name, body in files.items():
        file = folder / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
    own_code.look_in([folder])
    return import_function(spec)


@pytest.mark.checklist("S2")
def test_s02_nobody_else_imports_from_the_recipes_folder(beside: Path):
    named(beside, "mine_a:f", mine_a="def f(): return 1\n")
    assert str(beside) not in sys.path
    for name in OPTIONAL:
        if (installed := importlib.util.find_spec(name)) is not None:
            assert not str(installed.origin).startswith(str(beside))
            continue
        with pytest.raises(ImportError):
            importlib.import_module(name)
        # as a library does it, while the user's own module is being imported
        with pytest.raises(UserError, match="cannot be imported"):
            named(beside, f"mine_{name}:f", **{f"mine_{name}": "import preftune.errors\nraise ImportError\n"})
    assert not (beside / "ran").exists()


def test_a_module_called_like_a_library_is_refused_in_words(beside: Path):
    own_code.look_in([beside])
    absent = next(name for name in OPTIONAL if importlib.util.find_spec(name) is None)
    with pytest.raises(UserError, match=rf"{absent} is the name of a library .*call your module something else"):
        import_function(f"{absent}:score")
    assert not (beside / "ran").exists()


def test_what_was_named_imports_what_lies_beside_it(beside: Path):
    (beside / "pack_b").mkdir()
    (beside / "pack_b" / "__init__.py").touch()
    function = named(
        beside,
        "mine_b:f",
        mine_b="import helper_b\nfrom pack_b.inner import two\nfrom bare_b import deep\n"
        "def f():\n    import later_b\n    import importlib\n"
        "    return helper_b.one + two + deep.three + later_b.four + importlib.import_module('last_b').five\n",
        helper_b="import helped_b\none = helped_b.one\n",
        helped_b="one = 1\n",
        pack_b__inner="from . import other\ntwo = other.two\n",
        pack_b__other="import importlib\ntwo = 2\n",
        bare_b__deep="three = 3\n",
        later_b="four = 4\n",
        last_b="five = 5\n",
    )
    assert function() == 15
    assert code_sha256("mine_b:f") != code_sha256("pack_b.inner:f") is not None


def test_it_need_not_know_of_a_library_that_happens_to_be_called_like_a_file(beside: Path):
    """`try: import wandb` beside the folder of logs that wandb itself leaves there."""
    (beside / "weave").mkdir()
    body = "try:\n    import weave\nexcept ImportError:\n    weave = None\ndef f(): return weave\n"
    assert named(beside, "mine_c:f", mine_c=body)() is None


def test_what_is_installed_goes_first(beside: Path):
    (beside / "json.py").write_text("raise SystemExit\n")
    own_code.look_in([beside])
    assert import_function("json:dumps")({}) == "{}"


def test_a_methods_file_imports_what_lies_beside_it(beside: Path):
    (beside / "steps_d.py").write_text("def run(job): return job\n")
    (beside / "method_d.py").write_text(
        "from preftune.stages.kinds import StageKind\nfrom steps_d import run\n"
        "KIND = StageKind(name='d', title='D', rows='demo', config='trl:SFTConfig', run=run)\n"
    )
    assert stage_kind(f"{beside / 'method_d.py'}:KIND").name == "d"


@pytest.mark.parametrize("first", ["", "here"])
def test_the_working_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [first and str(Path.cwd()), "/elsewhere"])
    leave_working_folder()
    assert sys.path == ["/elsewhere"]
    leave_working_folder()
    assert sys.path == ["/elsewhere"]


def test_the_command_imports_nothing_from_the_working_folder(beside: Path):
    """All of a stage's heavy imports, in a folder where files are called like what they look for."""
    (beside / "mine.py").write_text("import sibling\ndef f(prompts, completions): return [sibling.one] * 4\n")
    (beside / "sibling.py").write_text("one = 1.0\n")
    (beside / "recipe.yaml").write_text(
        "name: x\nmodel: {base: 'random:llama'}\ndata: {p: {path: p.jsonl}}\n"
        "stages: {ppo: {from: base, data: p, reward: {function: 'mine:f'}, train: {per_device_train_batch_size: 1}}}\n"
    )
    (beside / "p.jsonl").write_text('{"prompt": "a"}\n' * 4)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-m", "preftune.cli.main", "validate", "recipe.yaml"]
    done = subprocess.run(command, check=False, cwd=beside, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (beside / "ran").exists()


def test_pip_imports_nothing_from_the_working_folder(beside: Path, monkeypatch: pytest.MonkeyPatch):
    (beside / "pip").mkdir()
    (beside / "pip" / "__main__.py").write_text(f"open({str(beside / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(beside)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download"):
        fetch_wheel("nothing-of-that-name==1.0", beside)
    assert not (beside / "ran").exists()


def test_a_process_that_we_start_finds_the_same_code_and_no_more(beside: Path):
    (beside / "code").mkdir()
    (beside / "code" / "mine_e.py").write_text("def f(): return 7\n")
    own_code.look_in([beside / "code"])
    code = (
        "import sys; from pathlib import Path; from preftune import own_code\n"
        "own_code.look_in([Path.cwd()]); assert own_code.import_named('mine_e').f() == 7\n"
        "assert '' not in sys.path and str(Path.cwd()) not in sys.path\n"
        "import importlib.util; assert importlib.util.find_spec('nobody_knows_this_one') is None\n"
    )
    environment = {**os.environ, **own_code.environment()}
    subprocess.run([sys.executable, "-c", code], cwd=beside, env=environment, check=True)
