"""Beam search, by transformers: the likeliest completion that a search of that width finds."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .adapters import AdapterSet
from .batching import TokenIds, left_pad
from .decoder import LibraryDecoder
from .generate import Generation, check_request, decoder_for, merged


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
    on_step: Callable[[], None] | None = None,
) -> Generation:
    """The best beam of each prompt, with the arguments that `sample` has.

    Args:
        role: the adapter that speaks; None is the base.
        eos_token_id: a beam ends with this token, or with the first of these.
        length_penalty: beams are compared by log-probability / length ** length_penalty.
        num_beams, batch_size: width of the search, prompts searched at once; each takes `num_beams` rows.
        on_batch: called with the number of prompts done so far.
        on_step: called after every token; what it raises ends the search.

    Returns:
        Completions as `sample` gives them; log-probabilities at temperature 1.

    Raises:
        ValueError: an empty prompt, or a number below 1.
    """
    check_request(prompts, num_beams=num_beams, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    settings: dict[str, Any] = {
        "num_beams": num_beams,
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "length_penalty": length_penalty,
        "eos_token_id": ends,
        "pad_token_id": pad_token_id,
        "stopping_criteria": None if on_step is None else StoppingCriteriaList([_Step(on_step)]),
    }
    model: Any = adapters.model.get_base_model()
    was_training = model.training
    batch_size = 1 if issubclass(decoder_for(adapters), LibraryDecoder) else batch_size  # no padding, then
    model.eval()
    found = Generation()
    try:
        with merged(adapters, role):
            for start in range(0, len(prompts), batch_size):
                batch = left_pad(prompts[start : start + batch_size], pad_token_id, model.device)
                for row, logps in _best(model, *batch, settings):
                    length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                    found.tokens.append(row[:length])
                    found.logprobs.append(logps[:length])
                    found.finished.append(row[length - 1] in ends)
                if on_batch is not None:
                    on_batch(len(found.tokens))
    finally:
        model.train(was_training)
    return found


def _best(model: Any, ids_BP: Tensor, mask_BP: Tensor, settings: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each prompt's best beam, padding after its end included."""
    out = model.generate(
        input_ids=ids_BP, attention_mask=mask_BP, return_dict_in_generate=True, output_logits=True, **settings
    )
    # `logits` has a row for every beam of every prompt; beam_indices says which one each token came from
    logps = model.compute_transition_scores(
        out.sequences, out.logits, getattr(out, "beam_indices", None), normalize_logits=True
    )
    return list(zip(out.sequences[:, ids_BP.size(1) :].tolist(), logps.tolist(), strict=True))


class _Step(StoppingCriteria):
    """Calls a function after every token, and never stops by itself."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[torch.Tensor] | None, **kwargs: Any
    ) -> torch.BoolTensor:
        self._call()
        # torch.zeros is typed as a plain Tensor
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # pyright: ignore[reportReturnType]
