"""`load_policy` and `load_reward`: a trained model in memory, to sample from, to score with, to measure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .prompts import Prompts, encode_as_they_stand, encode_prompts, encode_replies, listed
from .results import Generations, KLResult, Prompt, Scores
from .session import session
from .sources import Source, find_source, one_base

if TYPE_CHECKING:
    from ..eval.samples import EncodedPrompt, Sample
    from ..eval.workbench import Workbench


@dataclass(frozen=True, repr=False)
class Policy:
    """A policy in memory. Make one with `load_policy`.

    Attributes:
        source: where it comes from.
        bench: the base with its adapter; `bench.adapters.model` is the PEFT model, `bench.tokenizer` its tokenizer.
    """

    source: Source
    bench: "Workbench" = field(compare=False)

    @property
    def name(self) -> str:
        """The stage's name, or the model's."""
        return self.source.name

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        apply_chat_template: bool = True,
        quiet: bool = False,
    ) -> Generations:
        """One reply to each prompt.

        Args:
            prompts: a text, a list of texts and conversations (messages with `role` and `content`), or a `Path` of a
                data file. A text is one message of the user's, as in training.
            max_new_tokens: at most so many tokens a reply, the one that ends it included.
            temperature: 0 is greedy; above, replies are drawn.
            top_k, top_p: draw from the k likeliest tokens, from those that hold a share p of the probability.
            seed: with a prompt's place in the list it fixes what is drawn, whatever the batch size. For n replies to
                one prompt, let it stand n times in the list.
            batch_size: prompts decoded at once.
            apply_chat_template: False: texts are gone on with as they stand.
            quiet: show no progress.

        Raises:
            UserError: prompts that cannot be used or leave no room for a reply, or settings out of their range.
        """
        _check_sampling(max_new_tokens, temperature, top_k, top_p, batch_size)
        with session(quiet):
            if apply_chat_template:
                encoded = encode_prompts(self.bench, prompts, max_new_tokens)
            elif isinstance(prompts, Path):
                remedy = "read the texts yourself, and give a list"
                raise UserError("prompts", "is a data file, whose prompts are conversations", remedy)
            else:
                encoded = encode_as_they_stand(self.bench, prompts)
            drawn = _draw(
                self,
                encoded,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                batch_size=batch_size,
            )
        given = [each.messages for each in encoded] if isinstance(prompts, Path) else listed(prompts)
        return _generations(self.name, given, drawn)

    def __repr__(self) -> str:
        return f"Policy({self.name!r}, {str(self.source.folder or self.source.base.spec)!r})"


@dataclass(frozen=True, repr=False)
class RewardModel:
    """A reward stage in memory. Make one with `load_reward`.

    Attributes:
        source: where it comes from. bench: the base. role: the adapter's name on it, and its score head's.
    """

    source: Source
    bench: "Workbench" = field(compare=False)
    role: str = field(compare=False)

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.source.name

    def score(
        self, prompts: Generations | Sequence[Prompt] | str, completions: Sequence[str] | str | None = None
    ) -> Scores:
        """The raw reward of each reply; see `preftune.score`."""
        from ..eval.reward_scores import reward_scores

        texts = [completions] if isinstance(completions, str) else completions
        with session():
            if isinstance(prompts, Generations):
                if texts is not None:
                    raise UserError("completions", "are given, and generations have theirs", "leave them out")
                given, texts = list(prompts.prompts), list(prompts.completions)
                rows = [[*p, *c] for p, c in zip(prompts.prompt_ids, prompts.token_ids, strict=True)]
            elif texts is None:
                raise UserError("completions", "are missing", "give the replies, or the result of Policy.generate")
            else:
                given = listed(prompts)
                rows = encode_replies(self.bench, given, texts)
            values = reward_scores(self.bench.adapters, self.role, rows, self.bench.tokenizer.pad_token_id)
        return Scores(self.name, tuple(given), tuple(texts), tuple(values))

    def __repr__(self) -> str:
        return f"RewardModel({self.name!r}, {str(self.source.folder)!r})"


def load_policy(path: str | Path, name: str | None = None, *, dtype: str | None = None) -> Policy:
    """Load what a training made, on the GPU where there is one.

    Args:
        path: a run's folder, a stage's, that of any LoRA adapter of PEFT's, a merged model's, or a base as a recipe
            names it ("random:llama", a hub id).
        name: which stage of a run, or "base"; None: the last that is finished.
        dtype: "float32", "bfloat16" or "float16"; None: as it was trained, or as it is stored.

    Raises:
        UserError: no policy is there, or it does not belong to its base any more.
    """
    with session():
        source = find_source(path, name, dtype=dtype)
        return Policy(source, _open(source))


def load_reward(path: str | Path, name: str | None = None, *, dtype: str | None = None) -> RewardModel:
    """Load a reward stage: its folder, or a run's and which one where it has several.

    Raises:
        UserError: there is none, or it does not belong to its base any more.
    """
    with session():
        source = find_source(path, name, dtype=dtype, reward=True)
        bench = _open(replace(source, name="base", folder=None))
        role = bench.load(source.folder)
        if role is None or role not in bench.adapters.heads:
            raise UserError(str(source.folder), "has no score head", "name a stage of kind reward")
        return RewardModel(source, bench, role)


def score(
    reward: RewardModel | str | Path | tuple[str | Path, str],
    prompts: Generations | Sequence[Prompt] | str,
    completions: Sequence[str] | str | None = None,
) -> Scores:
    """The rewards that a reward stage gives to replies, in their order.

    >>> preftune.score("runs/x/reward", ["What is rust?"], ["Iron that met water."])

    Args:
        reward: a reward stage's folder, a run, (run, stage) where it has several, or what `load_reward` gave.
        prompts: texts or conversations; or the result of `Policy.generate`, whose very tokens are scored, so that a
            reply that was cut off has no end.
        completions: a reply for each prompt.

    Returns:
        Raw scores: only differences, of replies to the same prompt, mean something.

    Raises:
        UserError: no reward stage there, or replies that cannot be used.
    """
    model = reward if isinstance(reward, RewardModel) else load_reward(*named(reward))
    return model.score(prompts, completions)


def kl(
    policy: "Policy | str | Path | tuple[str | Path, str]",
    reference: "Policy | str | Path | tuple[str | Path, str] | None",
    prompts: Prompts,
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    dtype: str | None = None,
    quiet: bool = False,
) -> KLResult:
    """KL(policy || reference) in nats, on one reply to each prompt that the policy draws.

    Each step's KL is summed over the whole vocabulary, so it is exact for its reply, and negative by rounding alone.

    Args:
        policy, reference: what `load_policy` takes, (run, stage), or what it gave; None as the reference: their base.
            Both lie on one base.
        temperature: of both distributions and of the drawing; above 0.
        The others are those of `Policy.generate` and `load_policy`.

    Raises:
        UserError: they lie on two bases, or a temperature of 0, at which a distribution has no KL.
    """
    if temperature <= 0:
        raise UserError("temperature", f"is {temperature}, and greedy decoding has no KL", "set it above 0")
    _check_sampling(max_new_tokens, temperature, 0, 1.0, batch_size)
    from ..eval.kl import summarise

    with session(quiet):
        ours = policy if isinstance(policy, Policy) else load_policy(*named(policy), dtype=dtype)
        theirs = _reference(reference, ours, dtype)
        encoded = encode_prompts(ours.bench, prompts, max_new_tokens)
        drawn = _draw(
            ours, encoded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
        )
        spec = replace(ours.bench.spec, temperature=temperature)
        bench = replace(ours.bench, spec=spec)
        with bench.holding(theirs.folder) as role:
            values = bench.kls(ours.bench.roles[ours.name], role, drawn, f"{ours.name}: KL to {theirs.name}")
    found = summarise(values, [len(each.tokens) for each in drawn], temperature)
    given = [each.messages for each in encoded] if isinstance(prompts, Path) else listed(prompts)
    means = (found.per_sequence, found.per_sequence_se, found.per_token, found.per_token_se)
    generations = _generations(ours.name, given, drawn)
    return KLResult(ours.name, theirs.name, *means, temperature, tuple(values), generations)


def named(path: "str | Path | tuple[str | Path, str]") -> tuple[str | Path, str | None]:
    """A path, and the stage in it where it is a run's."""
    return (path[0], path[1]) if isinstance(path, tuple) else (path, None)


def _reference(
    reference: "Policy | str | Path | tuple[str | Path, str] | None", policy: Policy, dtype: str | None
) -> Source:
    if reference is None:
        return replace(policy.source, name="base", folder=None)
    if isinstance(reference, Policy):
        found = reference.source
    else:
        found = find_source(*named(reference), dtype=dtype or policy.source.settings["dtype"])
    one_base("kl", [policy.source, found])
    return found


def _open(source: Source) -> "Workbench":
    from ..eval.workbench import Workbench

    return Workbench.open(source.spec())


def _draw(policy: Policy, prompts: "Sequence[EncodedPrompt]", **settings: Any) -> "list[Sample]":
    from ..eval.samples import Sample
    from ..models.generate import sample
    from ..models.tokens import end_token_ids
    from ..progress import meter

    bench = policy.bench
    with meter(f"{policy.name}: replies", len(prompts)) as done:
        drawn = sample(
            bench.adapters,
            bench.roles[policy.name],
            [each.ids for each in prompts],
            eos_token_id=end_token_ids(bench.tokenizer, bench.adapters.model),
            pad_token_id=bench.tokenizer.pad_token_id,
            recompute=True,
            on_batch=done,
            **settings,
        )
    texts = [bench.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
    rows = enumerate(zip(prompts, texts, drawn.tokens, drawn.finished, strict=True))
    return [Sample(policy.name, place, prompt, text, ids, ended) for place, (prompt, text, ids, ended) in rows]


def _generations(name: str, prompts: Sequence[Prompt], drawn: "Sequence[Sample]") -> Generations:
    return Generations(
        name,
        tuple(prompts),
        tuple(each.completion for each in drawn),
        tuple(tuple(each.tokens) for each in drawn),
        tuple(each.finished for each in drawn),
        tuple(tuple(each.prompt.ids) for each in drawn),
    )


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float, batch_size: int) -> None:
    wrong = [
        ("max_new_tokens", max_new_tokens, "1 or more", max_new_tokens < 1),
        ("temperature", temperature, "0 or more", not 0 <= temperature < float("inf")),
        ("top_k", top_k, "0 (all) or more", top_k < 0),
        ("top_p", top_p, "more than 0 and at most 1", not 0 < top_p <= 1),
        ("batch_size", batch_size, "1 or more", batch_size < 1),
    ]
    for name, value, wanted, bad in wrong:
        if bad:
            raise UserError(name, f"is {value}, expected {wanted}", "correct it")
