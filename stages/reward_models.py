"""Whether a folder or a hub id is a model that can score replies, found from its config: no weight is loaded."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.auto import check_model, open_config, open_tokenizer
from ..models.quiet import quiet_transformers

_CLASSIFIER = "ForSequenceClassification"


def check_reward_model(target: str, where: str) -> None:
    """Look at what `ModelScorer` would load.

    Raises:
        UserError: no such folder, no config or tokenizer that can be read, no classifier with one output, no chat
            template.
    """
    named, remedy = Path(target).expanduser(), "name the folder or hub id of a sequence-classification model"
    # a hub id is NAME or OWNER/NAME; everything else can only have meant a folder
    local = named.is_absolute() or target.startswith((".", "~")) or target.count("/") > 1
    if local and not named.is_dir():
        raise UserError(where, f"no folder {target!r}", "correct the path")
    if named.is_dir():
        check_model(named, where)
    try:
        with quiet_transformers():
            config: Any = open_config(named, where)
            tokenizer: Any = open_tokenizer(named, where)
    except UserError:
        raise
    except Exception as error:  # the libraries refuse in every way there is
        said = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(where, f"{target!r} cannot be loaded ({said})", remedy) from error
    made = [name for name in config.architectures or () if not name.endswith(_CLASSIFIER)]
    if made:
        said = f"is a {made[0]}, which has no score: it would be made of random numbers"
        raise UserError(where, said, remedy)
    if config.num_labels != 1:
        said = f"the model has {config.num_labels} outputs, expected 1"
        raise UserError(where, said, "take a reward model with num_labels=1, or wrap this one in a function")
    if tokenizer.chat_template is None:
        said = "its tokenizer has no chat template and the prompts are conversations"
        raise UserError(where, said, "use a reward model with a template, or wrap it in a function")
