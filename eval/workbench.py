"""The base, loaded once, with every policy as an adapter on it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..data.encode import encode_prompts
from ..data.load import load_rows
from ..data.split import held_out_rows
from ..errors import UserError
from ..files import ADAPTER_CONFIG
from ..models.adapters import AdapterSet, module_name
from ..models.batching import forward_tokens, token_batches
from ..models.context import check_context
from ..models.devices import own_gpu
from ..models.lineage import adapter_sha256, tokenizer_info
from ..models.loading import load_model
from ..models.lora import LoraSpec
from ..models.tokens import end_token_ids, load_tokenizer, prepare_model
from ..progress import say
from .drawn import Drawn, DrawnReplies, drawn_key
from .kl import KL, sequence_kls, summarise
from .samples import EncodedPrompt, Sample, generate_samples, read_prompts
from .served import ServedReplies
from .shared import by_first, shared_rows
from .spec import EvalSpec, check_adapter


@dataclass(frozen=True)
class Workbench:
    """What measurements share.

    Attributes:
        spec: the evaluation.
        adapters: the base with every policy on it.
        tokenizer: the base's, with the spec's chat template.
        roles: policy name -> adapter name, None for the base.
        loaded: folder -> adapter name, of the policies and of what `load` put beside them.
        drawn: replies that were drawn before.
        served: the server that draws them; None: they are drawn here.
    """

    spec: EvalSpec
    adapters: AdapterSet
    tokenizer: Any
    roles: dict[str, str | None]
    loaded: dict[Path, str] = field(default_factory=dict)
    drawn: DrawnReplies = field(default_factory=lambda: DrawnReplies(None))
    served: ServedReplies | None = None

    @classmethod
    def open(cls, spec: EvalSpec, drawn: DrawnReplies | None = None) -> "Workbench":
        """Loads the base once and every policy's adapter beside the others.

        Args:
            drawn: where replies are kept; None: those of the spec's `output_dir` are read, and none written.

        Raises:
            UserError: a policy's folder holds no adapter, or one of another base or tokenizer.
        """
        tokenizer = load_tokenizer(spec.base, spec.chat_template, spec.template_date)
        model = load_model(
            spec.base,
            dtype=_dtype(spec.dtype),
            quantization=spec.quantization,
            device=own_gpu() if torch.cuda.is_available() else None,
            packed=spec.packed,
        )
        prepare_model(model, tokenizer)
        # The set wants a trainable adapter; nothing trains here, so the smallest one, which no policy uses.
        adapters = AdapterSet.create(model, spec.base, LoraSpec(r=1, alpha=1), parent=None)
        roles: dict[str, str | None] = {}
        loaded: dict[Path, str] = {}
        for name, folder in spec.all_policies().items():
            if folder is None:
                roles[name] = None
                continue
            check_adapter(folder, spec.base, tokenizer)
            role = roles[name] = loaded[folder.resolve()] = f"policy_{module_name(name)}"
            adapters.load(role, folder)
        those = [role for role in roles.values() if role is not None]
        served = None if spec.rollout is None else ServedReplies(spec, adapters, tokenizer, those)
        return cls(spec, adapters, tokenizer, roles, loaded, drawn or DrawnReplies(spec.output_dir), served)

    def close(self) -> None:
        """End a server that was started for this."""
        if self.served is not None:
            self.served.close()

    def load(self, folder: Path | None) -> str | None:
        """The adapter name of a folder's adapter, loaded where it is not there yet; None is the base.

        Raises:
            UserError: it holds no adapter, or one of another base or tokenizer.
        """
        if folder is None:
            return None
        place = folder.resolve()
        if place not in self.loaded:
            check_adapter(folder, self.spec.base, self.tokenizer)
            role = next(name for number in count() if (name := f"beside_{number}") not in self.loaded.values())
            self.adapters.load(role, folder)
            self.loaded[place] = role
        return self.loaded[place]

    @contextmanager
    def holding(self, folder: Path | None) -> Iterator[str | None]:
        """As `load`, but what was not there before is removed again at the end."""
        before = set(self.loaded)
        try:
            yield self.load(folder)
        finally:
            for place in self.loaded.keys() - before:
                self.adapters.remove(self.loaded.pop(place))

    def prompts(self) -> list[EncodedPrompt]:
        """The evaluation's prompts, encoded; the same list for every policy (E5)."""
        spec = self.spec
        rows = load_rows(spec.prompts, "prompt", spec.folders).rows
        rows = held_out_rows(rows, spec.prompts, "eval.prompts.held_out")
        dataset, _ = encode_prompts(rows, self.tokenizer, spec.prompts)
        check_context(dataset, spec.base, "eval.prompts", spec.max_new_tokens)
        return read_prompts(dataset)

    def samples(self, policy: str, prompts: list[EncodedPrompt]) -> list[Sample]:
        """One reply of the policy to each prompt, those that were drawn before for the same adapter and settings."""
        key = self.drawn_key(policy, prompts)
        kept = by_first(lambda: self.drawn.get(key, len(prompts)))
        if kept is None:
            replies = self.replies(self.roles[policy], policy, prompts)
            tokens, finished = [reply.tokens for reply in replies], [reply.finished for reply in replies]
            self.drawn.put(key, Drawn(tokens, finished, [reply.completion for reply in replies]))
            return replies
        say(f"eval {policy}: {len(prompts)} samples as drawn before")
        rows = enumerate(zip(prompts, kept.completions, kept.tokens, kept.finished, strict=True))
        return [Sample(policy, place, prompt, text, ids, ended) for place, (prompt, text, ids, ended) in rows]

    def drawn_key(self, policy: str, prompts: Sequence[EncodedPrompt]) -> str:
        """The hash of everything that shapes a policy's replies to these prompts."""
        spec, tokenizer = self.spec, self.tokenizer
        parts = {
            "base": spec.base.sha256,
            "dtype": [spec.dtype, spec.quantization, spec.packed],
            "device": next(self.adapters.model.parameters()).device.type,
            "adapter": self._content(policy),
            "prompts": [prompt.ids for prompt in prompts],
            "ends": [end_token_ids(tokenizer, self.adapters.model), tokenizer.pad_token_id],
            "tokenizer": tokenizer_info(tokenizer),
            "sampling": [spec.max_new_tokens, spec.temperature, spec.seed, spec.beams],
            **({} if spec.rollout is None else {"server": spec.rollout.rollout_engine}),
        }
        return drawn_key(parts)

    def _content(self, policy: str) -> str | None:
        """The hash of a policy's adapter; None for the base."""
        folder = self.spec.all_policies()[policy]
        if folder is None:
            return None
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # PEFT writes sets of names in any order
        plain = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in config.items()}
        return f"{adapter_sha256(folder)} {json.dumps(plain, sort_keys=True)}"

    def adapter_of(self, policy: str) -> str | None:
        """The hash of a policy's weights; None for the base."""
        folder = self.spec.all_policies()[policy]
        return None if folder is None else adapter_sha256(folder)

    def policy_kl(self, replies: Sequence[Sample]) -> KL:
        """KL of the policy that drew the replies to the evaluation's reference, measured once for each pair of both."""
        policy, reference = replies[0].policy, self.spec.reference
        key = self.drawn_key(policy, [reply.prompt for reply in replies])
        against = str(self._content(reference))
        kept = by_first(lambda: self.drawn.get(key, len(replies)))
        if kept is not None and against in kept.kls and kept.tokens == [reply.tokens for reply in replies]:
            return summarise(kept.kls[against], [len(reply.tokens) for reply in replies], self.spec.temperature)
        label = f"{policy}: KL to {reference}"
        kls = self.kls(self.roles[policy], self.roles[reference], replies, label)
        if kept is not None and kept.tokens == [reply.tokens for reply in replies]:
            self.drawn.put(key, replace(kept, kls=kept.kls | {against: kls}))
        return summarise(kls, [len(reply.tokens) for reply in replies], self.spec.temperature)

    def replies(
        self, role: str | None, policy: str, prompts: Sequence[EncodedPrompt], what: str = "samples"
    ) -> list[Sample]:
        """One reply to each prompt of whichever adapter is loaded as `role`; None is the base.

        Args:
            policy: the name that the replies carry.
            what: they are for, in the progress.
        """
        spec = self.spec
        if (served := self.served) is not None:
            folder = next((place for place, loaded in self.loaded.items() if loaded == role), None)
            return by_first(lambda: served.replies(role, folder, policy, prompts, f"eval {policy}: {what}"))

        def draw(places: Sequence[int], done: Callable[[int], None]) -> list[Sample]:
            return generate_samples(
                self.adapters,
                role,
                policy,
                [prompts[place] for place in places],
                self.tokenizer,
                max_new_tokens=spec.max_new_tokens,
                temperature=spec.temperature,
                seed=spec.seed,
                batch_size=spec.batch_size,
                beams=spec.beams,
                first=places[0],
                on_batch=done,
            )

        return shared_rows(f"eval {policy}: {what}", len(prompts), draw)

    def kl(self, role: str | None, reference: str | None, replies: Sequence[Sample], label: str) -> KL:
        """KL(role || reference) on replies drawn from `role`, at the sampling temperature (E4); adapter names."""
        lengths = [len(reply.tokens) for reply in replies]
        return summarise(self.kls(role, reference, replies, label), lengths, self.spec.temperature)

    def kls(self, role: str | None, reference: str | None, replies: Sequence[Sample], label: str) -> list[float]:
        """The KL of each reply, in nats."""
        if role == reference:
            return [0.0] * len(replies)

        def measure(places: Sequence[int], done: Callable[[int], None]) -> list[float]:
            return sequence_kls(
                self.adapters,
                role,
                reference,
                [replies[place].prompt.ids for place in places],
                [replies[place].tokens for place in places],
                temperature=self.spec.temperature,
                pad_token_id=self.tokenizer.pad_token_id,
                on_batch=done,
            )

        lengths = [len(reply.prompt.ids) + len(reply.tokens) for reply in replies]
        batches = token_batches(lengths, forward_tokens(self.adapters.backbone))
        return shared_rows(f"eval {label}", len(replies), measure, batches)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError("model.dtype", f"is {name!r}, expected float32, bfloat16 or float16", "correct the name")
    return dtype
