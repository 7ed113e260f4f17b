"""What each key of a recipe means, in a line: for editors (recipe.schema.json) and the reference (docs/recipes.md).

A method's parameters say it themselves (`stages/kinds.py`), and so do the fields of `train` (`stages/fields.py`). A
part or a key without its line, and a line without its key, fail a test. Imports nothing.
"""

from collections.abc import Mapping

Meanings = Mapping[str, Mapping[str, str]]

_ADAPTER = {
    "r": "Rank: how many directions each adapted matrix may move in.",
    "alpha": "The adapter's output is scaled by alpha / r.",
    "dropout": "Share of the adapter's inputs that are left out in training.",
    "target_modules": "Layers that get an adapter: all-linear, a list of names, or a regular expression for "
    "whole paths.",
    "use_rslora": "Scale by alpha / sqrt(r) instead.",
    "use_dora": "Train a magnitude of each output beside its direction (DoRA); slower.",
    "init_lora_weights": "Where an adapter starts that starts from the base: true, gaussian, orthogonal, pissa, "
    "pissa_niter_N, olora. The last three have twice the rank, of which half trains.",
    "rank_pattern": "Ranks of modules whose names match, such as {down_proj: 8}.",
    "alpha_pattern": "The same for alpha.",
    "exclude_modules": "Target modules that get none: a list of names, or a regular expression for whole paths.",
    "layers_to_transform": "The numbers of the layers that get adapters, from 0. Default: all.",
    "layers_pattern": "The name of the list of layers, where PEFT does not know it.",
    "target_parameters": "Stacked weights of experts that get adapters too, such as mlp.experts.down_proj.",
    "trainable_token_indices": "Ids of tokens whose rows of the embedding train too (and of the output head, where it "
    "is the same weight), or such ids by the names of embedding and head.",
}
_SOURCE = {
    "path": "A file (.jsonl, .json, .csv, .tsv, .parquet, also .gz), a folder of such files, or a hub id.",
    "split": "The split of a dataset. Default: `train` where there is one.",
    "columns": "Our name of a field: the file's name, for fields that are not recognised.",
    "name": "The configuration of a dataset on the hub.",
    "revision": "The revision of a dataset on the hub.",
    "streaming": "Of a dataset on the hub: its rows are read as they come, and no copy of it is made.",
}

MEANINGS: Meanings = {
    "Recipe": {
        "name": "The run's name; its folder is runs/NAME.",
        "seed": "Of everything that is drawn, where a part says no other.",
        "seeds": "Every stage without a seed of its own once for each, such as [0, 1, 2]: dpo-seed0, dpo-seed1, ...",
        "expanded": "Written into a run's recipe: the stages that seeds and grids made of one.",
        "deterministic": "A GPU's kernels give the same bits every time, at a price in speed; a CPU's do anyway.",
        "trackers": "tensorboard, trackio, wandb, or others that Transformers reports to: told of all stages, and the "
        "three of the evaluation.",
        "checkpoints": "When a stage saves what it continues from.",
        "model": "The frozen base.",
        "lora": "The adapter that every stage trains, but for those with full: true.",
        "data": "Name: data entry. Stages refer to entries by their names.",
        "stages": "Name: stage. Their order in the file means nothing.",
        "eval": "What is measured at the end. Without it nothing is.",
    },
    "Model": {
        "base": "A hub id, a folder, a .gguf file, pypi:DIST==VERSION, or random:NAME.",
        "revision": "The revision of a base on the hub.",
        "dtype": "auto: bfloat16 where the device computes in it, else float32; a run keeps that of its first start.",
        "quantization": "Hold the base's linear layers in 4 bits (nf4) or 8, packed by bitsandbytes, on GPU or CPU.",
        "chat_template": "A file, Jinja text, or a name among the tokenizer's templates. Default: its own.",
        "template_date": "The day that a chat template writes which writes today's. Default: that of the first start.",
        "packed": "Leave out padding and repeated prefixes in forwards. The numbers are the same.",
        "add_tokens": "New special tokens, such as [<|think|>]: their rows of the embedding and of the output head "
        "train in every stage.",
    },
    "Lora": _ADAPTER,
    "LoraChange": {
        **_ADAPTER,
        "r": "Rank; not below the parent's.",
        "alpha": "Scale; alpha / r stays the parent's where the stage starts from an adapter.",
    },
    "Source": {
        **_SOURCE,
        "weight": "This source's share of the mixture, relative to the other weights.",
        "limit": "Use only that many rows, the first usable ones.",
    },
    "OnProblem": {
        "malformed": "Broken JSON, no object, or a field that is missing or holds something else. Default: error.",
        "template": "The chat template refuses the conversation or leaves a part of it out. Default: error.",
        "unusable": "Nothing is to be learnt: an empty prompt or reply, two equal sides, a tie. Default: drop.",
        "repeated": "The prompt has been seen before. Default: keep.",
    },
    "Data": {
        **_SOURCE,
        "stage": "A stage of kind sample, whose rows are read, in place of a path.",
        "sources": "Several sources in place of one path, mixed by their weights.",
        "limit": "Rows in all, after mixing.",
        "max_prompt_length": "Tokens of the prompt.",
        "max_length": "Tokens of prompt and reply together.",
        "overflow": "What becomes of a row beyond these lengths.",
        "on_problem": "What becomes of rows with something wrong; every one is counted and named.",
        "held_out": "Share of the prompts that are kept out of training, to evaluate on.",
        "system": "A system message for rows that have none.",
        "seed": "Of the mixing and of what is held out. Default: the recipe's.",
    },
    "Reward": {
        "kind": "What scores: a kind of judge that scores one reply, with its fields (see Judges). stage, model and "
        "function say theirs by themselves.",
        "name": "Its name in messages.",
        "stage": "A reward stage of this recipe.",
        "model": "A sequence-classification model with one output: a folder or a hub id.",
        "function": "A Python function, module:name, with TRL's reward-function signature.",
        "weight": "Factor of these scores in the sum.",
        "on_failure": "A reply that it fails to score: stop (default); skip, which leaves this source out for that "
        "reply; or the number that the reply gets.",
    },
    "Teacher": {
        "stage": "A stage of this recipe that speaks: its adapter lives on the base that the student has.",
        "adapter": "The folder of an adapter, of a stage or of plain PEFT.",
        "model": "A base as in model.base; text alone stands for {model: TEXT}.",
        "revision": "Of a model on the hub.",
    },
    "Stage": {
        "kind": "What kind of stage it is. Default: the stage's name.",
        "from": "The parent: a stage's name, base, or {adapter: PATH}. Default: the SFT stage, where there is one.",
        "data": "The name of a data entry, or {stage: NAME}: the rows that a stage of kind sample keeps.",
        "lora": "What this stage's adapter has otherwise.",
        "full": "Train all weights and no adapter (sft, reward, dpo, kto): what comes out is another recipe's base.",
        "seed": "Default: the recipe's.",
        "seeds": "This stage, and what comes from it, once for each: [0, 1, 2] makes dpo-seed0, dpo-seed1, dpo-seed2.",
        "grid": "Keys of the stage with lists of values, such as {beta: [0.03, 0.1]}: a stage for each combination.",
        "on_nonfinite": "A step whose loss or gradient is not finite: stop, or skip(N) for at most N of them.",
        "train": "Fields of the stage's TRL or Transformers config, by their own names.",
        "reward": "Where scores come from: a reward stage's name, one source, or a list of sources.",
        "teacher": "Whom it learns from: a hub id, a folder, or {stage: NAME}. Its tokens have the ids of the base's.",
        "kl": "The KL penalty. A number stands for {coef: NUMBER}.",
        "rollout": "A server that draws the replies, vLLM or SGLang: {engine: vllm, url: ...}.",
    },
    "Eval": {
        "prompts": "A data entry, or the name of one.",
        "policies": "Stages whose policies answer the prompts; base is the untrained base.",
        "reference": "The policy that the others are compared with.",
        "judges": "Who says which reply is better: a list of mappings with a kind.",
        "max_new_tokens": "Longest reply, in tokens.",
        "temperature": "Of the sampling; 0 takes the likeliest token.",
        "seed": "Default: the recipe's.",
        "kl": "Measure the KL from each policy to the reference.",
        "batch_size": "Replies drawn at once.",
        "beams": "Width of a beam search, with temperature: 0 and kl: false.",
        "rollout": "A server that draws the replies, as a stage's.",
        "over_optimisation": "Proxy and gold judge against KL, along PPO's way and with best of n.",
        "benchmarks": "Tasks of lm-eval that every policy and the base are asked.",
    },
    "Rollout": {
        "engine": "vllm or sglang.",
        "url": "Its address, such as http://127.0.0.1:8000.",
        "command": "How the evaluation starts it itself, such as /opt/vllm/bin/vllm serve; it ends with it.",
        "api_key_env": "The environment's variable that holds its key. Default: no key.",
        "concurrency": "Requests at a time.",
        "timeout": "Seconds for one request.",
        "retries": "After 429, 5xx or a failed connection, waiting longer each time.",
        "wait": "Seconds for which a server that went away is waited for.",
    },
    "OverOptimisation": {
        "gold": "The judge to believe, by its name.",
        "proxy": "The judge that was optimised for. Default: that of the reward stage which PPO trains on.",
        "policy": "Default: the first PPO stage.",
        "best_of": "Replies a prompt, of which the proxy picks the best.",
        "prompts": "At most so many.",
    },
    "Benchmarks": {
        "tasks": "lm-eval's names of tasks, groups or tags, or YAML files.",
        "limit": "Documents of each task. Default: all.",
        "num_fewshot": "Examples before a question, unless a task says that it has none. Default: the task's own.",
        "include_path": "A folder of further tasks. The Python in it runs.",
        "apply_chat_template": "Ask as in a chat.",
    },
    "Checkpoints": {
        "share": "After every such share of the stage's steps; null: not by steps.",
        "minutes": "At least every so many minutes; null: not by time.",
    },
}
"""A part's class in `recipes/schema.py` -> its key -> what it means. Every kind of stage is a `Stage`."""

PARTS: Mapping[str, tuple[str, str]] = {
    "Recipe": ("The top of the file", ""),
    "Model": ("model", "model"),
    "Lora": ("lora", "lora"),
    "Data": ("A data entry", "data.NAME"),
    "Source": ("A source of a mixture", "data.NAME.sources"),
    "OnProblem": ("Rows with something wrong", "data.NAME.on_problem"),
    "Stage": ("Every stage", "stages.NAME"),
    "LoraChange": ("A stage's own adapter", "stages.NAME.lora"),
    "Reward": ("A source of scores", "stages.NAME.reward"),
    "Teacher": ("A teacher", "stages.NAME.teacher"),
    "Eval": ("eval", "eval"),
    "Rollout": ("The evaluation's server", "eval.rollout"),
    "OverOptimisation": ("Over-optimisation", "eval.over_optimisation"),
    "Benchmarks": ("Standard benchmarks", "eval.benchmarks"),
    "Checkpoints": ("checkpoints", "checkpoints"),
}
"""A part -> its heading in the reference, and its place in a recipe."""

_SERVER = {
    "api_key_env": "The environment's variable that holds the key.",
    "concurrency": "Requests at a time. Default: 8.",
    "retries": "After 429, 5xx or a failed connection, waiting longer each time. Default: 6.",
    "timeout": "Seconds. Default: 120.",
    "cache": "The folder of kept answers. Default: eval-cache in the run folder; false: none are kept.",
}

JUDGES: Meanings = {
    "rubric": {"checks": "A list of checks, or a YAML file with one."},
    "verifier": {
        "check": "exact, numeric, regex, json, length, starts_with, ends_with, contains, excludes, no_code or tags.",
        "column": "exact, numeric: the data's column with the right answer, or a list of right ones; regex: what the "
        "pattern's first group must be.",
        "value": "exact, numeric: the right answer for every row, in place of a column.",
        "extract": "exact, numeric: where the answer stands, the first of these that the reply has: boxed, hash "
        "(####), answer (<answer>), last_line, last_number, all. Default: boxed, hash, answer, all or last_number.",
        "ignore_case": "exact, starts_with, ends_with, contains, excludes: case means nothing.",
        "ignore_punctuation": "exact: punctuation means nothing.",
        "tolerance": "numeric: how far the number may be off. Default: 0.",
        "relative_tolerance": "numeric: the same, as a share of the right number. Default: 0.",
        "percent": "numeric: 12% is 0.12. Default: the sign is passed over, and 12% is 12.",
        "decimal": "numeric: what stands before tenths, '.' (default) or ','; the other one stands between thousands.",
        "pattern": "regex: a regular expression of Python's.",
        "full": "regex: the whole reply is what the pattern describes. Default: it is found somewhere.",
        "schema": "json: a JSON schema, or a file with one. Default: any JSON will do.",
        "fenced": "json: one code block around it is allowed (default).",
        "unit": "length: words (default), characters or tokens.",
        "min": "length: at least so many.",
        "max": "length: at most so many.",
        "values": "starts_with, ends_with: one of these texts; contains: each of them; excludes: none.",
        "tags": "tags: their names, in order. Default: think, answer.",
    },
    "reward": {
        "stage": "A reward stage of this recipe; or",
        "adapter": "the folder of a reward adapter on the same base.",
    },
    "function": {"function": "module:name, with TRL's reward-function signature."},
    "human": {"votes": "A file of votes, as `preftune chat --compare` writes it."},
    "model": {
        "model": "A sequence-classification model with one output: a folder or a hub id.",
        "batch_size": "Rows in one forward.",
    },
    "http": {
        "url": "Where prompts, completions and columns are posted.",
        "format": "plain (default), openrlhf (as its remote_rm_url is asked), verl (as its compute_score is called).",
        "column": "The data's column that is openrlhf's labels, verl's ground_truth.",
        "batch_size": "Replies in a request. Default: 32; verl's has one.",
        **_SERVER,
        "api_key_env": "The environment's variable that holds a key, sent as a bearer token. Default: none is sent.",
    },
    "endpoint": {
        "url": "What comes before /chat/completions.",
        "model": "The model's name there.",
        "mode": "pairwise: which of two replies is better, asked in both orders (a judge's default); score: one reply, "
        "1 to 10 (a reward's).",
        "criteria": "What makes a reply better, in words; or",
        "criteria_column": "the data's column that says it, row by row; or",
        "prompt": "the instruction in place of ours, text or a file; {column} stands for the row's. The form of the "
        "verdict is added.",
        "parameters": "Fields of the request; null leaves one out.",
        **_SERVER,
        "price_per_million": "{input: ..., output: ...}: tokens' price; the cost is then reported.",
    },
}
"""A kind of judge -> its field -> what it means."""
