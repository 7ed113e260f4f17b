"""Decoding on a GPU: the host launches steps and seldom asks what came out of them.

Where a step stands, which rows have ended and where their next token goes are tensors; the host knows how long a row
can be at most, and looks at what has ended every few steps. Nothing is allocated that outlives a step.

Shape suffixes: B rows in flight, H hidden size, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import nn

from .decoder import Decoder
from .prepack import Product
from .static_cache import StaticCache
from .step_graphs import StepGraphs
from .token_step import TokenStep

LOOK_EVERY = 8
"""Steps between two looks at what has ended: a look waits for the device, a row that ended goes on for nothing."""
COLUMNS = 256
"""A step reads a multiple of so many columns, so that few graphs serve all lengths."""
SHARE = 0.8
"""Of the memory that is free: what keys, values and logits may take."""


class DeviceDecoder(Decoder):
    """For decoders whose step is ours (`TokenStep.applies`)."""

    words = "row by row, with buffers that stay where they are"

    def _open(self, joint: Mapping[nn.Module, Product]) -> None:
        self.step = TokenStep(self.backbone, joint)
        layers = self.backbone.config.get_text_config().num_hidden_layers
        self.cache = StaticCache(len(self.request_B), layers, self._columns(), self.device)
        self.graphs = StepGraphs(self.device)
        self.unseen = 0
        self.serving = self.request_B.tolist()
        self.most = [1] * len(self.serving)

    def _columns(self) -> int:
        longest = max(len(self.prompts[i]) for i in self.waiting)
        return -(-(longest + self.max_new_tokens) // 16) * 16

    def _places(self, asked: int) -> int:
        """As many rows as memory has room for: their keys and values, those of their prompts, their logits."""
        text, weight = self.backbone.config.get_text_config(), self.head.weight
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * width * weight.element_size()
        row = 2 * self._columns() * token + 16 * len(weight)
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(1, min(asked, int(SHARE * free / row)))

    def _admit(self) -> bool:
        ended = super()._admit()
        self._look()
        return ended

    def _step(self) -> bool:
        longest = max(self.most)
        self.cache.seen = min(self.cache.columns, -(-longest // COLUMNS) * COLUMNS)
        if self.heard is None:
            self.graphs.run((len(self.request_B), self.cache.seen), self._advance)
        else:
            self._advance()
        self.most = [each + 1 for each in self.most]
        self.unseen += 1
        due = self.heard is not None or self.unseen == LOOK_EVERY or self._one_is_full()
        return due and self._look()

    def _one_is_full(self) -> bool:
        """Whether a row must have ended by now, because it has as many tokens as were asked for."""
        n, prompts, new = len(self.prompts), self.prompts, self.max_new_tokens
        rows = zip(self.serving, self.most, strict=True)
        return any(request != n and most == len(prompts[request]) + new for request, most in rows)

    def _advance(self) -> None:
        hidden_BH = self.step(self.newest_B, self.length_B, self.cache)
        self._keep(self.head.logits(hidden_BH), slice(None))

    def _look(self) -> bool:
        """Which request each row serves now; whether that has changed."""
        before, self.serving, self.unseen = self.serving, self.request_B.tolist(), 0
        for row, (was, request) in enumerate(zip(before, self.serving, strict=True)):
            if request == len(self.prompts):
                self.most[row] = 1
            elif request != was:
                self.most[row] = len(self.prompts[request]) + 1
        return before != self.serving

    def _shrink(self) -> bool:
        """Half of the places go once no more are needed; fewer at a time would mean more graphs."""
        places = len(self.request_B)
        if 2 * self.idle < places:
            return self._step()
        rows = torch.argsort((self.request_B == len(self.prompts)).long(), stable=True)[: places // 2]
        self._keep_rows(rows)
        self.graphs.forget()
        self.serving, self.most = self.request_B.tolist(), [self.most[row] for row in rows.tolist()]
        self.idle -= places - places // 2
        return False
