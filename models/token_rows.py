"""Single rows of the embedding and of the output head that train: PEFT's `trainable_token_indices`.

An adapter holds such rows whole, in the place of the base's and not added to them: it says the same on any base that
has rows of these numbers, whatever they hold. Where head and embedding are one weight, they have one set of rows.

PEFT's own forward makes a copy of the whole matrix at every call, and a gradient of its size. Here the rows are looked
up beside the base's, and the head's gradient is made for them alone (`logprobs.LmHead`); the numbers are the same.

Legend of shape suffixes: V vocabulary, K rows that train, H hidden size, N any number of tokens.
"""

import types
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from . import seams

with seams.importing(seams.TOKEN_ROWS):
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

PLACE = "lora.trainable_token_indices"
ROWS = "trainable_tokens_delta"
"""What such a layer trains, by PEFT's name."""

Asked = Mapping[str, Sequence[int]] | Sequence[int] | None
"""Ids of tokens, of the embedding (and of a head that is tied to it), or by the names of both."""


@dataclass(frozen=True)
class HeadRows:
    """The rows of a head that train: index_K are their ids, rows_KH what they hold."""

    index_K: Tensor
    rows_KH: Tensor


def check_asked(asked: Asked) -> None:
    """Ids as far as they can be right without a model.

    Raises:
        UserError: none, one below 0, or one twice.
    """
    if asked is None:
        return
    for name, ids in asked.items() if isinstance(asked, Mapping) else (("", asked),):
        said = f"{name}: " if name else ""
        if not len(ids):
            raise UserError(PLACE, f"{said}no id is given", "name the ids of tokens, or leave it out")
        if bad := [each for each in ids if each < 0]:
            raise UserError(PLACE, f"{said}{bad[0]} is no token's id", "count from 0")
        if twice := sorted({each for each in ids if list(ids).count(each) > 1}):
            raise UserError(PLACE, f"{said}{twice[0]} stands there twice", "name each id once")


def rows_for(model: PreTrainedModel, asked: Asked, added: Sequence[int] = ()) -> dict[str, list[int]] | None:
    """What PEFT is told for `model` (without adapters): the ids by the path of embedding and head; None for none.

    Where the two are one weight, the embedding's hold for both. A classifier has no head, and of one no rows.

    Args:
        added: ids of tokens that the base was given for this run, whose rows train in both.

    Raises:
        UserError: another module than these, other rows of a head than of the embedding that it is tied to, or ids
            that the embedding does not have.
    """
    if asked is None and not added:
        return None
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    paths = {path: each for path, each in model.named_modules() if each is table or (each is head and head is not None)}
    embedding = next(path for path, each in paths.items() if each is table)
    output = next((path for path, each in paths.items() if each is head), None)
    tied = output is not None and head is not None and head.weight is table.weight
    found: dict[str, set[int]] = {embedding: set(added)} | ({output: set(added)} if output and not tied else {})
    said = asked if isinstance(asked, Mapping) else {embedding: asked or ()}
    for name, ids in said.items():
        path = next((each for each in paths if each == name or each.endswith(f".{name}")), None)
        if path is None and output is None:
            continue
        if path is None:
            known = " and ".join(sorted(each.rpartition(".")[2] for each in paths))
            remedy = f"name ids alone, or by {known}"
            raise UserError(PLACE, f"{name!r} is neither the embedding nor the output head", remedy)
        found.setdefault(path, set()).update(ids)
    if tied and found.get(cast(str, output), found[embedding]) != found[embedding]:
        remedy = "name the same for both, or ids alone"
        raise UserError(PLACE, "other ids of the head than of the embedding, and the two are one weight", remedy)
    if tied:
        found.pop(cast(str, output), None)
    size = int(table.weight.shape[0])
    if beyond := sorted(each for ids in found.values() for each in ids if each >= size):
        said_ = f"{beyond[0]}, and the embedding has the rows 0 to {size - 1}"
        raise UserError(PLACE, said_, "add new tokens with model.add_tokens, which gives them rows")
    return {path: sorted(ids) for path, ids in found.items() if ids} or None


def check_fit(model: PreTrainedModel, asked: Asked, where: str) -> None:
    """A saved adapter's rows are rows of this model's embedding.

    Raises:
        UserError: one is beyond it.
    """
    table: Any = plain_table(model.get_input_embeddings())
    each = asked.values() if isinstance(asked, Mapping) else [asked or ()]
    size, highest = len(table.weight), max((number for ids in each for number in ids), default=-1)
    if highest >= size:
        said = f"holds the row {highest} of the embedding, and this base has {size}"
        raise UserError(where, said, "use the base that it was trained on, with the tokens that it was given")


def token_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    """The embedding and the head, where an adapter has rows of them; a head that is tied has none of its own."""
    layers = [each for each in model.modules() if isinstance(each, TrainableTokensLayer)]
    return [each for each in layers if each.tied_adapter is None]


def use_token_rows(model: nn.Module) -> None:
    """Give embedding and head, where adapters have rows of them, the forward of this file. Calling it twice changes
    nothing.

    Which adapter is active is looked at on each call; one without rows is answered with the base's.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            seams.require(seams.TOKEN_ROWS, module)
            module.get_merged_weights = types.MethodType(_weight, module)
            module.forward = types.MethodType(_forward, module)


def plain_table(module: Any) -> nn.Module:
    """An embedding or a head without what PEFT puts around it."""
    return module.token_adapter.get_base_layer() if isinstance(module, TrainableTokensWrapper) else module


def weight_of(module: Any) -> tuple[Tensor, HeadRows | None]:
    """The weight [V, H] of an embedding or a head under the adapter that is active, and the rows in it that train.

    Gradients reach those rows through it.
    """
    if not isinstance(module, TrainableTokensWrapper):
        return module.weight, None
    layer: Any = module.token_adapter
    names = _active(layer)
    weight = _weight(layer)
    if len(names) != 1 or not layer.trainable_tokens_delta[names[0]].requires_grad:
        return weight, None
    return weight, HeadRows(_index(layer, names[0]), layer.trainable_tokens_delta[names[0]])


@contextmanager
def rows_written(model: nn.Module, role: str | None) -> Generator[None]:
    """Within it the base's own embedding and head hold that adapter's rows; after it, what they held before, bit for
    bit. They stay where they are in memory."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for layer in token_layers(model):
            if role is None or role not in layer.trainable_tokens_delta:
                continue
            weight, index_K = cast(nn.Linear, layer.get_base_layer()).weight.data, _index(layer, role)
            held.append((weight, index_K, weight[index_K]))
            weight[index_K] = layer.trainable_tokens_delta[role].detach().to(weight)
        yield
    finally:
        for weight, index_K, before_KH in reversed(held):
            weight[index_K] = before_KH


def module_of(name: str) -> str:
    """The path of the embedding or head whose rows a saved tensor holds."""
    return name.removeprefix("base_model.model.").removesuffix(f".token_adapter.{ROWS}")


def row_ids(config: LoraConfig, path: str) -> list[int]:
    """The tokens whose rows an adapter holds of the embedding or head of that path."""
    asked = config.trainable_token_indices or []
    if not isinstance(asked, dict):
        return list(asked)
    return next((list(ids) for name, ids in asked.items() if path == name or path.endswith(f".{name}")), [])


def embed_rows(target_KH: Tensor, ids: Iterable[int], source_KH: Tensor, theirs: Iterable[int]) -> None:
    """Copy the rows of a parent into those of its child, by the tokens' ids; the child may have more."""
    place = {each: i for i, each in enumerate(ids)}
    with torch.no_grad():
        target_KH[[place[each] for each in theirs]] = source_KH.to(target_KH)


def copy_rows(model: nn.Module, source: str, target: str) -> None:
    """Where adapter `source` has rows, `target` gets exact copies of them."""
    with torch.no_grad():
        for layer in token_layers(model):
            held: Any = layer.trainable_tokens_delta
            if source in held and target in held:
                held[target].copy_(held[source])


def _active(layer: Any) -> list[str]:
    """The active adapters that have rows here."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]


def _index(layer: Any, name: str) -> Tensor:
    return torch.tensor(layer.token_indices[name], device=layer.get_base_layer().weight.device)


def _weight(self: Any, *_: object) -> Tensor:
    """The whole matrix [V, H], with the rows of the active adapters in it."""
    weight: Tensor = self.get_base_layer().weight
    for name in _active(self):
        weight = weight.index_copy(0, _index(self, name), self.trainable_tokens_delta[name].to(weight))
    return weight


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, names = self.get_base_layer(), _active(self)
    if not names:
        return base(x, *args, **kwargs)
    if isinstance(base, nn.Linear):
        # PEFT's own leaves a bias out
        return nn.functional.linear(x, _weight(self), base.bias)
    if type(base) is not nn.Embedding or len(names) > 1 or base.max_norm is not None or args or kwargs:
        return TrainableTokensLayer.forward(self, x, *args, **kwargs)
    rows_KH, index_K = self.trainable_tokens_delta[names[0]], _index(self, names[0])
    found_NH = base(x)
    place_V = torch.full((base.num_embeddings,), -1, device=x.device)
    place_V[index_K] = torch.arange(len(index_K), device=x.device)
    place_N = place_V[x]
    own_NH = nn.functional.embedding(place_N.clamp(min=0), rows_KH.to(found_NH.dtype))
    return torch.where((place_N >= 0)[..., None], own_NH, found_NH)
