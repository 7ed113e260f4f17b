"""`preftune ui`: everything is checked, then the page is served."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ...errors import UserError
from ...eval.spec import EvalSpec
from ...progress import say
from ...recipes.schema import Recipe
from ..policies import finished_policies, recipe_base, run_recipe, sampling_spec
from ..process import quiet_libraries
from ..status import AT_WORK, status_of
from .options import MAX_NEW_TOKENS, UiOptions
from .server import address, application, bound, is_loopback, new_token, quiet_gradio, serve


def ui_run(run: Path, options: UiOptions) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: no run, no policy in it and none to come, an option that does not fit, the extra is not installed,
            or the port cannot be had.
    """
    recipe = run_recipe(run)
    _check(recipe, run, options)
    listening = bound(options.host, options.port)
    try:
        quiet_libraries()
        quiet_gradio()
        from .booth import Booth
        from .desk import Desk
        from .labelling import Drawing, labelling_of
        from .model import Model
        from .page import Page

        spec = _spec(recipe, run, options)
        model = Model(recipe, run, spec)
        drawing = Drawing(labelling_of(recipe, run, options, spec), model) if options.label is not None else None
        desk = Desk(recipe, run, model, Booth(run), drawing, spec.seed)
        token = options.token or (None if is_loopback(options.host) else new_token())
        app = application(Page(desk).build(), run, options.host, token)
        print(address(options.host, listening.getsockname()[1], token), flush=True)
        say(f"the page of {run}; Ctrl-C ends it")
        if drawing is not None:
            drawing.begin()
        serve(app, listening)
        if drawing is not None:
            drawing.end()
    finally:
        listening.close()


def _check(recipe: Recipe, run: Path, options: UiOptions) -> None:
    """Raises UserError for what can be said before anything is loaded."""
    if find_spec("gradio") is None:
        raise UserError("preftune ui", "needs gradio", "pip install 'preftune[ui]'")
    if options.label is None:
        for name in ("policies", "replies"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}", "means nothing without --label", "leave it out: the page asks")
    if options.token is not None and not options.token.strip():
        raise UserError("--token", "is empty", "leave it out: one is made where it is needed")
    if not finished_policies(recipe, run) and status_of(run).state != AT_WORK:
        raise UserError(str(run), "no policy is finished in it", f"train one: preftune run {run / 'recipe.yaml'}")


def _spec(recipe: Recipe, run: Path, options: UiOptions) -> EvalSpec:
    """How replies are drawn: as the evaluation's, but for what the options say."""
    spec = sampling_spec(recipe, recipe_base(recipe), run)
    given = {"temperature": options.temperature, "seed": options.seed}
    changed = {name: value for name, value in given.items() if value is not None}
    if options.temperature is not None:
        changed["beams"] = 1
    if options.system is not None:
        changed["prompts"] = replace(spec.prompts, system=options.system or None)
    return replace(spec, max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS, **changed)
