#!/usr/bin/python3
"""Compares our rendering (the program render_chat) of real models' chat templates with jinja2's, on conversations of every kind.

    compare_templates.py ROOT RENDER_CHAT NODE_MODULES NAME...

NAME is of a package @lenml/tokenizer-NAME, whose tokenizer_config.json holds the template; a model that comes without one takes
tests/data/chat/templates/FILE, written as NAME=FILE.
"""
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from chat_template_oracle import TOOL, conversations, render  # noqa: E402

ODD = [
    "", " ", "\n", "  two\n\nlines \t\n", "{{ braces }} {% if x %} {# no #}", "<|im_start|>user\nfake<|im_end|>", "</think>after<think>", "é e\u0301 😀 \u200b\u00a0 中文 \u2028",
    "\"quotes\" 'and' \\backslash\\ \x7f \u0001", "<b>&amp;</b>", "x" * 3000,
]
NESTED = {
    "type": "function",
    "function": {
        "name": "book", "description": "Books a table\nfor \"many\" <people> & more é",
        "parameters": {"type": "object", "required": ["when"], "properties": {
            "when": {"type": "string", "description": "ISO date", "default": "today"}, "people": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
            "kind": {"type": "string", "enum": ["lunch", "dinner"]}, "price": {"type": "number", "nullable": True}, "sure": {"type": "boolean", "default": False}}},
    },
}


def call(*functions):
    return [{"type": "function", "id": f"call{n:05}", "function": {"name": name, "arguments": arguments}} for n, (name, arguments) in enumerate(functions)]


def more_conversations():
    user, system = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "Hi."}
    arguments = [{"town": "Zürich", "days": 2, "exact": True, "rest": None, "f": 0.5, "list": [1, "a", {}], "deep": {"k": []}}, {}, '{"town": "Bern"}', ""]
    for text in ODD:
        for role in ("system", "user", "assistant"):
            yield {"messages": [{"role": role, "content": text}, user]}
        yield {"messages": [user, {"role": "assistant", "content": text, "reasoning_content": text}, user]}
        yield {"messages": [user, {"role": "assistant", "content": "ok", "tool_calls": call(("f", {"a": text}))}, {"role": "tool", "content": text}], "tools": [TOOL]}
    for given, content, tools in itertools.product(arguments, ["", "Calling.", None], [None, [TOOL], [TOOL, NESTED]]):
        one = {"role": "assistant", "content": content, "tool_calls": call(("get_weather", given))}
        two = {"role": "assistant", "content": content, "tool_calls": call(("get_weather", given), ("book", given))}
        result = {"role": "tool", "name": "get_weather", "tool_call_id": "call00000", "content": "{\"sky\": \"blue\"}"}
        for messages in ([user, one, result], [system, user, one, result, answer, user], [user, two, result, result, user], [user, one]):
            yield {"messages": messages, **({"tools": tools} if tools else {})}
    for turns in range(6):
        yield {"messages": [system] + [user, answer] * turns + [user]}
        yield {"messages": [user, answer] * turns}
    for think in (True, False):
        for content in ("<think>\nhm\n</think>\n\nDone.", "<think></think>", "no thought", "a</think>b</think>c"):
            yield {"messages": [user, {"role": "assistant", "content": content}], "enable_thinking": think, "reasoning_effort": "low"}
            yield {"messages": [user, {"role": "assistant", "content": content}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": content}], "enable_thinking": think}
    for reasoning in ("", "\n\nwell\n", None):
        yield {"messages": [user, {"role": "assistant", "content": "a", "reasoning_content": reasoning, "thinking": reasoning}, user]}
        yield {"messages": [user, {"role": "assistant", "content": "a", "reasoning_content": reasoning, "thinking": reasoning, "tool_calls": call(("f", {}))}, {"role": "tool", "content": "r"}], "tools": [NESTED]}
    yield {"messages": [system, system, user]}
    yield {"messages": [user, system, user]}
    yield {"messages": [{"role": "developer", "content": "Be brief."}, user]}
    yield {"messages": [{"role": "user"}]}
    yield {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]}
    yield {"messages": [user], "tools": []}


def special_tokens(config):
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def ours(program, folder, rows):
    run = subprocess.run([program, folder], input="".join(json.dumps(row) + "\n" for row in rows).encode(), capture_output=True, timeout=60)
    if run.returncode != 0:
        raise SystemExit(f"{program} {folder}: {run.stderr.decode()} (status {run.returncode})")
    answers = [json.loads(line) for line in run.stdout.decode().split("\n")[:-1]]
    assert len(answers) == len(rows), (len(answers), len(rows))
    return answers


def prepare(folder, package, file):
    """A model's folder with its tokenizer_config.json and, where one is named, chat_template.jinja; (template, special tokens)."""
    config = json.loads((package / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file:
        assert "chat_template" not in config, f"{package} has a template of its own"
        shutil.copy(file, folder / "chat_template.jinja")
    return file.read_text() if file else config["chat_template"], special_tokens(config)


def compare(name, package, file, program):
    passed = failed = refused = 0
    rows = [variables for _, variables in conversations()] + list(more_conversations())
    rows = [{**row, "add_generation_prompt": prompt, "date_string": "26 Jul 2024", "strftime_fixed": "2025-06-28"} for row in rows for prompt in (True, False)]
    with tempfile.TemporaryDirectory() as temporary:
        template, tokens = prepare(pathlib.Path(temporary), package, file)
        answers = ours(program, temporary, rows)
    for row, answer in zip(rows, answers):
        text, error, part = render(template, {**tokens, **row})
        good = answer == text if error is None else isinstance(answer, dict) and part in answer["error"]
        passed, failed, refused = passed + good, failed + (not good), refused + (error is not None)
        if not good and failed <= 5:
            print(f"{name}: {json.dumps(row)[:600]}\n  jinja2 {(error or repr(text))[-400:]}\n  ours   {repr(answer)[-400:]}")
    print(f"template of {name}: {len(rows)} conversations, {refused} that it refuses: {passed} passed, {failed} failed")
    return failed == 0 and passed > refused


def main():
    root, program, modules, *names = sys.argv[1:]
    good = bool(names)
    for name, _, file in (argument.partition("=") for argument in names):
        package = pathlib.Path(modules) / f"@lenml/tokenizer-{name}" / "models"
        good &= compare(name, package, pathlib.Path(root) / "tests/data/chat/templates" / file if file else None, program)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
