"""vLLM and SGLang: where they are asked what, in which words, and what their answers say. One small class each.

A request is for one reply: a request has one seed, which several prompts or samples in it would share. Every setting of
the sampling is said, because a server fills in what is left out from the model's `generation_config.json`.

Facts are those of vLLM 0.32 and of SGLang's native API (`/generate`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .settings import EngineName

Given = Mapping[str, Any]
"""An answer's JSON."""


@dataclass(frozen=True)
class Draw:
    """How a reply is drawn.

    Attributes:
        ends: a reply ends with one of these tokens, and with no other.
        temperature: divides the logits; 0: the likeliest token. top_k, top_p: 0 and 1: no cut.
    """

    max_new_tokens: int
    ends: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def scales(self) -> bool:
        """Whether the temperature changes a probability."""
        return self.temperature not in (0.0, 1.0)


@dataclass(frozen=True)
class Drawn:
    """A reply as a server gave it: ids and log-probs of its tokens, the ending one included.

    ended: it says that an ending token came. model: who it says has spoken; None: it does not say. prompt: what it says
    that it read; None: it does not say.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool
    model: str | None = None
    prompt: list[int] | None = None


@dataclass(frozen=True)
class Listing:
    """What a server has: its base's name, where it took it from, the longest row in tokens, adapters with their
    folders."""

    base: str
    root: str | None = None
    longest: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])


class Engine(Protocol):
    """What differs between servers. Bodies are JSON; readers raise ValueError, LookupError or TypeError for an answer
    of another shape.

    Attributes:
        says: where each thing is asked for. starts: with which start its log-probs are those at the temperature of the
            draw, and with which they are not, in words. forgotten: what an error says where an adapter is not loaded.
    """

    name: EngineName
    says: Mapping[str, str]
    starts: tuple[str, str]
    forgotten: str

    def draw(self, model: str, prompt: Sequence[int], draw: Draw, seed: int) -> dict[str, Any]:
        """One reply."""
        ...

    def drawn(self, given: Given) -> Drawn:
        """The reply."""
        ...

    def score(self, model: str | None, ids: Sequence[int]) -> dict[str, Any]:
        """Log-probs of a row's own tokens; model None: of the base."""
        ...

    def scores(self, given: Given, ids: Sequence[int]) -> list[float]:
        """Of each token but the first."""
        ...

    def spread(self, ids: Sequence[int], temperature: float) -> dict[str, Any]:
        """The base's likeliest next tokens at that temperature."""
        ...

    def spreads(self, given: Given) -> list[float]:
        """Their log-probs."""
        ...

    def not_ours(self, draw: Draw, scaled: bool) -> str | None:
        """Why log-probs of such a draw are not those of softmax(logits / temperature) before any cut; None: they are.

        Args:
            scaled: the server's are those at the draw's temperature.
        """
        ...


_MODELS = "/v1/models"


def listing(given: Given) -> Listing:
    """What `/v1/models` says, which both have: the base first, each adapter with its folder as its root."""
    rows = given["data"]
    base = next(row for row in rows if row.get("parent") is None)
    adapters = {str(row["id"]): str(row.get("root")) for row in rows if row.get("parent") is not None}
    longest = base.get("max_model_len")
    root = base.get("root")
    return Listing(str(base["id"]), None if root is None else str(root), longest, adapters)


def adapter_body(name: str, folder: str | None = None) -> dict[str, Any]:
    """To load an adapter from a folder, or without one to unload it: the same words for both."""
    return {"lora_name": name} | ({} if folder is None else {"lora_path": folder})


class VLLM:
    """`POST /v1/completions` with token ids; the answer's `model` is the adapter's name."""

    name: EngineName = "vllm"
    says: Mapping[str, str] = {
        "draw": "/v1/completions",
        "models": _MODELS,
        "load": "/v1/load_lora_adapter",
        "unload": "/v1/unload_lora_adapter",
    }
    starts: tuple[str, str] = ("--logprobs-mode processed_logprobs", "--logprobs-mode raw_logprobs (the default)")
    forgotten: str = "does not exist"

    def draw(self, model: str, prompt: Sequence[int], draw: Draw, seed: int) -> dict[str, Any]:
        return self._body(model, prompt, draw.temperature) | {
            "max_tokens": draw.max_new_tokens,
            "top_p": draw.top_p,
            "top_k": draw.top_k,
            "seed": seed,
            # it would end at its own base's ends as well
            "stop_token_ids": list(draw.ends),
            "logprobs": 0,
        }

    def _body(self, model: str | None, prompt: Sequence[int], temperature: float) -> dict[str, Any]:
        return {
            **({} if model is None else {"model": model}),
            "prompt": list(prompt),
            "max_tokens": 1,
            "n": 1,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def drawn(self, given: Given) -> Drawn:
        (choice,) = given["choices"]
        logprobs = [float(each) for each in choice["logprobs"]["token_logprobs"]]
        read = choice.get("prompt_token_ids")
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"the reply ended by {choice['finish_reason']!r}")
        ended = choice["finish_reason"] == "stop"
        return Drawn(list(choice["token_ids"]), logprobs, ended, str(given["model"]), read and list(read))

    def score(self, model: str | None, ids: Sequence[int]) -> dict[str, Any]:
        return self._body(model, ids, 0.0) | {"prompt_logprobs": 0}

    def scores(self, given: Given, ids: Sequence[int]) -> list[float]:
        (choice,) = given["choices"]
        told = choice["prompt_logprobs"][1:]
        return [float(each[str(token)]["logprob"]) for each, token in zip(told, ids[1:], strict=True)]

    def spread(self, ids: Sequence[int], temperature: float) -> dict[str, Any]:
        return self._body(None, ids, temperature) | {"logprobs": 5, "return_tokens_as_token_ids": True, "seed": 0}

    def spreads(self, given: Given) -> list[float]:
        (choice,) = given["choices"]
        return sorted(map(float, choice["logprobs"]["top_logprobs"][0].values()), reverse=True)[:5]

    def not_ours(self, draw: Draw, scaled: bool) -> str | None:
        if draw.scales and draw.cuts:
            return f"vLLM has none for a cut (top_k, top_p) at temperature {draw.temperature:g}"
        if draw.scales and not scaled:
            return f"it says those at temperature 1, and the draw's is {draw.temperature:g}"
        if draw.cuts and scaled:
            return "it says those after the cut (top_k, top_p)"
        return None


class SGLang:
    """`POST /generate` with `input_ids`; an answer does not say which adapter spoke, an unknown one is refused."""

    name: EngineName = "sglang"
    says: Mapping[str, str] = {
        "draw": "/generate",
        "models": _MODELS,
        "load": "/load_lora_adapter",
        "unload": "/unload_lora_adapter",
    }
    starts: tuple[str, str] = ("SGLANG_RETURN_ORIGINAL_LOGPROB unset", "SGLANG_RETURN_ORIGINAL_LOGPROB set")
    forgotten: str = "not loaded"

    def draw(self, model: str, prompt: Sequence[int], draw: Draw, seed: int) -> dict[str, Any]:
        sampling = self._sampling(draw.temperature) | {
            "max_new_tokens": draw.max_new_tokens,
            "top_p": draw.top_p,
            "top_k": draw.top_k or -1,
            "stop_token_ids": list(draw.ends),
            # obeyed with --enable-deterministic-inference; 31 bits of it
            "sampling_seed": seed % 2**31,
        }
        return self._body(model, prompt, sampling)

    def _sampling(self, temperature: float) -> dict[str, Any]:
        return {
            "max_new_tokens": 1,
            "n": 1,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_new_tokens": 0,
            # true would leave out stop_token_ids as well
            "ignore_eos": False,
        }

    def _body(self, model: str | None, prompt: Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
        adapter = {} if model is None else {"lora_path": model}
        return {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, **adapter}

    def drawn(self, given: Given) -> Drawn:
        meta = given["meta_info"]
        told = meta["output_token_logprobs"]
        how = meta["finish_reason"]["type"]
        if how not in ("stop", "length"):
            raise ValueError(f"the reply ended by {how!r}")
        return Drawn([int(each[1]) for each in told], [float(each[0]) for each in told], how == "stop")

    def score(self, model: str | None, ids: Sequence[int]) -> dict[str, Any]:
        return self._body(model, ids, self._sampling(0.0)) | {"logprob_start_len": 0}

    def scores(self, given: Given, ids: Sequence[int]) -> list[float]:
        told = given["meta_info"]["input_token_logprobs"]
        if [int(each[1]) for each in told] != list(ids):
            raise ValueError("it has read other tokens")
        return [float(each[0]) for each in told[1:]]

    def spread(self, ids: Sequence[int], temperature: float) -> dict[str, Any]:
        return self._body(None, ids, self._sampling(temperature)) | {"top_logprobs_num": 5}

    def spreads(self, given: Given) -> list[float]:
        told = given["meta_info"]["output_top_logprobs"][0]
        return sorted((float(each[0]) for each in told), reverse=True)[:5]

    def not_ours(self, draw: Draw, scaled: bool) -> str | None:
        if draw.scales and not scaled:
            return f"it says those at temperature 1, and the draw's is {draw.temperature:g}"
        return None


ENGINES: Mapping[EngineName, Engine] = {"vllm": VLLM(), "sglang": SGLang()}
"""By their names in a recipe."""
