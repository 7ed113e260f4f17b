"""The sampling stage on a tiny model: what it draws, what it writes, how it goes on."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import preftune
from preftune import stopping
from preftune.errors import UserError
from preftune.files import CHECKPOINTS, METRICS, PROGRESS, ROWS, sha256_of
from preftune.models.base import Base
from preftune.models.lineage import adapter_sha256, read_lineage
from preftune.models.loading import load_model
from preftune.models.tokens import end_token_ids
from preftune.stages import trackers
from preftune.stages.job import CheckpointPlan, StageJob, Trackers
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.run import finished, run_stage
from preftune.stages.sample.drawn import kept_pieces
from preftune.stages.sample.keep import UNFINISHED

from .sample_rewards import number

Make = Callable[..., StageJob]
MODULE = f"{__package__}.sample_rewards"


@pytest.fixture
def sample_job(make_job: Make, sft_folder: Path) -> Make:
    """sample_job(name=..., rows=..., **settings of the stage) -> StageJob."""

    def make(name: str = "pairs", *, rows: list[dict] | None = None, rewards: Any = None, **settings: Any) -> StageJob:
        source = RewardSource("function", f"{MODULE}:scored") if rewards is None else rewards
        fields = {key: settings.pop(key) for key in ("checkpoints", "seed", "parent", "held_out") if key in settings}
        return make_job(
            "sample",
            name,
            rows=rows,
            rewards=tuple(source) if isinstance(source, list) else (source,),
            # three prompts fill a batch
            method={"n": 4, "max_new_tokens": 12, "unfinished": "keep", "batch_size": 12, **settings},
            **{"parent": sft_folder, **fields},
        )

    return make


def rows_of(job: StageJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output_dir / ROWS).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.checklist("K3")
def test_k03_pairs_are_the_best_and_the_worst_of_the_policys_own_replies(sample_job: Make) -> None:
    everything, pairs = sample_job("all", keep="all"), sample_job("pairs")
    metrics = [run_stage(each) for each in (everything, pairs)]
    replies = rows_of(everything)
    assert len(replies) == 12 * 4 == metrics[0]["replies"] == metrics[1]["replies"]
    assert [row["score"] for row in replies] == [number(row["completion"][0]["content"]) for row in replies]
    made = 0
    for row in rows_of(pairs):
        scores = [each["score"] for each in replies if each["prompt"] == row["prompt"]]
        assert (row["score_chosen"], row["score_rejected"]) == (max(scores), min(scores))
        assert number(row["chosen"][0]["content"]) == row["score_chosen"] > row["score_rejected"]
        assert row["place"] == int(row["prompt"][0]["content"].split()[-1].rstrip("."))
        made += 1
    assert made == metrics[1]["rows"] == metrics[1]["prompts"] - sum(metrics[1]["left_out"].values())
    assert metrics[1]["score_chosen"] == pytest.approx(sum(row["score_chosen"] for row in rows_of(pairs)) / made)


@pytest.mark.checklist("K10")
def test_k10_the_lineage_says_of_what_and_how_rows_were_made(sample_job: Make, sft_folder: Path) -> None:
    job = sample_job(seed=5)
    run_stage(job)
    lineage = read_lineage(job.output_dir)
    assert (lineage.stage, lineage.kind, lineage.seed) == ("pairs", "sample", 5)
    assert lineage.config["policy"]["sha256"] == adapter_sha256(sft_folder) == lineage.parents[0]["sha256"]
    (reward,) = lineage.config["rewards"]
    assert reward["sha256"] == sha256_of(Path(__file__).with_name("sample_rewards.py"))
    assert lineage.config["rows"] == {
        **{"file": ROWS, "sha256": sha256_of(job.output_dir / ROWS), "rows": len(rows_of(job))},
        "read_as": ["pair", "demo", "label", "prompt"],
    }
    assert lineage.config["method"]["n"] == 4 and lineage.config["method"]["temperature"] == 1.0
    assert len(lineage.data["fingerprint"]) == 64
    left = {each.name for each in job.output_dir.iterdir()}
    assert left == {ROWS, "metrics.json", "lineage.json", "log.jsonl", PROGRESS}  # the chain takes the last one away


@pytest.mark.checklist("K2")
def test_k02_rows_are_the_same_whatever_the_batch_and_the_pieces(sample_job: Make) -> None:
    found = {}
    for name, size, share in (("one", 1, 0.1), ("five", 5, 0.3), ("all", None, None)):
        job = sample_job(name, batch_size=size, checkpoints=CheckpointPlan(share=share))
        run_stage(job)
        found[name] = (job.output_dir / ROWS).read_bytes()
    assert len(set(found.values())) == 1


@pytest.mark.checklist("K2")
def test_k02_more_replies_begin_with_those_that_fewer_are(sample_job: Make) -> None:
    few, many, other = sample_job("few", keep="all", n=2), sample_job("many", keep="all"), sample_job("o", keep="all")
    for each in (few, many):
        run_stage(each)
    texts = [[row["completion"] for row in rows_of(job) if row["draw"] < 2] for job in (few, many)]
    assert texts[0] == texts[1]
    # two replies to a prompt are two draws, and another seed's are others
    assert len({json.dumps(each) for each in texts[0]}) > 12
    other = sample_job("o", keep="all", n=2, seed=1)
    run_stage(other)
    assert [row["completion"] for row in rows_of(other)] != texts[0]


@pytest.mark.checklist("K1")
def test_k01_the_parents_policy_answers(sample_job: Make) -> None:
    ours, base = sample_job("ours", keep="all"), sample_job("base", keep="all", parent=None)
    for each in (ours, base):
        run_stage(each)
    assert (ours.output_dir / ROWS).read_bytes() != (base.output_dir / ROWS).read_bytes()
    assert read_lineage(base.output_dir).config["policy"] == {"stage": "base", "sha256": base.base.sha256}


@pytest.mark.checklist("K1")
def test_k01_without_chance_its_replies_are_those_of_plain_transformers(
    sample_job: Make, base: Base, tokenizer: Any, sft_folder: Path
) -> None:
    """The first of all tokens each time, by the library's own loop on the library's own adapter."""
    job = sample_job(keep="all", n=1, top_k=1)
    run_stage(job)
    model = PeftModel.from_pretrained(load_model(base, packed=False), str(sft_folder)).eval()
    for row in rows_of(job):
        ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]])
        with torch.no_grad():
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                eos_token_id=end_token_ids(tokenizer, model), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        text = tokenizer.decode(said[0, ids.size(1) :], skip_special_tokens=True)
        assert row["completion"][0]["content"] == text


@pytest.mark.checklist("K6")
def test_k06_a_reply_has_ended_where_it_says_so_itself(sample_job: Make, tokenizer: Any) -> None:
    said: list[list[int]] = []

    def look(completion_ids: list[list[int]], **_: Any) -> list[float]:
        said.extend(completion_ids)
        return [float(len(each)) for each in completion_ids]

    whole = CheckpointPlan(share=None)
    job = sample_job("all", keep="all", rewards=RewardSource("function", look), checkpoints=whole)
    run_stage(job)
    rows = rows_of(job)
    ended = [each[-1] == tokenizer.eos_token_id for each in said]
    assert [row["finished"] for row in rows] == ended and 0 < sum(ended) < len(ended)
    assert [row["length"] for row in rows] == [len(each) for each in said]
    assert all(len(each) == 12 for each, at_an_end in zip(said, ended, strict=True) if not at_an_end)
    # the longest reply scores best, and is one that was cut
    best = sample_job("best", keep="best", unfinished="drop", rewards=RewardSource("function", look), checkpoints=whole)
    run_stage(best)
    chosen = {row["completion"][0]["content"] for row in rows_of(best)}
    assert chosen <= {row["completion"][0]["content"] for row in rows if row["finished"]}
    assert run_metrics(best)["left_out"][UNFINISHED] == len(ended) - sum(ended)


def run_metrics(job: StageJob) -> dict[str, Any]:
    return json.loads((job.output_dir / METRICS).read_text(encoding="utf-8"))


@pytest.mark.checklist("K7")
def test_k07_scores_of_a_reward_stage_are_those_that_it_gives_alone(
    sample_job: Make, make_job: Make, sft_folder: Path
) -> None:
    reward = make_job("reward", parent=sft_folder)
    run_stage(reward)
    job = sample_job("all", keep="all", rewards=RewardSource("stage", str(reward.output_dir)))
    run_stage(job)
    rows = rows_of(job)
    alone = preftune.load_reward(reward.output_dir).score(
        [row["prompt"] for row in rows], [row["completion"][0]["content"] for row in rows]
    )
    # a random model writes bytes that are no text; those of the others become the same ids again
    same = [i for i, row in enumerate(rows) if "\ufffd" not in row["completion"][0]["content"] and row["finished"]]
    assert same
    for i in same:
        assert rows[i]["score"] == pytest.approx(alone[i], abs=1e-4)
    assert read_lineage(job.output_dir).config["rewards"] == [
        {"stage": "reward", "weight": 1.0, "sha256": adapter_sha256(reward.output_dir)}
    ]


@pytest.mark.checklist("K7")
def test_k07_several_sources_are_summed_by_their_weights_and_none_is_no_zero(sample_job: Make) -> None:
    def halved(completions: list, **_: object) -> list[float | None]:
        return [len(each[0]["content"]) / 2 if len(each[0]["content"]) % 2 else None for each in completions]

    def never(completions: list, **_: object) -> list[None]:
        return [None] * len(completions)

    sources = [RewardSource("function", halved, 3.0), RewardSource("function", never)]
    job = sample_job(keep="all", rewards=sources)
    run_stage(job)
    for row in rows_of(job):
        length = len(row["completion"][0]["content"])
        assert row["score"] == (1.5 * length if length % 2 else None)


@pytest.mark.checklist("K3")
def test_k03_a_reward_that_separates_nothing_is_an_error(sample_job: Make) -> None:
    job = sample_job(rewards=RewardSource("function", lambda completions, **_: [1.0] * len(completions)))
    with pytest.raises(
        UserError, match=r"stages\.pairs: keeps no row of 12 prompts \(12 prompts whose replies all sco"
    ):
        run_stage(job)
    assert not (job.output_dir / ROWS).exists()


@pytest.mark.checklist("K1")
def test_k01_prompts_that_are_held_out_are_not_answered(sample_job: Make) -> None:
    job = sample_job(keep="best", held_out=0.4)
    metrics = run_stage(job)
    assert metrics["prompts"] == metrics["data"]["train"]["used"] < 12


def test_reward_functions_get_prompts_columns_and_replies_in_their_own_form(sample_job: Make) -> None:
    seen: dict[str, Any] = {}

    def look(**given: Any) -> list[float]:
        seen.update(given)
        return [float(i) for i in range(len(given["completions"]))]

    rows = [{"prompt": f"Question {i}?", "answer": str(i), "place": i} for i in range(3)]
    job = sample_job(rows=rows, rewards=RewardSource("function", look), checkpoints=CheckpointPlan(share=None))
    run_stage(job)
    assert seen["answer"] == [str(i) for i in range(3) for _ in range(4)]
    assert seen["prompts"][4] == [{"role": "user", "content": "Question 1?"}]
    assert seen["completions"][0][0]["role"] == "assistant" and len(seen["completion_ids"]) == 12
    assert [row["answer"] for row in rows_of(job)] == ["0", "1", "2"]


@pytest.mark.checklist("K8")
def test_k08_a_stage_that_was_cut_off_draws_only_what_is_missing(
    sample_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLE_NOTES", str(tmp_path / "notes"))
    source, plan = RewardSource("function", f"{MODULE}:noted"), CheckpointPlan(share=0.25)
    whole, cut = (
        sample_job("whole", rewards=source, checkpoints=plan),
        sample_job("cut", rewards=source, checkpoints=plan),
    )
    run_stage(whole)
    calls = len((tmp_path / "notes").read_text().splitlines())
    assert calls == 4
    # as a kill leaves it: two pieces, and one that the disk lost a part of
    folder = cut.output_dir / CHECKPOINTS
    stop_after(cut, 3)
    assert [piece.end for piece in kept_pieces(folder)] == [3, 6, 9]
    last = max(folder.glob("replies-*.json"))
    last.write_bytes(last.read_bytes()[:-20])
    (tmp_path / "notes").unlink()
    run_stage(cut)
    assert [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()] == [[6, 7, 8], [9, 10, 11]]
    for name in (ROWS, "log.jsonl"):
        assert (cut.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


def stop_after(job: StageJob, pieces: int) -> None:
    """Run it, and ask it to stop when so many pieces are kept."""
    folder, asked = job.output_dir / CHECKPOINTS, stopping.requested

    def requested() -> int | None:
        return signal.SIGTERM if len(list(folder.glob("replies-*.json"))) >= pieces else asked()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "requested", requested)
        with pytest.raises(stopping.Stopped) as caught:
            run_stage(job)
    assert str(caught.value) == f"{job.name}: stopped by SIGTERM after prompt {3 * pieces} of 12"


@pytest.mark.checklist("K8")
def test_k08_a_changed_number_of_pieces_goes_on_behind_those_that_are_kept(sample_job: Make) -> None:
    first, whole = sample_job("cut", checkpoints=CheckpointPlan(share=0.25)), sample_job("whole")
    stop_after(first, 1)
    other = sample_job("cut", checkpoints=CheckpointPlan(share=None))
    run_stage(other)
    run_stage(whole)
    assert (other.output_dir / ROWS).read_bytes() == (whole.output_dir / ROWS).read_bytes()


@pytest.mark.checklist("K8")
def test_k08_a_piece_whose_numbers_went_bad_is_drawn_again(sample_job: Make) -> None:
    job = sample_job("cut", checkpoints=CheckpointPlan(share=0.25))
    stop_after(job, 2)
    folder = job.output_dir / CHECKPOINTS
    first = min(folder.glob("replies-*.json"))
    first.write_text(first.read_text().replace('"score": ', '"score": 1', 1))
    assert kept_pieces(folder) == []


def test_what_was_finished_and_not_moved_is_not_drawn_again(sample_job: Make) -> None:
    job = sample_job()
    metrics = run_stage(job)
    assert finished(job) == json.loads(json.dumps(metrics))
    with (job.output_dir / ROWS).open("a") as file:
        file.write("{}\n")
    os.utime(job.output_dir / ROWS, ns=(1, 1))
    assert finished(job) is None


def test_trackers_are_told_of_each_piece_once_and_of_what_was_kept(
    sample_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, dict[str, float]]] = []
    closed: list[bool] = []

    class Recorded:
        def __init__(self, folder, trackers, run, identity, config, settings) -> None:
            assert (run, config["kind"], config["n"], config["keep"]) == ("pairs", "sample", 4, "best_worst")
            assert not any(key.startswith("lora.") for key in config)
            self.identity = identity

        def write(self, step: int, values: dict[str, float]) -> None:
            told.append((self.identity, step, dict(values)))

        def close(self, failed: bool) -> None:
            closed.append(failed)

    monkeypatch.setattr(trackers, "_WRITERS", {"wandb": Recorded})
    plan = CheckpointPlan(share=0.25)
    job = dataclasses.replace(sample_job(checkpoints=plan), trackers=Trackers(("wandb", "mlflow"), "project", "group"))
    stop_after(job, 2)
    # the second piece was kept, and the stage stopped before it told of it
    assert [step for _, step, _ in told] == [3] and closed == [True]
    metrics = run_stage(job)
    assert closed == [True, False] and len({identity for identity, _, _ in told}) == 1
    # a row of the log each, and at the end what came of it
    logged = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    assert [step for _, step, _ in told] == [row["step"] for row in logged] + [12] == [3, 6, 9, 12, 12]
    for row, (_, _, values) in zip(logged, told[:-1], strict=True):
        assert values["train/objective/scores"] == row["objective/scores"]
        assert values["train/rollout/eos_rate"] == row["rollout/eos_rate"]
    last = told[-1][2]
    kept = {f"train/{name}": metrics[name] for name in ("prompts", "replies", "rows", "score", "length", "eos_rate")}
    assert last.items() >= kept.items() and last["train/score_chosen"] > last["train/score_rejected"]
    left = {f"train/left_out/{reason}": count for reason, count in metrics["left_out"].items()}
    assert last.items() >= left.items()
    assert (job.output_dir / "runs" / trackers.TOLD).is_file() and finished(job) is not None
