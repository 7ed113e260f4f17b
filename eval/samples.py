"""What the policies say: the same prompts and the same random streams for every one of them (checklist E5)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.adapters import AdapterSet
from ..models.beam import beam_search
from ..models.generate import sample
from ..models.tokens import end_token_ids


@dataclass(frozen=True)
class EncodedPrompt:
    """One evaluation prompt.

    Attributes:
        messages: the conversation up to the reply.
        ids: token ids, ending where the reply begins.
        columns: the other columns of the data row, for judges that read them.
    """

    messages: list[dict[str, Any]]
    ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One reply of one policy.

    Attributes:
        policy: its name in the recipe.
        prompt_index: place of the prompt in the evaluation's list; every policy has the same list.
        prompt: the prompt itself.
        completion: the reply as text, special tokens left out.
        tokens: ids of the reply, its EOS included where it was reached.
        finished: whether the reply ended at EOS; False: it was cut at `max_new_tokens`.
    """

    policy: str
    prompt_index: int
    prompt: EncodedPrompt
    completion: str
    tokens: list[int]
    finished: bool

    def as_dict(self) -> dict[str, Any]:
        """The line of samples.jsonl, without what judges say of it."""
        return {
            "policy": self.policy,
            "prompt_index": self.prompt_index,
            "prompt": self.prompt.messages,
            "completion": self.completion,
            "tokens": len(self.tokens),
            "token_ids": self.tokens,
            "finished": self.finished,
        }


def read_prompts(dataset: Any) -> list[EncodedPrompt]:
    """Prompts from the data room's encoded dataset (columns prompt_ids, prompt, columns as a JSON string)."""
    prompts = []
    for row in dataset:
        columns = row.get("columns")
        parsed = json.loads(columns) if isinstance(columns, str) and columns else dict(columns or {})
        prompts.append(EncodedPrompt(list(row["prompt"]), list(row["prompt_ids"]), parsed))
    return prompts


def generate_samples(
    adapters: AdapterSet,
    role: str | None,
    policy: str,
    prompts: Sequence[EncodedPrompt],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 32,
    beams: int = 1,
    first: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[Sample]:
    """One reply to each prompt, in the prompts' order.

    Args:
        role: the adapter that speaks; None is the base.
        policy: the name that the samples carry.
        seed: with the prompt's place it fixes the random stream, so two policies that agree say the same.
        batch_size: rows decoded at once.
        beams: above 1, the best reply of a beam search of that width; temperature and seed are not used then.
        first: the place of the first of these prompts in the evaluation's list, where these are a part of it.
        on_batch: called with the number of prompts done so far.
    """
    shared = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_token_ids(tokenizer, adapters.model),
        "pad_token_id": tokenizer.pad_token_id,
        "on_batch": on_batch,
    }
    ids = [prompt.ids for prompt in prompts]
    if beams > 1:
        generation = beam_search(adapters, role, ids, num_beams=beams, batch_size=max(1, batch_size // beams), **shared)
    else:
        generation = sample(
            adapters,
            role,
            ids,
            temperature=temperature,
            seed=seed,
            first=first,
            batch_size=batch_size,
            recompute=True,
            **shared,
        )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generation.tokens]
    return [
        Sample(policy, first + index, prompt, texts[index], generation.tokens[index], generation.finished[index])
        for index, prompt in enumerate(prompts)
    ]
