"""Beam search, by transformers: the likeliest completion that a search of that width finds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .adapters import AdapterSet
from .generate import Generation, merged
from .prefill import left_pad


@torch.no_grad()
def beam_search(
    adapters: AdapterSet,
    role: str | None,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    length_penalty: float = 1.0,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Generation:
    """The best beam of each prompt.

    Args:
        role: the adapter that speaks; None is the base.
        num_beams: width of the search.
        length_penalty: beams are compared by log-probability / length ** length_penalty.
        batch_size: prompts searched at once; each takes `num_beams` rows.
        on_batch: called with the number of prompts done so far.
        on_step: called after every token; what it raises ends the search.

    Returns:
        Completions as `sample` gives them; log-probabilities at temperature 1.
    """
    model: Any = adapters.model.get_base_model()
    was_training = model.training
    model.eval()
    found: list[tuple[list[int], list[float]]] = []
    try:
        with merged(adapters, role):
            for start in range(0, len(prompts), batch_size):
                ids_BP, mask_BP = left_pad(prompts[start : start + batch_size], pad_token_id, model.device)
                out = model.generate(
                    input_ids=ids_BP,
                    attention_mask=mask_BP,
                    num_beams=num_beams,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    length_penalty=length_penalty,
                    eos_token_id=eos_token_id,
                    pad_token_id=pad_token_id,
                    return_dict_in_generate=True,
                    output_logits=True,
                    stopping_criteria=None if on_step is None else StoppingCriteriaList([_Step(on_step)]),
                )
                rows = out.sequences[:, ids_BP.size(1) :].tolist()
                # `logits` has a row for every beam of every prompt; beam_indices says which one each token came from
                logps = model.compute_transition_scores(
                    out.sequences, out.logits, getattr(out, "beam_indices", None), normalize_logits=True
                ).tolist()
                for row, scores in zip(rows, logps, strict=True):
                    length = row.index(eos_token_id) + 1 if eos_token_id in row else len(row)
                    found.append((row[:length], scores[:length]))
                if on_batch is not None:
                    on_batch(len(found))
    finally:
        model.train(was_training)
    return Generation(
        [tokens for tokens, _ in found],
        [logps for _, logps in found],
        [tokens[-1] == eos_token_id for tokens, _ in found],
    )


class _Step(StoppingCriteria):
    """Calls a function after every token, and never stops by itself."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # pyright: ignore[reportReturnType]: torch.zeros is typed as a Tensor
