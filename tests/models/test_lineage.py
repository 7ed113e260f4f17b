"""lineage.json: what is written is read, and what does not belong is refused with both values named."""

import dataclasses
import json

import pytest

from preftune import UserError, load_tokenizer, resolve_base
from preftune.models.lineage import (
    Lineage,
    adapter_sha256,
    base_info,
    check_lineage,
    library_versions,
    load_adapter_base,
    read_lineage,
    tokenizer_info,
    write_lineage,
)

from .conftest import shake

KEYS = ["format", "stage", "kind", "base", "tokenizer", "parents", "config", "data", "seed", "versions", "created"]


def lineage_of(base, tokenizer, **changes) -> Lineage:
    lineage = Lineage(
        stage="sft",
        kind="sft",
        base=base_info(base),
        tokenizer=tokenizer_info(tokenizer),
        parents=[{"stage": "warmup", "sha256": "0" * 64}],
        config={"learning_rate": 2e-4},
        data={"spec": {"path": "a.jsonl"}, "fingerprint": "f" * 64, "rows": 3},
        seed=0,
        versions=library_versions(),
        created="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )
    return dataclasses.replace(lineage, **changes)


@pytest.fixture
def folder(base, tokenizer, make, tmp_path):
    make().save("default", tmp_path)
    write_lineage(tmp_path, lineage_of(base, tokenizer))
    return tmp_path


def test_written_is_read(base, tokenizer, tmp_path):
    for reward in (None, {"mean": 0.5, "std": 2.0}):
        lineage = lineage_of(base, tokenizer, reward=reward)
        write_lineage(tmp_path, lineage)
        assert read_lineage(tmp_path) == lineage
        keys = json.loads((tmp_path / "lineage.json").read_text())
        assert list(keys) == [*KEYS, "seconds", *(["reward"] if reward else [])]
        assert set(keys["base"]) == {"spec", "revision", "sha256"}
        assert set(keys["tokenizer"]) == {"sha256", "chat_template_sha256", "pad_token", "eos_token"}


def test_what_belongs_passes_even_after_the_tokenizer_was_saved_and_used(folder, base, tokenizer):
    tokenizer(["a", "long one"], padding=True, truncation=True, max_length=4)
    check_lineage(folder, base, tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    check_lineage(folder, base, type(tokenizer).from_pretrained(folder / "tokenizer"))
    assert load_adapter_base(folder) == base


def test_another_base_is_refused(folder, tokenizer, make):
    other = resolve_base("random:llama?seed=1")
    with pytest.raises(UserError, match=r"base\.sha256 differs: .*\(random:llama\) there, .*seed=1\) here"):
        check_lineage(folder, other, tokenizer)
    adapters = make()
    adapters.base = other
    with pytest.raises(UserError, match=r"base\.sha256 differs"):
        adapters.load("ref", folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: setattr(t, "chat_template", t.chat_template + " "), "chat_template_sha256"),
        (lambda t: setattr(t, "eos_token", "<|reserved_0|>"), "eos_token"),
        (lambda t: setattr(t, "pad_token", "<|reserved_0|>"), "pad_token"),
        (lambda t: t.add_tokens(["new"]), "sha256"),
    ],
)
def test_another_tokenizer_is_refused_by_field(folder, base, change, field):
    tokenizer = load_tokenizer(base)
    change(tokenizer)
    with pytest.raises(UserError, match=rf"tokenizer\.{field} differs: .* there, .* here"):
        check_lineage(folder, base, tokenizer)


def test_no_lineage_or_a_future_one_is_refused(folder, base, tokenizer):
    file = folder / "lineage.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        read_lineage(folder)
    file.write_text("{")
    with pytest.raises(UserError, match="unreadable"):
        read_lineage(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"no lineage\.json"):
        check_lineage(folder, base, tokenizer)
    # A plain PEFT adapter still names its base.
    assert load_adapter_base(folder).sha256 == base.sha256


def test_the_base_comes_from_the_portable_spec_whatever_peft_wrote(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert load_adapter_base(folder) == base


def test_a_base_that_changed_under_its_spec_is_refused(folder, base, tokenizer):
    lineage = lineage_of(base, tokenizer)
    write_lineage(folder, dataclasses.replace(lineage, base=base_info(base) | {"sha256": "a" * 64}))
    with pytest.raises(UserError, match=r"base\.sha256 differs"):
        load_adapter_base(folder)


def test_the_hash_is_of_the_content(make, tmp_path):
    adapters = make()
    adapters.save("default", tmp_path / "a")
    adapters.save("default", tmp_path / "b")
    shake(adapters, "default", seed=5)
    adapters.save("default", tmp_path / "c")
    a, b, c = (adapter_sha256(tmp_path / name) for name in "abc")
    assert a == b != c
