"""When a completion is over: at a token, or as soon as its text ends in a given string.

Legend of shape suffixes: B rows, N requests, S steps, L tokens looked back at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria


class Stops:
    """What ends a completion; the length limit aside.

    Args:
        ids: tokens that do.
        strings: texts that do. The token with which one is complete is the completion's last; it may say more than the
            string (`generate` has it so too). The prompt does not count.
        tokenizer: needed with `strings`.

    Raises:
        ValueError: strings without a tokenizer, or an empty string.
    """

    def __init__(
        self,
        ids: int | Sequence[int],
        strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.ids = [ids] if isinstance(ids, int) else list(ids)
        self.criteria: StopStringCriteria | None = None
        if not strings:
            return
        if tokenizer is None:
            raise ValueError("stop_strings are given without a tokenizer, expected the model's")
        if "" in strings:
            raise ValueError("a stop string is empty, expected at least one character")
        self.criteria = StopStringCriteria(tokenizer, list(strings))
        self.filler = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def __call__(self, tokens_NS: Tensor, request_B: Tensor, step_B: Tensor) -> Tensor:
        """Whether each row's newest token ends it [B].

        Args:
            tokens_NS: what was sampled so far, by request.
            request_B: each row's request.
            step_B: the step of its newest token.
        """
        newest_B = tokens_NS[request_B, step_B]
        over_B = torch.isin(newest_B, torch.tensor(self.ids, device=newest_B.device))
        if self.criteria is None:
            return over_B
        back_L = torch.arange(self.criteria.maximum_token_len, device=step_B.device).flip(0)
        index_BL = step_B[:, None] - back_L
        said_BL = tokens_NS[request_B[:, None], index_BL.clamp(min=0)].masked_fill(index_BL < 0, self.filler)
        return over_B | self.criteria(said_BL, None)  # type: ignore[arg-type]
