"""The report's figures and numbers: where things are drawn, and what is said of them."""

import itertools
import re

import pytest
from matplotlib.ticker import MaxNLocator

from preftune.eval.report import axes, curves, frontier, lengths, lineage, reward_models, svg, text, winrates
from preftune.eval.report.read import Run, StageRecord, read_run
from preftune.stages.kinds import REWARD

from .fake_run import build_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(build_run(tmp_path_factory.mktemp("run")))


def points(figure: str, kind: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<polyline points="([^"]*)" class="{kind}[ "]', figure)
    pairs = [[pair.split(",") for pair in each.split()] for each in found]
    return [[(float(x), float(y)) for x, y in each] for each in pairs]


def test_numbers_in_words():
    given = (None, 3, 0.12345, 123456.7, 2.0, 1e-5, -1.5, float("nan"), True)
    assert [text.short(v) for v in given] == ["–", "3", "0.1235", "1.23e+05", "2", "1e-05", "−1.5", "–", "–"]
    assert [text.fixed(v, 2) for v in (-0.001, -1.005, 1234.5, None)] == ["0.00", "−1.00", "1,234.50", "–"]
    assert [text.percent(0.6649), text.percents(0.5, 0.75), text.percents(None, 1)] == ["66.5%", "50.0 to 75.0%", ""]
    assert [text.duration(s) for s in (9.26, 75.2, 7505)] == ["9.3 s", "1 min 15 s", "2 h 05 min"]
    assert [text.size(b) for b in (2.5e9, 12.3e6)] == ["2.50 GB", "12.3 MB"]
    assert [text.listed(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_elements_escape_what_they_are_given():
    assert (
        svg.tag("text", "<b>", class_='"', text_anchor="end")
        == '<text class="&#34;" text-anchor="end">&lt;b&gt;</text>'
    )
    with pytest.raises(ValueError, match="nan"):
        svg.line(float("nan"), 0, 1, 1, "axis")


def test_neighbouring_series_differ_in_shape_and_colour():
    marks = [svg.marker(place, 0, 0) for place in range(12)]
    shapes = [re.findall(r"^<(\w+)", mark)[0] for mark in marks]
    assert shapes[:4] == ["circle", "rect", "polygon", "polygon"]
    assert len(set(marks)) == 12


def test_axes_have_round_ticks_and_put_values_in_proportion():
    axis = axes.axis([0.12, 0.83], 100.0, 0.0)
    assert axis.ticks == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) or axis.ticks[0] <= 0.12
    assert (axis.at(axis.low), axis.at(axis.high)) == (100.0, 0.0)
    assert axis.at((axis.low + axis.high) / 2) == pytest.approx(50)
    assert axes.axis([3.0, 3.0], 0, 1).low < 3.0 < axes.axis([3.0, 3.0], 0, 1).high
    assert [axes.tick_label(t, (0.0, 0.25, 0.5)) for t in (0.0, 0.25)] == ["0.00", "0.25"]
    assert axes.tick_label(-2.0, (-2.0, 0.0)) == "−2"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.12, 0.83), (0.0, 1.0), (-3.7, 12.0), (1234.5, 1251.0), (2e-5, 3.1e-5), (-0.3, -0.1), (0.0, 7e6)],
)
@pytest.mark.parametrize("intervals", [3, 4, 5, 6])
def test_round_ticks_are_matplotlibs(low, high, intervals):
    theirs = MaxNLocator(nbins=intervals, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    assert axes.round_ticks(low, high, intervals) == pytest.approx(list(theirs), abs=1e-12 * (high - low))


def test_a_root_axis_puts_four_nats_half_way_to_sixteen():
    axis = axes.root_axis([16.0], 0.0, 300.0)
    assert axis.at(4.0) / axis.at(16.0) == pytest.approx(0.5)
    assert axis.ticks[0] == 0.0 and axis.label(5.0) == "5"
    places = [axis.at(tick) for tick in axis.ticks]
    assert all(b - a > 30 for a, b in itertools.pairwise(places))


def test_labels_keep_out_of_each_others_way():
    crowd = [(100.0, 100.0, "first"), (104.0, 103.0, "second"), (98.0, 105.0, "third")]
    spots = axes.place_labels(crowd, 300, 200)
    boxes = []
    for (x, y, anchor), (_, _, label) in zip(spots, crowd, strict=True):
        length = axes.CHARACTER * len(label)
        left = x - {"start": 0, "middle": length / 2, "end": length}[anchor]
        boxes.append((left, y - 10, left + length, y + 3))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_curves_leave_bookkeeping_out_and_count_episodes_where_there_are_any():
    log = [{"step": s, "grad_norm": 1.0, "loss": 2.0 - s, "epoch": s, "eval_runtime": 1, "odd": None} for s in (1, 2)]
    assert curves.read_curves(log) == ("steps", {"grad_norm": ([1, 2], [1, 1]), "loss": ([1, 2], [1, 0])})
    counted, found = curves.read_curves([{"step": 8, "episode": 32, "objective/kl": 0.5}, {"step": 8, "train_loss": 1}])
    assert (counted, found) == ("episodes", {"objective/kl": ([32.0], [0.5])})


def test_what_belongs_together_is_one_panel_and_the_rest_is_folded(run):
    ppo = next(stage for stage in run.stages if stage.name == "ppo")
    main, rest = curves.stage_curves(ppo.log)
    titles = [curve.title for curve in main]
    assert titles[:3] == ["Reward", "KL to the reference", "Entropy"] and "Clipped tokens" in titles
    assert {curve.title for curve in rest} == {"loss/policy_avg", "loss/value_avg", "lr"}
    clipped = next(curve for curve in main if curve.title == "Clipped tokens").figure
    assert len(points(clipped, "line")) == 2 and "dash1" in clipped and ">policy<" in clipped and ">value<" in clipped
    assert "policy from 0.14 to 0.05; value from" in clipped


def test_a_rising_curve_rises_and_a_long_one_is_thinned():
    (line,) = points(curves.draw("x", [("x", [1, 2, 3], [0.0, 1.0, 2.0])], "steps"), "line")
    assert [a[1] - b[1] for a, b in itertools.pairwise(line)] == [pytest.approx(line[0][1] - line[1][1], abs=0.2)] * 2
    assert line[0][1] > line[2][1] and line[0][0] < line[2][0]
    figure = curves.draw("<x>", [("x", list(range(5000)), [0.0] * 5000)], "steps")
    assert [len(each) for each in points(figure, "line faint")] == [200]
    assert "&lt;x&gt;" in figure and "<x>" not in figure
    assert curves.thin([0.0, 2.0] * 200) == [1.0] * 200


def test_the_graph_knows_what_comes_from_what(run):
    graph = lineage.stage_graph(run)
    found = {node.name: node for node in graph.nodes}
    assert {name: node.layer for name, node in found.items()} == {
        "base": 0, "sft": 1, "reward": 2, "dpo": 2, "ppo": 3, "kto": 2,
    }  # fmt: skip
    assert found["ppo"].parents == (("sft", False), ("reward", True))
    assert found["sft"].lines == ("600 rows · 1 min 08 s", "20" * 6)
    assert found["kto"].lines[0] == "failed"
    figure = lineage.draw_graph(graph, across=True)
    assert figure.count('class="edge"') == 5 and figure.count('class="edge dashed"') == 1
    assert "ppo comes from sft, scored by reward." in figure and "kto comes from sft (failed)." in figure
    # the edge from sft to ppo passes the middle layer where no box is
    (lane,) = graph.passes["sft", "ppo"]
    assert min(abs(lane - found[name].lane) for name in ("reward", "dpo", "kto")) > 0.5


def test_a_stage_that_only_the_recipe_knows_is_not_run():
    stages = (
        StageRecord("sft", "sft", "done", None, (("base", False),)),
        StageRecord("a", "dpo", "not run", None, (("b", False),)),
        StageRecord(
            "b", "dpo", "not run", None, (("a", False),)
        ),  # a circle, which no recipe may have, ends all the same
    )
    graph = lineage.stage_graph(Run("x", stages))
    assert [node.lines for node in graph.nodes][2:] == [("not run",), ("not run",)]
    assert "not run" in lineage.draw_graph(graph, across=False)


def test_an_interval_bar_is_drawn_where_it_lies():
    scale = axes.Axis(0.0, 1.0, 8.0, 172.0, ())
    bar = winrates.interval_bar(0, 0.5, 0.25, 0.75, scale, 0.5, "dpo wins", ("50%", "25 to 75%"))
    assert '<line x1="49" y1="11" x2="131" y2="11" class="range s0"/>'.replace("/>", "></line>") in bar
    assert 'aria-label="dpo wins"' in bar and '<circle class="mark s0" cx="90"' in bar


def test_the_heat_table_colours_by_distance_from_a_half():
    cell = {"ci_low": 0.55, "ci_high": 0.95, "n": 9}
    rows = [
        {"policy": "a", "against": {"b": cell | {"win_rate": 0.75}, "c": {"win_rate": None}}},
        {"policy": "b", "against": {"a": {"win_rate": 0.25, "ci_low": 0.05, "ci_high": 0.55}, "c": {"win_rate": 0.5}}},
    ]
    table = winrates.heat_matrix([*rows, {"policy": "c", "against": {}}], {"a": 0, "b": 1, "c": 2})
    assert table[0]["cells"][0] is None and table[0]["cells"][2] is None
    assert [table[0]["cells"][1][key] for key in ("side", "strength", "decided")] == ["wins", 13, True]
    assert [table[1]["cells"][0][key] for key in ("side", "strength", "decided")] == ["loses", 13, False]
    assert [table[1]["cells"][2][key] for key in ("side", "strength", "decided")] == ["even", 0, False]


def test_the_frontier_has_every_policy_its_error_bars_and_the_points_on_the_way(run):
    figures = dict(frontier.frontiers(run))
    assert list(figures) == ["rubric", "reward"]
    for figure in figures.values():
        assert len(re.findall(r'class="mark s\d"', figure)) == 4
        assert figure.count("mark s3 hollow") == 10 and figure.count("mark s4 hollow") == 6
        assert all(f">{name}</text>" in figure for name in ("base", "sft", "dpo", "ppo", "best of n"))
        # both errors of three policies; the reference has no distance from itself
        assert len(re.findall(r'class="error', figure)) == 7


@pytest.mark.parametrize(
    ("form", "alpha", "beta", "peak", "height"),
    [(frontier.BEST_OF_N, 2.0, 0.5, 2.0, 2.0), (frontier.RL, 2.0, 1.0, 2.718282, 2.718282)],
)
def test_fits_peak_where_their_slope_is_nought(form, alpha, beta, peak, height):
    fit = frontier.Fit(form, alpha, beta)
    assert fit.peak() == pytest.approx(peak, rel=1e-6)
    assert fit.gain(fit.peak()) == pytest.approx(height, rel=1e-6)
    assert fit.gain(peak * 0.99) < height > fit.gain(peak * 1.01)
    assert frontier.Fit(form, alpha, -0.1).peak() is None
    assert frontier.Fit(frontier.BEST_OF_N, 1.5, -0.25).formula() == "gain = d (1.5 + 0.25 d)"


def test_over_optimisation_starts_at_nought_and_names_the_peak(run):
    found = frontier.overoptimisation(run)
    assert found is not None
    assert (found["proxy"], found["gold"], found["prompts"]) == ("reward", "rubric", 64)
    gold = found["figures"][1][2]
    assert "peak, KL 8.9" in gold and "ppo, step 0: gain 0" in gold
    said = [words for words in found["peaks"] if words.startswith("ppo, gold")]
    assert said == ["ppo, gold (rubric): gain = d (0.09786 − 0.04676 log d); highest, 0.1395, at KL 8.9 nats."]
    assert any(words.endswith("no peak anywhere near what was measured.") for words in found["peaks"])
    empty = run.overoptimisation | {"methods": [{"method": "ppo", "points": [], "fit": None}]}
    assert frontier.overoptimisation(Run("x", (), overoptimisation=empty)) is None


def test_calibration_puts_every_bin_against_the_diagonal(run):
    rows = reward_models.reward_rows(run)
    assert [row["title"] for row in rows] == ["reward", "dpo (implicit reward)"]
    figure = reward_models.calibration("r", [
        {"low": 0.5, "high": 0.6, "n": 4, "confidence": 0.55, "accuracy": 0.55, "ci_low": 0.5, "ci_high": 0.7},
        {"low": 0.9, "high": 1.0, "n": 40, "confidence": 0.95, "accuracy": 0.95, "ci_low": None, "ci_high": None},
    ], 0)  # fmt: skip
    (way,) = points(figure, "way")
    x1, y1, x2, y2 = map(float, re.findall(
        r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="diagonal"', figure)[0])  # fmt: skip
    for x, y in way:
        assert (y - y1) / (y2 - y1) == pytest.approx((x - x1) / (x2 - x1), abs=2e-3)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="tally"', figure)]
    assert heights[1] == pytest.approx(10 * heights[0], rel=0.05)
    assert 'aria-label="reward: accuracy 91.5%, 95% interval 88.0 to 94.5%, longer wins 45.7%' in rows[0]["bar"]


def test_without_rewards_json_a_reward_stage_shows_its_own_held_out_pairs():
    metrics = {"held_out_accuracy": 0.9, "held_out_pairs": 47, "held_out_longer_wins": 0.4}
    (row,) = reward_models.reward_rows(
        Run("x", (StageRecord("rm", "reward", "done", None, (), metrics=metrics, record=REWARD),))
    )
    assert (row["stage"], row["accuracy"], row["n"], row["figure"]) == ("rm", 0.9, 47, None)


def test_lengths_share_their_axes_mark_the_limit_and_count_what_was_cut():
    samples = tuple(
        {"policy": policy, "prompt_index": i, "tokens": tokens, "finished": tokens < 64}
        for policy, counts in (("a", (10, 20, 30, 64)), ("b", (10, 10, 10, 10)))
        for i, tokens in enumerate(counts)
    )
    found = lengths.length_figures(Run("x", (), samples=samples, plan={"eval": {"max_new_tokens": 64}}))
    assert [(each.policy, each.n, each.median, each.cut) for each in found] == [("a", 4, 25, 0.25), ("b", 4, 10, 0)]
    a, b = (each.figure for each in found)
    assert a.count('class="bin cut s0"') == 1 and "cut" not in b.replace("cut at the limit", "")
    ticks = [re.findall(r'text-anchor="(?:middle|end)">([\d,%]+)<', figure) for figure in (a, b)]
    assert ticks[0] == ticks[1]
    assert all("limit 64" in figure for figure in (a, b))
