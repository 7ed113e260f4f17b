"""Which settings of decoding go together. Imports nothing heavy: a recipe is checked with it before anything trains."""


def beam_problem(beams: int, *, temperature: float, kl: bool, over_optimisation: bool) -> tuple[str, str] | None:
    """(what is wrong, what to do) where beam search stands beside what only random samples have; else None.

    Beam search finds one reply and draws none, as transformers' `generate(num_beams=4, do_sample=False)`: no
    temperature changes it, no KL can be estimated from it, and there is no second reply for best of n.
    """
    if beams == 1:
        return None
    idle = [
        (f"temperature {temperature:g}", "eval.temperature to 0", temperature > 0),
        ("kl", "eval.kl to false", kl),
        ("over_optimisation", "eval.over_optimisation to null", over_optimisation),
    ]
    found = [(said, remedy) for said, remedy, given in idle if given]
    if not found:
        return None
    said, remedies = zip(*found, strict=True)
    problem = f"{beams} beams search and draw nothing, so that {' and '.join(said)} would mean nothing"
    return problem, f"set {', '.join(remedies)}, or leave beams out"


def server_problem(beams: int, quantization: str | None) -> tuple[str, str] | None:
    """(what is wrong, what to do) where a server that draws replies stands beside what it does not do; else None."""
    if beams > 1:
        return f"a server draws, and {beams} beams search", "leave out beams, or rollout"
    if quantization is not None:
        said = f"a server has the base as it is, and the policies stand beside its {quantization} copy"
        return said, "leave out rollout: the replies would be another policy's"
    return None
