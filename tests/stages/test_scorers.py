"""Where a score comes from: another model with its own tokenizer, reward stages, functions, and several at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from preftune.errors import UserError
from preftune.models.tiny import byte_tokenizer
from preftune.stages.ppo.opening import reward_sources
from preftune.stages.ppo.rewards import ModelScorer, Responses, RewardSource

from .collecting import collect
from .tiny_ppo import eager_tokenizer, letters, reward_folder, rollout_of, trainer, with_reward

CPU = torch.device("cpu")
TEXTS = ["one", "two and three", "a b c d e f g h", ""]
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [SEP]{% endfor %}"


FRAME = ("[CLS]", "[SEP]", "[UNK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz ?[]"


def letter_tokenizer(pad: str | None) -> PreTrainedTokenizerFast:
    """One token a letter, [CLS] text [SEP]: nothing like the policy's."""
    vocab = {token: i for i, token in enumerate([*FRAME, *LETTERS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(list(FRAME))
    ends = [("[CLS]", 0), ("[SEP]", 1)]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"cls_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT, **names)


def outsider(folder: Path, kind: str, *, pad: str | None = None, length: int = 64, labels: int = 1) -> Path:
    """A random classifier of that kind with a tokenizer of its own."""
    tokenizer = letter_tokenizer(pad)
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"vocab_size": 40, "num_labels": labels, "initializer_range": 0.5}
    if kind == "decoder":
        pad_id = None if pad is None else tokenizer.pad_token_id
        assert pad_id is None or isinstance(pad_id, int)
        config = GPT2Config(n_positions=length, n_embd=16, n_layer=1, n_head=2, pad_token_id=pad_id, **sizes)
        GPT2ForSequenceClassification(config).save_pretrained(folder)
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertForSequenceClassification(BertConfig(max_position_embeddings=length, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_score(folder: Path, text: str, *, special: bool = True) -> float:
    """What plain transformers gives for one text alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits[0, 0].item()


def responses(prompts: list[Any], texts: list[str]) -> Responses:
    return Responses(None, prompts, texts, {})  # pyright: ignore[reportArgumentType]: text scorers read no episodes


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("pad", [None, "[SEP]", "[UNK]"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_another_models_score_is_its_plain_forward_on_the_text(
    tmp_path: Path, kind: str, pad: str | None, batch_size: int
) -> None:
    """Whatever its PAD is, EOS included, and whatever shares the batch."""
    folder = outsider(tmp_path, kind, pad=pad)
    scorer = ModelScorer(RewardSource("model", str(folder)), CPU, batch_size)
    found = scorer(responses(["what? "] * 4, TEXTS)).tolist()
    assert found == pytest.approx([plain_score(folder, "what? " + text) for text in TEXTS], abs=1e-5)
    assert max(found) - min(found) > 0.01


def test_a_conversation_is_written_in_the_other_models_template(tmp_path: Path) -> None:
    folder = outsider(tmp_path, "decoder")
    scorer = ModelScorer(RewardSource("model", str(folder)), CPU, 4)
    found = scorer(responses([[{"role": "user", "content": "what?"}]] * 4, TEXTS)).tolist()
    # its template ends in the EOS, and the score is read there: once, without the tokenizer's own frame
    written = [f"[user] what? [SEP][assistant] {text} [SEP]" for text in TEXTS]
    assert found == pytest.approx([plain_score(folder, text, special=False) for text in written], abs=1e-5)
    scorer.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template and the prompts are conversations"):
        scorer(responses([[{"role": "user", "content": "what?"}]], ["one"]))


def test_a_text_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    folder = outsider(tmp_path, "encoder", length=16)
    scorer = ModelScorer(RewardSource("model", str(folder)), CPU, 4)
    long, short = "x" * 90, "x" * 11  # 16 positions hold [CLS], 14 letters and [SEP]
    assert scorer(responses([long, short], ["one", "one"])).tolist() == pytest.approx(
        [plain_score(folder, short + "one")] * 2
    )


def test_a_classifier_of_several_classes_is_no_reward(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 outputs, expected 1"):
        ModelScorer(RewardSource("model", str(outsider(tmp_path, "encoder", labels=2))), CPU, 4)


def test_another_model_rewards_ppo(tmp_path: Path) -> None:
    folder = outsider(tmp_path / "judge", "decoder")
    made = trainer(tmp_path, reward=str(folder), total_episodes=8)
    collected = collect(made, 0, 0.05)
    for sample, score in zip(collected.samples, collected.rollout.scores_B.tolist(), strict=False):
        assert score == pytest.approx(plain_score(folder, sample["prompt"] + sample["completion"]), abs=1e-5)
    assert made.train().global_step == 4


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_several_sources_add_up_with_their_weights(tmp_path: Path) -> None:
    stage = RewardSource("stage", str(reward_folder(tmp_path / "stage")), 0.5)
    judge = RewardSource("model", str(outsider(tmp_path / "judge", "decoder")), -2.0)
    function = RewardSource("function", length, 0.25)
    one = [rollout_of(trainer(tmp_path, reward=(), rewards=[each])).scores_B for each in (stage, judge, function)]
    together = rollout_of(trainer(tmp_path, reward=(), rewards=[stage, judge, function])).scores_B
    torch.testing.assert_close(together, one[0] + one[1] + one[2])
    assert all(each.std() > 0.01 for each in one)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_an_ensemble_is_its_mean_minus_its_spread(tmp_path: Path, penalty: float) -> None:
    members = [RewardSource("stage", str(reward_folder(tmp_path / str(seed), seed=seed))) for seed in (1, 2)]
    one, two = (rollout_of(trainer(tmp_path, reward=(), rewards=[each])).scores_B for each in members)
    options = {"reward_combination": "ensemble", "ensemble_penalty": penalty}
    made = trainer(tmp_path, reward=(), rewards=members, **options)
    assert made.adapters.names == ["default", "ref", "reward", "reward_2", "value"]
    # two members stand half their distance from their mean
    expected = (one + two) / 2 - penalty * (one - two).abs() / 2
    torch.testing.assert_close(rollout_of(made).scores_B, expected)


@pytest.mark.checklist("P9")
def test_p09_a_response_without_eos_is_scored_by_the_rule(tmp_path: Path) -> None:
    options = {"tokenizer": eager_tokenizer(tmp_path), "max_new_tokens": 20}
    plain = rollout_of(trainer(tmp_path, **options))
    finished = plain.episodes.finished_B
    assert 0 < finished.sum() < 8
    # after clipping: the penalty must not be lost in it
    less = rollout_of(trainer(tmp_path, **options, missing_eos_penalty=1.5, reward_clip=1.0)).scores_B
    assert torch.equal(less[finished], plain.scores_B[finished])
    torch.testing.assert_close(less[~finished], plain.scores_B[~finished] - 1.5)
    fixed = rollout_of(trainer(tmp_path, **options, missing_eos_score=-3.0)).scores_B
    assert torch.equal(fixed[finished], plain.scores_B[finished])
    assert (fixed[~finished] == -3).all()


def test_a_reward_stage_by_folder_however_it_is_named(tmp_path: Path) -> None:
    folder = reward_folder(tmp_path / "reward")
    named = [
        reward_sources(str(folder), None, ()),
        reward_sources((), folder, ()),
        reward_sources([str(folder)], None, ()),
        reward_sources(None, None, [RewardSource("stage", str(folder))]),
    ]
    assert all(sources == named[0] for sources in named)
    kinds = [source.kind for source in reward_sources([letters, "json:loads", "owner/judge"], folder, ())]
    assert kinds == ["stage", "function", "function", "model"]


def test_a_reward_stage_of_another_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    with pytest.raises(UserError, match="chat_template_sha256 differs"):
        with_reward(tmp_path, tokenizer=tokenizer)
