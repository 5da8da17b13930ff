"""The configuration: YAML plus key=value overrides, parsed once, typed, unknown keys refused with the nearest known name. Imports no torch.

config = load_config("examples/demo/gorp.yaml", ["method.rank=4", "train.max_steps=10"])
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from . import suites
from .errors import ConfigError, nearest

# TrainingArguments that belong to the loop; a user who sets them would fight it
OWN_TRAIN_KEYS = {
    "output_dir": "use output_dir at the top level", "seed": "use seed at the top level", "data_seed": "use seed at the top level",
    "save_strategy": "take it out, a task is saved when it ends", "eval_strategy": "use the section evaluate", "optim": "use the section method",
    "report_to": "use report_to at the top level", "remove_unused_columns": "take it out", "push_to_hub": "take it out, nothing leaves this machine",
    "label_smoothing_factor": "take it out, the loss is the answer tokens' cross-entropy", "optim_target_modules": "use the method's module options",
    "fp16": "use bf16 (fp16 scales gradients, which methods read)",
    "save_steps": "use checkpoint_every at the top level", "save_total_limit": "take it out, the last complete checkpoint is kept",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"), "take it out, the model is trained as it is"),
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), "take it out; several processes hold a model each, or share one by sharding: fsdp2 at the top level"),
    "deepspeed": "take it out; several processes share a model by sharding: fsdp2 at the top level",
    **dict.fromkeys(("accelerator_config", "average_tokens_across_devices"), "take it out, a step is the mean over the answer tokens of all processes"),
    **dict.fromkeys(("eval_on_start", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval",
                     "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_eval", "do_predict"), "use the section evaluate"),
    **dict.fromkeys(("enable_jit_checkpoint", "save_on_each_node"), "use checkpoint_every at the top level"),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), "take it out, running again goes on exactly"),
    **dict.fromkeys(("log_level", "log_level_replica"), "take it out, --progress says what is shown"),
    "auto_find_batch_size": "set per_device_train_batch_size (a second attempt would go on from what the first has changed)",
    "optim_args": "use the section method", "debug": "take it out, its hooks would stay on the model", "label_names": "take it out, the labels are the answer's tokens",
    "save_only_model": "take it out, a checkpoint holds all it takes to go on", "resume_from_checkpoint": "take it out, running again resumes",
}  # fmt: skip
# the numbers of `train` that transformers reads without a look, and their least values; the others it checks itself
LEAST = {
    "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "num_train_epochs": 0.0,
    "max_steps": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 0.0,
}  # fmt: skip
# what a row of each format has
COLUMNS = {"classification": ("sentence", "label"), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}
HUB = r"hub:([^:@]+)(?:@([^:]+))?" + r"(?::([^:\[]+(?:\[[^\]]*\])?))?" * 2  # name, revision, then [config and] split, which may be a slice
POST = ("lines", "merge")  # methods that may be named as `post` of another: what they do comes after each task
METRICS = ("choice", "exact_match", "first_character", "rouge_l", "fuzz", "sari", "nll")
FUNCTION = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"  # module:function


def check_train(train: dict[str, Any]) -> dict[str, Any]:
    """Names that belong to the loop, and numbers that transformers reads without a look, refused with a ValueError."""
    for key in train:
        if key in OWN_TRAIN_KEYS:
            raise ValueError(f"train.{key} cannot be set; {OWN_TRAIN_KEYS[key]}")
    for key in LEAST.keys() & train.keys():
        kind = "a whole number" if isinstance(LEAST[key], int) else "a number"
        value = train[key]
        if isinstance(value, bool) or not isinstance(value, int if isinstance(LEAST[key], int) else (int, float)) or not value >= LEAST[key]:
            raise ValueError(f"train.{key} must be {kind}, at least {LEAST[key]:g}; got {value!r}")
    for key in {"adam_beta1", "adam_beta2"} & train.keys():
        if train[key] >= 1:
            raise ValueError(f"train.{key} must be below 1; got {train[key]!r}")
    for key in {"max_steps", "num_train_epochs"} & train.keys():
        if train[key] == 0:
            raise ValueError(f"train.{key}: 0 steps would commit a task that nobody trained")
    return train


def check_keep(keep: str) -> str:
    if keep not in ("all", "tagged") and not re.fullmatch(r"last [1-9]\d*", keep):
        raise ValueError(f"{keep!r}; one of: all, last N, tagged")
    return keep


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TaskConfig(_Model):
    """One task: either `suite` or `data`."""

    name: str
    suite: str | None = None
    """A task of a suite that comes with forgetless, e.g. demo/cities."""
    suite_options: dict[str, Any] = Field(default_factory=dict)
    data: str | None = None
    """Training rows: .jsonl, .json, .csv (each also as .gz), .parquet, or hub:OWNER/NAME[@REVISION][:CONFIG][:SPLIT]."""
    test: str | None = None
    """Test rows; without it 10 % of `data`, chosen by hash of the text."""
    dev: str | None = None
    """Rows for choosing settings; without it 10 % of the training rows, by another hash."""
    format: Literal["classification", "prompt_completion", "messages"] = "classification"
    labels: list[str] | None = None
    label_words: dict[str, str] | None = None
    """{very negative: terrible}: what the model says, and is scored on, in place of a label."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: {sentence: text} reads the column `text` as the sentence."""
    prompt: str | None = None
    max_text_tokens: int | None = Field(None, ge=1)
    """Longest text put in for {sentence}, in tokens; longer ones lose their end."""
    max_prompt_tokens: int = Field(512, ge=8)
    limit: int | None = Field(None, ge=1)
    """Use at most this many training rows, the same ones every time."""
    metric: str | None = None
    """How well an answer is scored: choice, exact_match, first_character, rouge_l, fuzz, sari, nll, or module:function, a function (prediction, answer) -> float
    from 0 to 1. Without it what the suite says, if it says anything."""
    train: dict[str, Any] = Field(default_factory=dict)
    """What differs from the section train for this task, such as {max_steps: 200}."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest generated answer; without it the longest answer of the scored rows and one token more."""

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
            raise ValueError(
                f"task name {name!r} becomes a folder name: letters, digits, '.', '_' and '-', starting with a letter or digit, at most 64, no '..'"
            )
        return name

    @field_validator("prompt")
    @classmethod
    def _holds_the_text(cls, prompt: str | None) -> str | None:
        try:
            if prompt is not None and "\0" not in prompt.format(sentence="\0"):
                raise KeyError("sentence")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(f"prompt {prompt!r} must contain {{sentence}} and no other braces (write {{{{ for a literal one)") from None
        return prompt

    @field_validator("data", "test", "dev")
    @classmethod
    def _a_source(cls, source: str | None) -> str | None:
        if source is not None and source.startswith("hub:") and not re.fullmatch(HUB, source):
            raise ValueError(
                f"{source!r}: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT, with @REVISION after NAME if wanted"
            )
        return source

    @field_validator("train", mode="before")
    @classmethod
    def _train(cls, train: Any) -> Any:
        if not isinstance(train, dict):
            return train
        for key in {"bf16", "use_cpu"} & train.keys():  # tasks learned before would be scored otherwise than they were
            raise ValueError(f"train.{key} is the same for all tasks of a run")
        return check_train(fix_yaml(train))

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in METRICS and not re.fullmatch(FUNCTION, metric):
            raise ValueError(f"there is no metric {metric!r}{nearest(metric, [*METRICS, 'module:function'])}")
        return metric

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.suite is None) == (self.data is None):
            raise ValueError(f"task '{self.name}': give either suite (a benchmark task such as demo/cities) or data (a file)")
        return self

    @model_validator(mode="after")
    def _nothing_ignored(self) -> TaskConfig:
        """A setting that would have no effect is a mistake, and the user should know."""
        if self.suite is not None:
            for key in ("test", "dev", "labels", "columns"):
                if getattr(self, key):
                    raise ValueError(f"task '{self.name}': {key} goes with data; a suite brings its own. Take it out")
            if self.format != "classification":
                raise ValueError(f"task '{self.name}': format goes with data; a suite brings its own. Take it out")
        known = COLUMNS[self.format]
        for column in self.columns:
            if column not in known:
                raise ValueError(
                    f"task '{self.name}': columns has no use for {column!r}; format {self.format} renames {', '.join(known)}, as in {{{known[0]}: text}}"
                )
        for key in ("labels", "label_words"):
            if getattr(self, key) is not None and self.format != "classification":
                raise ValueError(f"task '{self.name}': {key} go with format: classification, this one is {self.format}")
        for key in ("prompt", "max_text_tokens"):
            if getattr(self, key) is not None and self.format == "messages":
                raise ValueError(
                    f"task '{self.name}': {key} has no use with format: messages, where the chat template writes the prompt. Take it out"
                )
        if self.metric == "choice" and self.format != "classification":
            raise ValueError(
                f"task '{self.name}': metric: choice is among labels, and format: {self.format} has none; use exact_match, rouge_l or nll"
            )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task '{self.name}': labels names {max(self.labels, key=self.labels.count)!r} twice")
        if self.labels is not None:
            self.words(self.labels)
        return self

    @property
    def own_metric(self) -> str | None:
        """The metric that the entry or its suite names."""
        return self.metric or (suites.metric_of(self.suite) if self.suite else None)

    def words(self, labels: list[str]) -> list[str]:
        """What the model says for each of `labels`. Raises ValueError where label_words names another label, or two labels would share a word."""
        if self.label_words is None:
            return list(labels)
        for label, word in self.label_words.items():
            if label not in labels:
                raise ValueError(f"task '{self.name}': label_words: {label!r} is not a label{nearest(label, labels)}")
            if not word.strip():
                raise ValueError(f"task '{self.name}': label_words: the word for {label!r} is empty")
        words = [self.label_words.get(label, label).strip() for label in labels]
        seen: dict[str, str] = {}
        for label, word in zip(labels, words, strict=True):
            if (other := seen.setdefault(word.casefold(), label)) != label:
                raise ValueError(f"task '{self.name}': label_words: {other!r} and {label!r} would share the word {word!r}; words must differ")
        return words


class MethodConfig(BaseModel):
    model_config = ConfigDict(extra="allow")  # the rest are the method's own options, checked by the method
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EvaluateConfig(_Model):
    limit: int | None = Field(200, ge=1)
    """Rows a cell, the same seeded ones every time; null for all."""
    split: Literal["test", "dev"] = "test"
    unseen: bool = False
    """Also measure the untouched model and tasks not trained yet (forward transfer needs them)."""
    scorers: list[Literal["choice", "calibrated", "exact_match"]] = Field(default_factory=lambda: ["choice", "exact_match"], min_length=1)
    batch_size: int = Field(16, ge=1)
    general: list[str] = Field(default_factory=list)
    """Tasks of lm-eval, asked before the first task and after the last: its names, paths of a task's own .yaml, or trace (TRACE's six sets). Needs lm_eval."""


class GateConfig(_Model):
    """What a new task may cost. A limit that is absent is not looked at; with none of them there is no gate."""

    max_forgetting: float | None = Field(None, ge=0, le=1)
    """Largest mean drop of the earlier tasks, each since it was learned."""
    max_worst_task: float | None = Field(None, ge=0, le=1)
    """Largest drop of any one of them."""
    min_new_task: float | None = Field(None, ge=0, le=1)
    """Least score of the new task."""
    max_drift_kl: float | None = Field(None, ge=0)
    """Largest mean KL(before || after) of the next token on the new task's own prompts, in nats."""
    max_general_drop: float | None = Field(None, ge=0, le=1)
    """Largest drop of any watch set since before the first task."""
    margin: float = Field(0.02, gt=0, le=1)
    """A drop of its limit is let pass, one of its limit plus margin is refused, each with the confidence below; between them either may come."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Chance to reject a model that keeps every limit, over all tasks and watch sets together."""
    beta: float = Field(0.05, gt=0, lt=0.5)
    """Chance to accept a model that breaks a limit by the margin."""
    max_rows: int | None = Field(None, ge=1)
    """Most rows of each task that are scored for the gate: it begins with evaluate.limit and takes more until it knows. null: no more than those."""
    on_undecided: Literal["accept", "hold"] = "accept"
    """Where the rows do not suffice: accept with a warning, or keep the new model aside as a rejected one is."""
    scorer: Literal["choice", "exact_match", "metric"] | None = None
    """The score the gate looks at; default: the first of the run's."""

    @property
    def on(self) -> bool:
        limits = (self.max_forgetting, self.max_worst_task, self.min_new_task, self.max_drift_kl, self.max_general_drop)
        return any(limit is not None for limit in limits)


class ProbesConfig(_Model):
    """A few rows of each earlier task and watch set, scored while a task trains."""

    every: int | None = Field(None, ge=1)
    """Steps between two looks; absent: none."""
    rows: int = Field(16, ge=1)
    """Rows of each task and watch set; for `stop` take 32 or more, of 16 only a loss of most is seen."""
    stop: bool = False
    """End the task early when the gate is bound to reject it."""


class RunConfig(_Model):
    """A run; README.md shows a whole one, src/forgetless/first.yaml explains each key."""

    model: str = Field(min_length=1)
    trust_remote_code: bool = False
    tasks: list[TaskConfig] = Field(min_length=1)
    watch: list[TaskConfig] = Field(default_factory=list)
    """Skills the model already has: measured before the first task and after each, never trained."""
    protect_from: str | None = None
    """Prompts (rows with a prompt, text or messages) whose input spaces are protected before the first task: what the model could do before."""
    method: MethodConfig
    train: dict[str, Any] = Field(default_factory=dict)
    """Passed to transformers.TrainingArguments under its own names."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    """What a new task may cost; a model that costs more is kept aside, and the one before it stays."""
    probes: ProbesConfig = Field(default_factory=ProbesConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are kept in. bfloat16 halves them; what becomes of updates it cannot hold is `precision`."""
    precision: Literal["fp32_master", "stochastic_rounding", "kahan", "plain"] = "fp32_master"
    """For bfloat16 weights: an fp32 copy in the optimizer, rounding at random with the right mean, what rounding lost carried on, or nothing."""
    optimizer_state: Literal["fp32", "8bit"] = "fp32"
    """What Adam's moments are kept in between steps. 8bit: a quarter of the bytes, slow on a CPU. Needs bitsandbytes."""
    packing: bool = False
    """The rows of a batch in one sequence without padding, kept apart by their positions. Decoder-only models whose attention can."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Frozen linear layers in 4 bits (NF4) or 8 while a task trains, whole between tasks: for methods that train beside frozen weights. Needs bitsandbytes."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints inside a task; absent: task boundaries only."""
    keep: str = "all"
    """Model versions kept: all, `last N`, or `tagged`. What is needed to go on is always kept."""
    store: Literal["nothing", "prompts", "rows"] = "rows"
    """What the run folder may hold of the data: nothing, the prompts, or whole rows."""
    sharding: Literal["fsdp2"] | None = None
    """Several processes share the weights, gradients and optimizer's state while a task trains (torch's fully_shard), where each would hold all. One alone trains as without."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where the numbers of the run go while it goes; one name or several. Needs the package of that name."""
    seed: int = Field(0, ge=0, le=4_000_000)  # times 1000 plus the task's number must fit numpy's 32 bits
    output_dir: str = Field(min_length=1)

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """A name alone; and {name: gorp, post: lines}, which is {name: lines, on: {name: gorp}}."""
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or "post" not in value:
            return value
        inner = {key: option for key, option in value.items() if key != "post"}
        post = {"name": value["post"]} if isinstance(value["post"], str) else value["post"]
        if not isinstance(post, dict) or post.get("name") not in POST:
            raise ValueError(f"post: one of {', '.join(POST)}, or {{name: {POST[0]}, ...}} with its options; got {value['post']!r}")
        if "on" in post:
            raise ValueError("post: goes beside the method it stands in; take its on: out")
        return post | {"on": inner}

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: MethodConfig) -> MethodConfig:
        from .methods import REGISTRY

        if method.name not in REGISTRY and ":" not in method.name:  # module:Class is a method of the user's own
            raise ValueError(f"there is no method '{method.name}'{nearest(method.name, REGISTRY)}")
        return method

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """One name, a list of them, or none; transformers' own word for none is "none"."""
        names = [] if value in (None, "none") else [value] if isinstance(value, str) else value
        return list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(name, str) for name in names) else names

    @field_validator("keep")
    @classmethod
    def _keep(cls, keep: str) -> str:
        return check_keep(keep)

    @field_validator("train")
    @classmethod
    def _not_ours(cls, train: dict[str, Any]) -> dict[str, Any]:
        return check_train(train)

    @model_validator(mode="after")
    def _stops_for_a_reason(self) -> RunConfig:
        limits = (self.gate.max_forgetting, self.gate.max_worst_task, self.gate.max_general_drop)
        if self.probes.stop and (self.probes.every is None or all(limit is None for limit in limits)):
            what = "probes.every" if self.probes.every is None else "gate.max_worst_task, max_forgetting or max_general_drop"
            raise ValueError(f"probes.stop ends a task that the gate is bound to refuse by its probed rows: it needs {what}")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> RunConfig:
        seen: dict[str, int] = {}
        for i, task in enumerate(self.tasks):
            if task.name.lower() in seen:  # lower: some file systems do not tell A from a
                raise ValueError(f"tasks {seen[task.name.lower()]} and {i} are both named '{task.name}'; names must differ")
            seen[task.name.lower()] = i
        for i, task in enumerate(self.watch):
            if task.name.lower() in seen:
                raise ValueError(f"watch {i} is named '{task.name}', as another entry of tasks or watch is; names must differ")
            if task.train:
                raise ValueError(f"watch {i} ('{task.name}'): train has no use, a watch set is never trained. Take it out")
            if task.limit is not None:
                raise ValueError(
                    f"watch {i} ('{task.name}'): limit counts training rows, and a watch set has none; evaluate.limit counts scored rows"
                )
            seen[task.name.lower()] = i
        return self

    @property
    def scorers(self) -> list[str]:
        """What every row is scored by: evaluate.scorers, and first `metric`, each task's own, where any task or watch set names one."""
        own = any(task.own_metric for task in [*self.tasks, *self.watch])
        return ["metric", *self.evaluate.scorers] if own else list(self.evaluate.scorers)


def load_config(source: str | Path | dict | RunConfig, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A RunConfig from a YAML file, a dict or a RunConfig, with overrides such as "method.rank=4". Raises ConfigError."""
    if isinstance(source, RunConfig):
        source = source.model_dump()
    if isinstance(source, dict):
        data, where = source, "config"
    else:
        path = Path(source)
        where = str(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file. Make one with: forgetless init {path}")
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-02-31
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            got = "it is empty" if data is None else f"got {type(data).__name__}"
            raise ConfigError(f"{path}: a config is a mapping with model, tasks, method and output_dir; {got}")
    data = _copy(data)
    for override in overrides:
        apply_override(data, override)
    data.update({key: fix_yaml(data[key]) for key in ("train", "method") if key in data})
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


class _Loader(yaml.SafeLoader):
    """YAML as the specification has it: a key given twice is an error, where PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def parse_override(override: str) -> tuple[list[str], Any]:
    """("train.max_steps=5") -> (["train", "max_steps"], 5). Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': write key=value, for example method.rank=4")
    try:
        return key.split("."), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override '{override}': the value is not valid YAML") from None


def apply_override(data: dict, override: str) -> None:
    """Put the value of "a.b.0.c=value" into nested mappings and lists. Raises ConfigError."""
    (*path, last), value = parse_override(override)
    node: Any = data
    for i, part in enumerate(path):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override '{override}': {'.'.join(path[:i])} has {len(node)} entries, numbered from 0; there is no '{part}'")
            node = node[int(part)]
        else:
            if isinstance(node.get(part), str) and part == "method":
                node[part] = {"name": node[part]}
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override '{override}': {'.'.join(path[: i + 1])} is a value, not a section")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise ConfigError(f"override '{override}': {'.'.join(path)} has {len(node)} entries, numbered from 0")
        node[int(last)] = value
    else:
        node[last] = value


def _explain(error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known: Any = RunConfig
        for part in error["loc"][:-1]:
            if isinstance(part, str) and isinstance(known, type):
                known = {
                    "tasks": TaskConfig,
                    "watch": TaskConfig,
                    "evaluate": EvaluateConfig,
                    "method": MethodConfig,
                    "gate": GateConfig,
                    "probes": ProbesConfig,
                }.get(part, known)
        return f"unknown key '{key}'{nearest(str(error['loc'][-1]), known.model_fields)}"
    if error["type"] == "missing":
        return f"'{key}' is missing; forgetless init writes a config to start from"
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return f"{key}: must be a section, key: value; got {error['input']!r}"
    if error["type"] == "string_type":
        return f"{key}: {error['input']!r} is not text; put it in quotes (YAML reads yes, no, on and off as true and false)"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def fix_yaml(value: Any) -> Any:
    """Two traps of YAML 1.1, read as what they are: 1e-4 without a dot is text there, and the key `on` is true."""
    if isinstance(value, dict):
        return {"on" if k is True else k: fix_yaml(v) for k, v in value.items()}
    if isinstance(value, list):
        return [fix_yaml(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value
