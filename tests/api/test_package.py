"""`import preftune` is quick, and everything that it promises is there and documented."""

import inspect
import subprocess
import sys

import pytest

import preftune

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "pandas", "numpy", "scipy",
         "pydantic", "yaml", "huggingface_hub")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import preftune", 80),
        ("from preftune.cli.main import run_command; run_command(['--help'])", 700),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, most: int) -> None:
    """Modules are counted, not seconds: `import preftune` takes 0.02 s and `--help` 0.2 s where these hold."""
    told = f"{code}\nimport sys; print(); print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    loaded = names.splitlines()[-1].split()
    assert not {name for name in HEAVY if name in loaded} and "preftune" in loaded
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True,
                          check=True).stdout.split()  # fmt: skip
    assert len(loaded) - len(bare) < most


def test_every_public_name_is_there_and_says_what_it_does() -> None:
    assert set(preftune.__all__) <= set(dir(preftune))
    for name in preftune.__all__:
        assert inspect.getdoc(getattr(preftune, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        preftune.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["run", "train_stage", "load_policy", "load_reward", "score", "kl", "evaluate"])
def test_functions_are_typed_and_say_their_arguments_and_errors(name: str) -> None:
    function = getattr(preftune, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    said = inspect.getdoc(function) or ""
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
    assert "Raises:\n    UserError" in said
