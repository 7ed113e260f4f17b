"""Several processes that each have replies of their own, and a source that the first asks for all; no model.

    accelerate launch ... asking_worker.py OUT URL

What each process got, or was told, is written into OUT, one file a process.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from preftune.errors import UserError
from preftune.stages.ppo.rewards import RewardSource, text_source
from preftune.stages.processes import Processes
from preftune.stages.scorers.replies import Replies


def replies(place: int, count: int) -> Replies:
    """Those of one of `count` processes: "same" and a column are everywhere, and one process has a column more."""
    texts = [f"reply {place}", "same", f"a longer reply {place}", "bad" if place == count - 1 else "good"]
    columns: dict[str, Any] = {"answer": [place] * 4} | ({"note": ["x"] * 4} if place else {})
    return Replies(["q"] * 4, texts, columns, rows=[4 * place + i for i in range(4)])


def asked(url: str, folder: Path | None, these: Processes | None, mine: Replies, **more: Any) -> Any:
    """The scores, NaN as None; or the error's words."""
    settings = {"url": url, "retries": 0, "batch_size": 3, **more.pop("settings", {})}
    source = RewardSource("http", "remote", settings=settings, run_dir=folder, **more)
    scorer = text_source(source, None, these).scorer
    try:
        return [None if math.isnan(score) else score for score in scorer(mine)]
    except UserError as error:
        return str(error)


def main(out: Path, url: str) -> None:
    these = Processes.all()
    mine = replies(these.rank, these.count)
    found: dict[str, Any] = {
        "scores": asked(f"{url}/lengths", None, these, mine),
        "kept": asked(f"{url}/lengths", out / "run", these, mine, settings={"batch_size": 64}),
        "kept before": asked(f"{url}/lengths", out / "run", these, mine),
        "stop": asked(f"{url}/refusing", None, these, mine),
        "skip": asked(f"{url}/refusing", None, these, mine, on_failure="skip"),
        # all that the last process has is refused, and not all that there is
        "number": asked(f"{url}/refusing", None, these, mine.take([3]), on_failure=-1.0),
        "nothing": asked(f"{url}/lengths", None, these, mine if these.rank == 0 else Replies([], [])),
    }
    (out / f"found{these.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)
    main(Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
