"""What the figures come to: a few lines of text, and what of it must not be."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..measure import Measured

Found = Mapping[str, Measured]


def wrong(found: Found) -> list[str]:
    """What failed that has a right answer: tests of the card, the chain's numbers, attention's."""
    lines: list[str] = []
    for key, figures in found.items():
        if key.startswith("tests:"):
            lines += [f"{name}: {why}" for name, why in figures["failed"].items()]
        elif key.startswith("smoke chain:"):
            lines += [f"{place}: {cpu} on a CPU, {here} here" for place, (cpu, here) in figures["differ"].items()]
            lines += [f"{place}: not there" for place in figures["missing"]]
        elif key.startswith("attention:") and not figures["runs"]:
            lines.append(f"{key}: {figures['why_not']}")
    return lines


def tables(found: Found) -> str:
    """Everything in short, what belongs together one below the other."""
    return "\n".join([*_card(found), *_rollouts(found), *_training(found), *_chain(found)])


def _card(found: Found) -> Iterator[str]:
    if (each := found.get("card: matrix product")) is not None:
        yield f"bf16 product {each['tflops']:.0f} TFLOP/s"
    if (each := found.get("card: copy")) is not None:
        yield f"copy {each['gigabytes_per_second']:.0f} GB/s"
    for name, each in _named(found, "attention"):
        pieces, flex = each["pieces_ms"], each.get("flex_ms")
        yield f"attention {name}: " + (f"{flex:.2f} ms, " if flex else "does not run, ") + f"in pieces {pieces:.2f} ms"
    for name, each in _named(found, "tests"):
        said = f"{len(each['passed'])} passed, {len(each['failed'])} failed, {len(each['skipped'])} skipped"
        yield f"tests of {name} on the card: {said}"
    for _, each in _named(found, "smoke chain"):
        drawn = f"of {each['drawn']} that draw {each['drawn_differ']} differ"
        yield f"smoke chain: {len(each['differ'])} of {each['compared']} numbers are not the CPU's; {drawn}"


def _rollouts(found: Found) -> Iterator[str]:
    """Ours and the best of the peers, by base and rows; and the floor: a step reads every weight once."""
    copy = found.get("card: copy", {}).get("gigabytes_per_second")
    for base, rows, sides in _by_side(found, ", rollout, "):
        rates = {side: each["tokens_per_second"] for side, each in sides.items()}
        said = ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items())
        floor = ""
        if copy and (made := found.get(f"{base}: made")):
            floor = f"; weights read at a copy's rate {int(rows.split()[0]) * copy * 1e9 / made['bytes']:.0f}"
        yield f"{base}, rollout of {rows}, tokens/s: {said}" + _ratio(rates) + floor


def _training(found: Found) -> Iterator[str]:
    for key in dict.fromkeys(key.partition(": ")[0] for key in found if key.endswith((": ours", ": trl tuned"))):
        sides = dict(_named(found, key))
        rates = {side: each["examples_per_second"] for side, each in sides.items()}
        said = ", ".join(
            f"{side} {each['examples_per_second']:.1f} with {each['peak_memory_bytes'] / 1e9:.1f} GB "
            f"({each['attention']})"
            for side, each in sides.items()
        )
        yield f"{key}, examples/s: {said}" + _ratio(rates)


def _ratio(rates: Mapping[str, float]) -> str:
    peers = {side: rate for side, rate in rates.items() if side != "ours"}
    if "ours" not in rates or not peers:
        return ""
    best = max(peers, key=lambda side: peers[side])
    return f"; {rates['ours'] / peers[best]:.2f} x {best}"


def _chain(found: Found) -> Iterator[str]:
    for key, each in found.items():
        where, _, name = key.partition(": ")
        if "planned_bytes" in each:
            planned, measured = each["planned_bytes"] / 1e9, each["measured_bytes"] / 1e9
            yield f"{where}, {name}: {measured:.2f} GB, planned {planned:.2f} ({each['planned / measured']:.2f})"
        if name.endswith(" by phase"):
            parts = [
                f"{phase} {part['seconds']:.2f} s ({part['share']:.0%}"
                + (f", busy {part['busy']:.0%})" if part["busy"] else ")")
                for phase, part in each.items()
            ]
            yield f"{where}, {name}: {', '.join(parts)}"


def _named(found: Found, about: str) -> Iterator[tuple[str, Measured]]:
    for key, each in found.items():
        if key.startswith(f"{about}: "):
            yield key.removeprefix(f"{about}: "), each


def _by_side(found: Found, between: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(base, figure, sides) of keys `BASE<between>SIDE: FIGURE`."""
    grouped: dict[tuple[str, str], dict[str, Any]] = {}
    for key, each in found.items():
        about, _, name = key.partition(": ")
        if between in about:
            base, side = about.split(between)
            grouped.setdefault((base, name), {})[side] = each
    for (base, name), sides in grouped.items():
        yield base, name, sides
