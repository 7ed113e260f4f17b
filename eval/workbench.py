"""The base, loaded once, with every policy as an adapter on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.encode import encode_prompts
from ..data.load import load_rows
from ..errors import UserError
from ..models.adapters import AdapterSet
from ..models.context import check_context
from ..models.loading import load_model
from ..models.lora import LoraSpec
from ..models.tokens import load_tokenizer, prepare_model
from ..progress import meter
from .kl import KL, sequence_kls, summarise
from .samples import EncodedPrompt, Sample, generate_samples, read_prompts
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
    """

    spec: EvalSpec
    adapters: AdapterSet
    tokenizer: Any
    roles: dict[str, str | None]
    loaded: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: EvalSpec) -> "Workbench":
        """Loads the base once and every policy's adapter beside the others.

        Raises:
            UserError: a policy's folder holds no adapter, or one of another base or tokenizer.
        """
        tokenizer = load_tokenizer(spec.base, spec.chat_template, spec.template_date)
        model = load_model(
            spec.base,
            dtype=_dtype(spec.dtype),
            quantization=spec.quantization,
            device="cuda" if torch.cuda.is_available() else None,
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
            # PEFT uses the name as a module's, which may hold no dot.
            role = roles[name] = loaded[folder.resolve()] = f"policy_{name.replace('.', '_')}"
            adapters.load(role, folder)
        return cls(spec, adapters, tokenizer, roles, loaded)

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
            role = f"beside_{len(self.loaded)}"
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
        loaded = load_rows(spec.prompts, "prompt", spec.folders)
        dataset, _ = encode_prompts(loaded.rows, self.tokenizer, spec.prompts)
        check_context(dataset, spec.base, "eval.prompts", spec.max_new_tokens)
        return read_prompts(dataset)

    def samples(self, policy: str, prompts: list[EncodedPrompt]) -> list[Sample]:
        """One reply of the policy to each prompt."""
        return self.replies(self.roles[policy], policy, prompts)

    def replies(
        self, role: str | None, policy: str, prompts: Sequence[EncodedPrompt], what: str = "samples"
    ) -> list[Sample]:
        """One reply to each prompt of whichever adapter is loaded as `role`; None is the base.

        Args:
            policy: the name that the replies carry.
            what: they are for, in the progress.
        """
        spec = self.spec
        with meter(f"eval {policy}: {what}", len(prompts)) as done:
            return generate_samples(
                self.adapters,
                role,
                policy,
                prompts,
                self.tokenizer,
                max_new_tokens=spec.max_new_tokens,
                temperature=spec.temperature,
                seed=spec.seed,
                batch_size=spec.batch_size,
                beams=spec.beams,
                on_batch=done,
            )

    def kl(self, role: str | None, reference: str | None, replies: Sequence[Sample], label: str) -> KL:
        """KL(role || reference) on replies drawn from `role`, at the sampling temperature (E4); adapter names."""
        temperature, lengths = self.spec.temperature, [len(reply.tokens) for reply in replies]
        if role == reference:
            return summarise([0.0] * len(replies), lengths, temperature)
        with meter(f"eval {label}", len(replies)) as done:
            kls = sequence_kls(
                self.adapters,
                role,
                reference,
                [reply.prompt.ids for reply in replies],
                [reply.tokens for reply in replies],
                temperature=temperature,
                pad_token_id=self.tokenizer.pad_token_id,
                on_batch=done,
            )
        return summarise(kls, lengths, temperature)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError("model.dtype", f"is {name!r}, expected float32, bfloat16 or float16", "correct the name")
    return dtype
