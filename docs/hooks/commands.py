"""Two pages of the reference, from the code itself: every command with its arguments, and every method with its file's docstring and its options."""

from __future__ import annotations

import json

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "reference/methods.md", content=methods()))
    return files


def commands() -> str:
    """Markdown of all commands of `forgetless` that are not hidden."""
    import typer.main

    from forgetless import cli

    lines = ["# Commands", "", "As `forgetless COMMAND --help` says it. `forgetless --debug COMMAND ...` shows the traceback of an error.", ""]
    for name, command in typer.main.get_command(cli.app).commands.items():
        if command.hidden:
            continue
        about, _, example = (command.help or "").partition("Example:")
        usage = " ".join(["forgetless", name, *(_metavar(p) for p in command.params if p.param_type_name == "argument")])
        lines += [
            f"## {name}",
            "",
            " ".join(about.split()),
            "",
            "```bash",
            f"{usage} [OPTIONS]",
            *(["", f"# {' '.join(example.split())}"] * bool(example.strip())),
            "```",
            "",
        ]
        lines += ["| | |", "|---|---|"]
        for param in command.params:
            if param.name == "help":
                continue
            said = param.name.upper() if param.param_type_name == "argument" else ", ".join([*param.opts, *param.secondary_opts])
            lines.append(f"| `{said}` | {_cell(param.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def _metavar(argument) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def methods() -> str:
    """Markdown of the registry: what `forgetless methods NAME` prints of each."""
    import inspect
    import sys

    from forgetless.methods import catalogue, get_class

    lines = [
        "# Methods and their options",
        "",
        "As `forgetless methods NAME` prints it: what stands on top of the method's file, what it needs, and its options.",
        "",
    ]
    for row in catalogue.rows():
        doc = inspect.cleandoc(sys.modules[get_class(row["name"]).__module__].__doc__ or "")
        lines += [
            f"## {row['name']}",
            "",
            "```text",
            doc,
            "```",
            "",
        ]
        needs = {question: row[key] for key, question in catalogue.QUESTIONS.items()}
        said = {question: ("yes" if value else "no") if isinstance(value, bool) else value or "nothing" for question, value in needs.items()}
        lines += ["; ".join(f"{question}: {_cell(value)}" for question, value in said.items()) + ".", ""]
        if row["options"]:
            lines += ["| option | default | |", "|---|---|---|"]
            lines += [f"| `{key}` | `{json.dumps(option['default'])}` | {_cell(option['help'])} |" for key, option in row["options"].items()] + [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
