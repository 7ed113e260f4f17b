"""YAML without tags that make objects, and within bounds: a few lines can stand for billions of values."""

from typing import Any

import yaml

MOST_CHARACTERS, MOST_VALUES, MOST_DEEP = 4_000_000, 20_000, 40
"""A recipe has thousands of characters and hundreds of values, and goes ten levels deep."""


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader whose merges do not multiply."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merged keys (`<<: *name`), each once: merges of merges can make billions of a few lines."""
        super().flatten_mapping(node)
        node.value = list({(key.tag, str(key.value)): (key, value) for key, value in node.value}.values())


def load_bounded(text: str) -> Any:
    """The values of one YAML document.

    Raises:
        yaml.YAMLError: broken, or past one of the bounds (values that aliases repeat count as often as they stand).
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"more than {MOST_CHARACTERS:,} characters")
    loader = BoundedLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except ValueError as error:  # a number or a day that is none
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _check(node: yaml.Node) -> None:
    ahead, seen = [(node, 0)], 0
    while ahead:
        each, depth = ahead.pop()
        seen += 1
        if depth > MOST_DEEP or seen > MOST_VALUES:
            raise yaml.YAMLError("nested too deeply, or too many values")
        if isinstance(each, yaml.SequenceNode):
            ahead += [(below, depth + 1) for below in each.value]
        elif isinstance(each, yaml.MappingNode):
            ahead += [(value, depth + 1) for _, value in each.value]
