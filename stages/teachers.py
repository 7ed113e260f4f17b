"""The teacher of a distillation: named by a user, found, checked, and ready for forwards.

An adapter of the student's own base, or that base itself, is another role on the one base that the student has. Every
other teacher is loaded frozen beside it, and must have the student's vocabulary: its distributions are compared token
by token.

Legend of shape suffixes: B rows, T positions of prompt + response, H hidden size.
"""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..files import ADAPTER_CONFIG, LINEAGE
from ..models.adapters import DEFAULT, TEACHER, AdapterSet
from ..models.base import Base
from ..models.context import positions
from ..models.lineage import adapter_sha256, load_adapter_base, parent_entry, read_lineage
from ..models.loading import Quantization, load_model, resolve_base
from ..models.logprobs import LmHead
from ..models.lora import LoraSpec
from ..models.outline import Outline, outline
from ..models.plain_lora import read_config
from ..models.tokens import load_tokenizer, prepare_model, vocabulary_size
from .ppo.network import Trunk
from .ppo.opening import open_policy
from .ppo.rollout import Episodes, OnHost

logger = logging.getLogger(__name__)

_ON_TOP = LoraSpec(r=1, alpha=1)
"""An adapter set wants one that trains; nothing of a teacher does, so it is the smallest one, which nobody uses."""
_SHOWN = 3
_IN_MEMORY = "teacher_model"
_FAMILY = "take a teacher of the student's own family, whose tokens have the same ids"


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from: one of `adapter` and `model`.

    Attributes:
        adapter: folder of a stage, or of plain PEFT.
        model: as a recipe's `model.base`. revision: of a hub id.
        stage: the name of the stage that the adapter is, in the run.
        quantization, packed: how a model beside the student's is loaded.
        where: the place that names it, for errors.
    """

    adapter: Path | None = None
    model: str | None = None
    revision: str | None = None
    stage: str | None = None
    quantization: Quantization | None = None
    packed: bool = True
    where: str = _IN_MEMORY

    @classmethod
    def named(cls, spec: str | Path) -> "TeacherSource":
        """A folder with an adapter, or the spec of a base."""
        folder = Path(spec).expanduser()
        return cls(adapter=folder) if (folder / ADAPTER_CONFIG).is_file() else cls(model=str(spec))

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.stage or self.adapter or self.model)

    def base(self) -> Base:
        """The base that it is, or that its adapter belongs to.

        Raises:
            UserError: it is not there, or not reachable.
        """
        with _placed(self.where):
            if self.adapter is not None:
                return load_adapter_base(self.adapter)
            assert self.model is not None
            return resolve_base(self.model, self.revision)

    def on(self, base: Base) -> bool:
        """Whether it is known, without looking for another base, to be that base or an adapter of it."""
        if self.stage is not None:
            return True
        if self.adapter is None:
            return self.model in (base.spec, str(base.path)) and self.revision in (None, base.revision)
        if (self.adapter / LINEAGE).is_file():
            return read_lineage(self.adapter).base["sha256"] == base.sha256
        return read_config(self.adapter).base_model_name_or_path in (base.spec, base.model_id, str(base.path))

    def outline(self, base: Base) -> Outline | None:
        """Config and tokenizer of the model that is loaded beside that base; None where none is. No weights are read.

        Raises:
            UserError: nothing of that name is there, or reachable.
        """
        if self.on(base):
            return None
        with _placed(self.where):
            if self.adapter is None:
                assert self.model is not None
                return outline(self.model, self.revision)
            there = load_adapter_base(self.adapter)
            return None if there.sha256 == base.sha256 else outline(str(there.path))


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready.

    Attributes:
        trunk: the student's own, or that of the model beside it. role: the adapter under which it answers; None: the
            bare base. record: what a lineage says of it. beside: whether it has a base of its own.
    """

    trunk: Trunk
    role: str | None
    record: Mapping[str, Any]
    beside: bool

    @torch.no_grad()
    def hidden(self, episodes: Episodes) -> torch.Tensor:
        """Its last hidden states [B, T, H]."""
        if self.beside:
            # another model lays the rows out by its own rules
            host, own = episodes.host, replace(episodes)
            own.__dict__["host"] = OnHost(host.ids_BT, host.start_B, host.length_B)
            episodes = own
        with self.trunk.adapters.using(self.role):
            return self.trunk.hidden(episodes)

    @property
    def head(self) -> LmHead:
        """Its output head."""
        return self.trunk.adapters.head_under(self.role)


def open_teacher(
    given: TeacherSource | AdapterSet | PreTrainedModel | PeftModel | str | Path,
    student: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Teacher:
    """The teacher, on the student's base where it belongs to it.

    Args:
        given: a source, its folder or spec, or a model in memory.
        tokenizer: the student's.
        device: where a model beside the student's goes.

    Raises:
        UserError: it is not there, or has another vocabulary.
    """
    if isinstance(given, str | Path):
        given = TeacherSource.named(given)
    if not isinstance(given, TeacherSource):
        name = str(getattr(getattr(given, "config", None), "_name_or_path", "") or type(given).__name__)
        return _in_memory(given, student, tokenizer, {"model": name}, device)
    base = student.adapters.base
    theirs = base if given.on(base) else given.base()
    record = _record(given, theirs)
    if theirs.sha256 == base.sha256:
        return Teacher(student, _role(given, student.adapters), record, beside=False)
    check_vocabularies(tokenizer, load_tokenizer(theirs), _size(student.adapters), vocabulary_size(theirs), given.where)
    model = load_model(theirs, dtype=student.head.weight.dtype, quantization=given.quantization, packed=given.packed)
    prepare_model(model, tokenizer)
    adapters = AdapterSet.create(model, theirs, _ON_TOP)
    if given.adapter is not None:
        adapters.load(TEACHER, given.adapter)
    logger.info("the teacher %s is loaded beside the student's base", given.name)
    return _beside(adapters, None if given.adapter is None else TEACHER, student, record, device)


def check_vocabularies(student: Any, teacher: Any, ours: int, theirs: int, where: str) -> None:
    """Refuse a teacher whose distributions are over other tokens.

    Args:
        student, teacher: their tokenizers.
        ours, theirs: the sizes of their vocabularies, in which the models may have more than the tokenizers.

    Raises:
        UserError: in what they differ.
    """
    if ours != theirs:
        raise UserError(where, f"its vocabulary has {theirs} tokens, and the student's has {ours}", _FAMILY)
    vocabularies = [_vocabulary(each) for each in (student, teacher)]
    if vocabularies[0] == vocabularies[1]:
        return
    mine, its = vocabularies
    other = sorted(token for token in {**mine, **its} if mine.get(token) != its.get(token))
    words = [f"{each!r} is {mine.get(each, 'none')} here and {its.get(each, 'none')} there" for each in other[:_SHOWN]]
    raise UserError(
        where, f"{len(other)} of its tokens have other ids than the student's ({', '.join(words)})", _FAMILY
    )


def check_teacher(source: TeacherSource, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """What `open_teacher` would refuse, found without a weight being read.

    Args:
        base, tokenizer: the student's.

    Raises:
        UserError: as it.
    """
    theirs = source.outline(base)
    if theirs is None:
        return
    if theirs.tokenizer is None:
        raise UserError(source.where, f"{source.name} has no tokenizer", "take a teacher that has one")
    size = theirs.config.get_text_config().vocab_size
    check_vocabularies(tokenizer, theirs.tokenizer, vocabulary_size(base), size, source.where)


def check_teachers_context(teacher: Teacher, longest: int, where: str) -> None:
    """Refuse rows that are longer than the teacher can read.

    Args:
        longest: tokens of the longest row, with its reply.

    Raises:
        UserError: there are such rows.
    """
    limit = positions(teacher.trunk.adapters.causal.config) if teacher.beside else None
    if limit is not None and longest > limit:
        said = f"it reads {limit} positions at most, and a prompt with its reply may have {longest}"
        raise UserError(where, said, "shorten the data's prompts, or max_new_tokens")


@contextmanager
def _placed(where: str) -> Generator[None]:
    """Within it, what is wrong with a base is said of the teacher."""
    try:
        yield
    except UserError as error:
        if not error.where.startswith("model."):
            raise
        raise UserError(where, error.problem, error.remedy) from error


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Token to id, without PAD, which no distribution is taken at and loading may have added."""
    return {token: i for token, i in tokenizer.get_vocab().items() if token != tokenizer.pad_token}


def _size(adapters: AdapterSet) -> int:
    return adapters.causal.config.get_text_config().vocab_size


def _record(source: TeacherSource, base: Base) -> dict[str, Any]:
    """What a lineage says: the adapter and its hash, or the model with its revision and hash."""
    if source.adapter is None:
        return {"model": source.model, "revision": base.revision, "sha256": base.sha256}
    return parent_entry(source.adapter, source.adapter)


def _role(source: TeacherSource, adapters: AdapterSet) -> str | None:
    """The adapter under which the student's own base is the teacher, loaded where it is not there yet."""
    if source.adapter is None:
        return None
    if TEACHER not in adapters.names:
        adapters.load(TEACHER, source.adapter)
    elif adapters.digest(TEACHER) != adapter_sha256(source.adapter):
        raise UserError(source.where, "the adapters hold another teacher already", "start from a fresh AdapterSet")
    return TEACHER


def _in_memory(
    model: AdapterSet | PreTrainedModel | PeftModel,
    student: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    device: torch.device,
) -> Teacher:
    """A model that somebody has loaded; whether its tokens are the student's only its vocabulary's size can tell."""
    lora = None if isinstance(model, AdapterSet | PeftModel) else _ON_TOP
    adapters = open_policy(model, tokenizer, lora, None, _IN_MEMORY)[0]
    if _size(adapters) != _size(student.adapters):
        said = f"its vocabulary has {_size(adapters)} tokens, and the student's has {_size(student.adapters)}"
        raise UserError(_IN_MEMORY, said, _FAMILY)
    return _beside(adapters, DEFAULT if lora is None else None, student, record, device)


def _beside(
    adapters: AdapterSet, role: str | None, student: Trunk, record: Mapping[str, Any], device: torch.device
) -> Teacher:
    for parameter in adapters.model.parameters():
        parameter.requires_grad_(False)
    adapters.model.eval()
    if getattr(adapters.causal, "hf_quantizer", None) is None:
        adapters.model.to(device)  # pyright: ignore[reportArgumentType]: transformers' decorator keeps `self` an argument
    return Teacher(Trunk(adapters, student.temperature, student.autocast), role, record, beside=True)
