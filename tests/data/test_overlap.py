"""Evaluation prompts that are trained on."""

from preftune.data.overlap import PromptSet, overlap_words, overlaps
from preftune.data.rows import Row
from preftune.data.split import split_rows


def prompts(*texts: str) -> list[Row]:
    return [Row([{"role": "user", "content": text}], origin=f"eval:{i}") for i, text in enumerate(texts, 1)]


def test_shared_prompts_are_counted_and_named_whatever_their_white_space(kit) -> None:
    trained = {"demos": [PromptSet.of(prompts("a", "b"), kit.spec()), PromptSet.of(prompts("c "), kit.spec())],
               "pairs": [PromptSet.of(prompts("y"), kit.spec())]}  # fmt: skip
    evaluated = PromptSet.of(prompts("c", "x", " a"), kit.spec())
    shared = overlaps(evaluated, trained)
    assert list(shared) == ["demos"]
    assert overlap_words("demos", shared["demos"], evaluated) == (
        "2 of 3 prompts stand in the training data demos as well (eval:1, eval:3)"
    )


def test_held_out_prompts_are_not_trained_on(kit) -> None:
    rows, spec = prompts(*map(str, range(40))), kit.spec(held_out=0.5)
    train, held = split_rows(rows, spec.held_out, spec.seed)
    trained = {"d": [PromptSet.of(rows, spec)]}
    assert overlaps(PromptSet.of(held, kit.spec()), trained) == {}
    assert overlaps(PromptSet.of(train, kit.spec()), trained)["d"].count == len(train)


def test_an_evaluation_on_held_out_prompts_shares_none_with_training_on_the_rest(kit) -> None:
    rows, spec = prompts(*map(str, range(40))), kit.spec(held_out=0.5)
    train, held = split_rows(rows, spec.held_out, spec.seed)
    evaluated = PromptSet.of(rows, spec)
    assert len(evaluated) == len(held)
    assert overlaps(evaluated, {"d": [PromptSet.of(rows, spec)]}) == {}
    assert overlaps(evaluated, {"d": [PromptSet.of(rows, kit.spec())]})["d"].count == len(held) < len(train) + len(held)
