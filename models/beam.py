"""Beam search, by transformers: the likeliest completion that a search of that width finds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .adapters import AdapterSet
from .batching import TokenIds, left_pad
from .generate import Generation, check_request, merged


@torch.no_grad()
def beam_search(
    adapters: AdapterSet,
    role: str | None,
    prompts: Sequence[TokenIds],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    length_penalty: float = 1.0,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Generation:
    """The best beam of each prompt, with the arguments that `sample` has.

    Args:
        role: the adapter that speaks; None is the base.
        num_beams: width of the search.
        eos_token_id: a beam ends with this token, or with the first of these.
        length_penalty: beams are compared by log-probability / length ** length_penalty.
        batch_size: prompts searched at once; each takes `num_beams` rows.
        on_batch: called with the number of completions done so far.

    Returns:
        Completions as `sample` gives them; log-probabilities at temperature 1.

    Raises:
        ValueError: an empty prompt, or a number below 1.
    """
    check_request(prompts, num_beams=num_beams, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    model: Any = adapters.model.get_base_model()
    was_training = model.training
    model.eval()
    found = Generation()
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
                    eos_token_id=ends,
                    pad_token_id=pad_token_id,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                rows = out.sequences[:, ids_BP.size(1) :].tolist()
                # `logits` has a row for every beam of every prompt; beam_indices says which one each token came from
                logps = model.compute_transition_scores(
                    out.sequences, out.logits, getattr(out, "beam_indices", None), normalize_logits=True
                ).tolist()
                for row, scores in zip(rows, logps, strict=True):
                    length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                    found.tokens.append(row[:length])
                    found.logprobs.append(scores[:length])
                    found.finished.append(row[length - 1] in ends)
                if on_batch is not None:
                    on_batch(len(found.tokens))
    finally:
        model.train(was_training)
    return found
