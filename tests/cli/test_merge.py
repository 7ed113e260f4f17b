"""What `preftune merge` says of the cost."""

from pathlib import Path

from preftune.cli.merge import cost_in_words
from preftune.models.base import Base
from preftune.models.merging import Cost, Merged

BASE = Base("b", Path("b"), None, "")


def test_what_a_merge_costs_is_said_and_float32_advised_where_it_does():
    dear = Merged(BASE, "bfloat16", Cost(100, 2.158, 2.175, 2.251, 0.2))
    words = cost_in_words(dear)
    assert "2.1580 nats a token in float32" in words and "2.1750 in training's dtype" in words
    assert "costs 0.093 nats a token; --dtype float32 keeps them" in words
    assert "--dtype" not in cost_in_words(Merged(BASE, "bfloat16", Cost(100, 2.158, 2.160, 2.161, 0.01)))
    assert "--dtype" not in cost_in_words(Merged(BASE, "float32", Cost(100, 2.158, None, 2.158, 0.0)))
    assert "not measured" in cost_in_words(Merged(BASE, "bfloat16"))
    assert "mean score" in cost_in_words(Merged(BASE, "bfloat16", Cost(8, 0.5, None, 0.6, 0.1), reward=True))
