"""The records of the kinds of judges: read without torch, and true of the files that they name."""

import inspect
import subprocess
import sys

import pytest

from preftune.eval.judges.kinds import KINDS, judge_parts


def test_names_and_records_import_no_torch():
    code = "import sys, preftune.eval.judges.names; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_record_names_a_file_that_has_what_it_promises(kind):
    module = kind._module()
    assert list(inspect.signature(module.plan).parameters) == ["entry", "where", "run_dir"]
    assert hasattr(module, "key_parts") == kind.fingerprinted


def test_what_a_judge_depends_on_besides_its_words(tmp_path):
    (tmp_path / "votes.jsonl").write_text("")
    assert judge_parts({"kind": "human", "votes": "votes.jsonl"}, tmp_path) == {
        "files of votes.jsonl": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    }
    assert judge_parts({"kind": "human", "votes": "none.jsonl"}, tmp_path) == {"files of none.jsonl": None}
    (code,) = judge_parts({"kind": "function", "function": "json:dumps"}, tmp_path).items()
    assert code[0] == "code of json:dumps" and code[1] is not None
    assert judge_parts({"kind": "function", "function": "no_such_module:f"}, tmp_path) == {
        "code of no_such_module:f": None
    }
    assert judge_parts({"kind": "reward", "adapter": str(tmp_path)}, tmp_path) == {f"files of {tmp_path}": None}
    for entry in ({"kind": "reward", "stage": "reward"}, {"kind": "rubric", "checks": []}, {"kind": "oracle"}):
        assert judge_parts(entry, tmp_path) == {}
