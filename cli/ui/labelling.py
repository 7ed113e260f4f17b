"""`preftune ui RUN --label FILE`: the labelling that is asked for, and replies drawn to it while people vote."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ...eval.chat.labels import Labelling, Wish
from ...eval.chat.votes import messages_key
from ...progress import say
from ...recipes.build import data_spec, policy_folder
from ...recipes.schema import BASE, Data, Recipe
from ..policies import check_policy, last_policy
from .model import Model
from .options import UiOptions

if TYPE_CHECKING:
    from ...data.rows import Message
    from ...eval.spec import EvalSpec

_ROWS = 16
"""Replies that are drawn at once, at most: whoever chats meanwhile waits for so many."""


def labelling_of(recipe: Recipe, run: Path, options: UiOptions, spec: "EvalSpec") -> Labelling:
    """The labelling that the options ask for, all of it checked before a model is loaded.

    Args:
        spec: how replies are drawn.

    Raises:
        UserError: a file of prompts that cannot be read, an unknown policy, replies that would all be the same, or
            files in the run that something else wrote.
    """
    assert options.label is not None
    said = options.policies
    names = [last_policy(recipe, run)] if said is None else [name.strip() for name in said.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError("--policies", f"{said!r} names a policy twice, or none", "write them as sft,dpo")
    for name in names:
        check_policy(recipe, run, name, "--policies")
    replies = options.replies or (2 if len(names) == 1 else 1)
    if len(names) == 1 and replies < 2:
        raise UserError("--replies", "1 of one policy leaves nothing to choose from", "draw 2 or more, or name two")
    if replies > 1 and (spec.temperature == 0 or spec.beams > 1):
        how = "a beam search" if spec.beams > 1 else "temperature 0"
        raise UserError("--replies", f"{replies} replies with {how} are the same {replies} times", "draw with more")
    from ...models.lineage import adapter_sha256, base_info

    hashes = {name: None if name == BASE else adapter_sha256(policy_folder(recipe, run, name)) for name in names}
    labelling = Labelling(
        run=run,
        name=Path(options.label.name.removesuffix(".gz")).stem,
        prompts=_prompts(options.label, spec),
        policies=hashes,
        replies=replies,
        sampling={
            "temperature": spec.temperature,
            "max_new_tokens": spec.max_new_tokens,
            "beams": spec.beams,
            "seed": spec.seed,
        },
        base=base_info(spec.base),
    )
    labelling.check_places()
    return labelling


def _prompts(file: Path, spec: "EvalSpec") -> "dict[str, list[Message]]":
    """Key -> messages of the file's prompts.

    Raises:
        UserError: no such file, or a row that is no prompt, or too long for the model.
    """
    from ...data.encode import encode_prompts
    from ...data.load import load_rows
    from ...eval.samples import read_prompts
    from ...models.context import check_context
    from ...models.tokens import load_tokenizer

    if not file.is_file():
        raise UserError("--label", f"no file {str(file)!r}", "give a file of prompts (JSONL, CSV, Parquet)")
    data = replace(data_spec(Data(path=str(file.resolve())), spec.seed), system=spec.prompts.system)
    tokenizer = load_tokenizer(spec.base, spec.chat_template, spec.template_date)
    dataset, _ = encode_prompts(load_rows(data, "prompt").rows, tokenizer, data)
    check_context(dataset, spec.base, "--label", spec.max_new_tokens)
    return {messages_key(each.messages): each.messages for each in read_prompts(dataset)}


class Drawing:
    """Draws a labelling's replies in a thread, prompt by prompt, those that are missing.

    Attributes:
        trouble: why it ended early, in words; empty where it did not.
    """

    def __init__(self, labelling: Labelling, model: Model) -> None:
        self.labelling, self._model = labelling, model
        self.trouble = ""
        self._over = threading.Event()

    def begin(self) -> None:
        """Draw from now on, until all is drawn or the process ends."""
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Draw no more after the replies that are being drawn."""
        self._over.set()

    def waiting(self) -> str:
        """What people wait for, in words; empty where all is drawn."""
        if self.trouble:
            return f"No more replies are drawn: {self.trouble}"
        left = len(self.labelling.missing(self.labelling.drawn()))
        return f"{left} replies are still being drawn; the next ones come by themselves." if left else ""

    def _run(self) -> None:
        try:
            self.draw()
        except Exception as error:
            self.trouble = " ".join(str(error).split()) or type(error).__name__
            say(f"label: {self.trouble}")

    def draw(self) -> None:
        """Draw all that is missing.

        Raises:
            UserError: a policy was trained again since the labelling began, or its adapter is gone.
        """
        missing: dict[str, list[Wish]] = {}
        for wish in self.labelling.missing(self.labelling.drawn()):
            missing.setdefault(wish.prompt, []).append(wish)
        todo, done, width = list(missing.values()), 0, 1
        while todo and not self._over.is_set():
            batch, todo = todo[:width], todo[width:]
            for policy in self.labelling.policies:
                self._draw([wish for wishes in batch for wish in wishes if wish.policy == policy])
            done += len(batch)
            say(f"label: replies to {done} of {len(missing)} prompts drawn")
            # the first ballots are there soon, and the rest is drawn many at a time
            width = max(1, min(2 * width, _ROWS // self.labelling.replies))

    def _draw(self, wishes: list[Wish]) -> None:
        if not wishes:
            return
        labelling, policy = self.labelling, wishes[0].policy
        with self._model.talking([policy]) as (talk, hashes):
            if hashes[policy] != labelling.policies[policy]:
                said = "was trained again since this page was opened"
                raise UserError(str(labelling.run / policy), said, "open it again")
            asked = [labelling.prompts[wish.prompt] for wish in wishes]
            replies = talk.replies(policy, asked, [labelling.seed_of(wish) for wish in wishes])
        for wish, reply in zip(wishes, replies, strict=True):
            labelling.keep(wish, reply.text, reply.finished)
