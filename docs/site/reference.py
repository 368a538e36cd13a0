"""The reference pages of the site: commands, study keys and Python, from the code itself."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import typer.main

from ke_ray.cli import app
from ke_ray.studies.schema import KINDS, json_schema

#: What a program of one's own calls. Everything else may change between versions.
PYTHON_API = {
    "The commands": (
        *("api.series:series", "api.series:Series", "api.series:SeriesCheckpoint"),
        *("api.scan:scan", "api.score:score_model"),
    ),
    "Measure a model in memory": (
        *("models.scoring:score_model", "core.measures:Evaluation", "core.measures:MeasureRow"),
        "models.loading:load_model",
    ),
    "Measure a model while it is trained": (
        *("callbacks:Monitor", "callbacks:TrainerMonitor", "callbacks:LightningMonitor"),
    ),
    "Bring a measure of your own": (
        *("core.measure:Measure", "core.sums:Sum", "core.measures:register"),
    ),
    "Compare": (
        *("core.jackknife:paired_difference", "core.jackknife:standard_error"),
        *("core.entropy:entropy_nats", "core.entropy:effective_memories"),
    ),
    "Read results": (
        *("results.scan_folder:ScanFolder", "results.sweep_folder:read_trials"),
        *("report.build:build_report", "report.terminal:print_results"),
        "report.picture:picture",
    ),
    "Read a study": ("config:load_study",),
    "Make a small world": ("data.biographies:write_biographies",),
}


def pages() -> dict[str, str]:
    """Path → Markdown of every page."""
    return {
        "reference/commands.md": commands_page(),
        "reference/studies.md": studies_page(),
        "reference/python.md": python_page(),
    }


def commands_page() -> str:
    """Every command with its arguments and options, as its own parser has them."""
    group = typer.main.get_command(app)
    context = group.make_context("ke-ray", [], resilient_parsing=True)
    parts = [
        "# Commands\n\n`ke-ray --help` and `ke-ray COMMAND --help` print the same. Exit codes: 0, "
        "all is done; 1, something failed, and the results say what; 2, the request is wrong; "
        "130, interrupted, and the same command resumes."
    ]
    parts += _commands(group, context, "ke-ray")
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, parent: Any, prefix: str) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        context = command.context_class(command, info_name=name, parent=parent)
        title = f"{prefix} {name}"
        if hasattr(command, "list_commands"):
            yield from _commands(command, context, title)
            continue
        yield f"## {title}"
        yield f"```text\n{command.get_usage(context)}\n```"
        yield inspect.cleandoc(command.help or "")
        rows = [
            f"| `{_cell(left)}` | {_cell(right)} |"
            for parameter in command.get_params(context)
            if (record := _record(parameter, context)) is not None
            for left, right in [record]
        ]
        if rows:
            yield "\n".join(["| argument or option | meaning |", "|---|---|", *rows])


def _record(parameter: Any, context: Any) -> tuple[str, str] | None:
    """(name, meaning) of an argument or option, as ``--help`` prints it."""
    if parameter.name == "help":
        return None
    found: tuple[str, str] | None = parameter.get_help_record(context)
    return found


def studies_page() -> str:
    """Every key of every kind of study, with type, default and meaning, from the schemas."""
    parts = [
        "# Study keys\n\nA study is a YAML file with `kind` and these keys; `--set KEY=VALUE` "
        "sets one on the command line, with dots between the levels. A key without default is "
        "required. `ke-ray schema KIND` prints the JSON Schema, which editors read."
    ]
    for kind in KINDS:
        schema = json_schema(kind)
        parts.append(f"## {kind}")
        if kind == "sweep":
            parts.append("`base` has the keys of a [continual](#continual) study.")
        parts += _tables(schema, kind)
    return "\n\n".join(parts) + "\n"


def _tables(schema: dict[str, Any], kind: str) -> Iterator[str]:
    """The table of the kind itself, then those of the groups that its keys are, outermost first."""
    definitions = schema.get("$defs", {})
    pending, seen = [("", schema)], {"ContinualStudy"} if kind == "sweep" else set()
    while pending:
        prefix, table = pending.pop(0)
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, value in table.get("properties", {}).items():
            name = f"{prefix}{key}"
            for reference in _references(value):
                group = definitions[reference]
                if reference not in seen and "properties" in group:
                    seen.add(reference)
                    pending.append((f"{name}{_step(value)}.", group))
            default = "–" if "default" not in value else f"`{_yaml(value['default'])}`"
            if key in table.get("required", ()):
                default = "required"
            meaning = " ".join(value.get("description", "").split()) or "–"
            lines.append(
                f"| `{name}` | {_cell(_type(value, definitions))} | {_cell(default)} "
                f"| {_cell(meaning)} |"
            )
        yield "\n".join(lines)


def _step(value: dict[str, Any]) -> str:
    """What stands between a key and the keys below it: an entry of a list, or a name."""
    text = str(value)
    if "'additionalProperties': {'" in text:
        return ".NAME"
    return "[]" if "'type': 'array'" in text else ""


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rsplit("/", 1)[1]
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _type(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON Schema's type in words."""
    if "$ref" in value:
        target = definitions[value["$ref"].rsplit("/", 1)[1]]
        return "group" if "properties" in target else _type(target, definitions)
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in value:
            return " or ".join(
                dict.fromkeys(_type(part, definitions) for part in value[alternatives])
            )
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{choice}`" for choice in value["enum"])
    kind = str(value.get("type", "any"))
    if kind == "array":
        return f"list of {_type(value['items'], definitions)}" if value.get("items") else "list"
    if kind == "object":
        return "mapping"
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
    limits = [
        f"{sign} {value[name]}"
        for name, sign in (*bounds, ("exclusiveMaximum", "<"))
        if name in value
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def python_page() -> str:
    """Signatures and docstrings of what programs call."""
    parts = ["# Python\n\nOnly `ke_ray.scan` needs Ray. Entropies are in nats."]
    for title, names in PYTHON_API.items():
        parts.append(f"## {title}")
        for name in names:
            module, _, attribute = name.partition(":")
            thing = getattr(pkgutil.resolve_name(f"ke_ray.{module}"), attribute)
            parts += _documented(f"ke_ray.{module}", attribute, thing)
    return "\n\n".join(parts) + "\n"


def _documented(module: str, name: str, thing: Any, level: str = "###") -> Iterator[str]:
    yield f"{level} {name}"
    qualified = f"from {module} import {name}\n\n" if level == "###" else ""
    yield f"```python\n{qualified}{name}{_signature(thing)}\n```"
    yield _docstring(thing)
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            if isinstance(value, property | cached_property) and not method.startswith("_"):
                yield f"#### {name}.{method}"
                yield _docstring(value)
            function = getattr(value, "__func__", value)  # of a class or static method
            if not method.startswith("_") and inspect.isfunction(function):
                yield from _documented(module, f"{name}.{method}", function, "####")


class _Annotation(str):
    """A postponed annotation, which `inspect` would print in quotes."""

    __repr__ = str.__str__


def _signature(thing: Any) -> str:
    """The parameters, one a line where they do not fit into one."""
    signature = inspect.signature(thing)
    parameters = [
        parameter.replace(annotation=_Annotation(parameter.annotation))
        if isinstance(parameter.annotation, str)
        else parameter
        for parameter in signature.parameters.values()
    ]
    returns = signature.return_annotation
    result = f" -> {returns}" if isinstance(returns, str) and not inspect.isclass(thing) else ""
    text = str(inspect.Signature(parameters))
    if len(text) + len(result) > 60:
        kinds = [parameter.kind for parameter in parameters]
        lines = [f"    {parameter},\n" for parameter in parameters]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "    *,\n")
        text = f"(\n{''.join(lines)})"
    return text + result


def _docstring(thing: Any) -> str:
    """A docstring as Markdown: its sections in bold, their entries as lists."""
    lines, section = [], ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section in ("Args", "Attributes", "Raises") and entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            lines.append(line.strip() if section in ("Returns", "Yields") else f"  {line.strip()}")
        else:
            section = "" if line.strip() else section
            lines.append(line)
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines))


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
