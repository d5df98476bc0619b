"""Public task sets in the layouts they are published in, one row to one task.

A layout says what a row must have and how it becomes a task; what a row lacks is counted, never
guessed. Prompts are the problems as published, without instructions added.
"""

import base64
import hashlib
import json
import pickletools
import re
import zlib
from collections.abc import Callable
from typing import Any

from m1.data.tasks.synlogic import OtherRules, mapped
from m1.types import Task

Row = dict[str, Any]
_DAPO_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?\n\n", re.DOTALL)
_DAPO_AFTER = re.compile(r"\s*Remember to put your answer on its own line.*$", re.DOTALL)


class UnusableRow(Exception):
    """Why a row is no task; the first argument is a short name."""


def gsm8k(row: Row) -> Task:
    """GSM8K: `question`, and `answer` that ends with `#### number`."""
    answer = _text(row, "answer").rpartition("####")[2].strip()
    if not answer or "####" not in row["answer"]:
        raise UnusableRow("no_final_answer")
    return _task("gsm8k", "maths", _text(row, "question"), answer.replace(",", ""), "maths")


def math(row: Row) -> Task:
    """MATH: `problem`, `solution` with a box, or `answer`; `level` as the difficulty."""
    reference = row.get("answer") or _last_box(_text(row, "solution"))
    if not reference:
        raise UnusableRow("no_final_answer")
    level = re.search(r"\d", str(row.get("level", "")))
    extra = {key: row[key] for key in ("type", "subject") if isinstance(row.get(key), str)}
    task = _task("math", "maths", _text(row, "problem"), str(reference), "maths", extra)
    return _with_difficulty(task, float(level.group()) if level else None)


def aime(row: Row) -> Task:
    """AIME: `problem` or `question`, `answer` an integer from 0 to 999."""
    fields = {key.lower(): value for key, value in row.items()}
    answer = str(fields.get("answer", "")).strip()
    if not re.fullmatch(r"[0-9]{1,3}", answer):
        raise UnusableRow("no_final_answer")
    prompt = fields.get("problem") or fields.get("question")
    return _task("aime", "maths", _text({"problem": prompt}, "problem"), str(int(answer)), "maths")


def dapo(row: Row) -> Task:
    """DAPO-Math-17k: chat `prompt`, `reward_model.ground_truth`; its instructions are removed."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        prompt = prompt[0].get("content")
    text = _text({"prompt": prompt}, "prompt")
    text = _DAPO_BEFORE.sub("", _DAPO_AFTER.sub("", text))
    truth = (row.get("reward_model") or {}).get("ground_truth", row.get("solution"))
    if truth is None or not str(truth).strip():
        raise UnusableRow("no_final_answer")
    return _task("dapo", "maths", text.strip(), str(truth).strip(), "maths")


def synlogic(row: Row) -> Task:
    """SynLogic: `data_source`, and the puzzle as JSON in `extra_info.game_data_str`."""
    extra = row.get("extra_info") or {}
    game = _json(extra.get("game_data_str") or row.get("game_data_str"))
    name = str(row.get("data_source", "")).rpartition("/")[2]
    if not isinstance(game, dict):
        raise UnusableRow("no_game_data")
    question = _text({"question": game.get("question") or _content(row)}, "question")
    try:
        ours, metadata = mapped(name, question, game.get("metadata") or {})
    except OtherRules as error:
        raise UnusableRow(str(error)) from error
    answer = str(game.get("answer") or "")
    task = _task("synlogic", "logic", question, answer, f"synlogic:{ours}", metadata)
    level = game.get("difficulty")
    return _with_difficulty(task, float(level) if isinstance(level, int | float) else None)


def livecodebench(row: Row) -> Task:
    """LiveCodeBench: `question_content`, public and private test cases, `starter_code`."""
    tests = _json(row.get("public_test_cases")) + _private_tests(row.get("private_test_cases"))
    if not tests:
        raise UnusableRow("no_tests")
    metadata = _json(row.get("metadata") or "{}")
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    is_function = any(test.get("testtype") == "functional" for test in tests)
    if is_function and not function:
        raise UnusableRow("no_function_name")
    suite: dict[str, Any] = {
        "kind": "stdin",
        "tests": [_pair(t["input"], t["output"]) for t in tests],
    }
    if is_function:
        suite = {"kind": "function", "function": f"Solution.{function}"}
        suite["tests"] = [
            _pair([json.loads(line) for line in t["input"].splitlines()], json.loads(t["output"]))
            for t in tests
        ]
    prompt = _text(row, "question_content")
    if row.get("starter_code"):
        prompt += f"\n\nStart from this code:\n```python\n{row['starter_code']}\n```"
    levels = {"easy": 1.0, "medium": 2.0, "hard": 3.0}
    task = _task("livecodebench", "code", prompt, json.dumps(suite), "code")
    return _with_difficulty(task, levels.get(str(row.get("difficulty"))))


def apps(row: Row) -> Task:
    """APPS and TACO: `question`, `input_output` as JSON with `inputs`, `outputs`, `fn_name`."""
    given = _json(row.get("input_output") or "{}")
    inputs, outputs = given.get("inputs") or [], given.get("outputs") or []
    if not inputs or len(inputs) != len(outputs):
        raise UnusableRow("no_tests")
    name = given.get("fn_name")
    if name:
        # Both sets wrap the expected value of a call into a list of one.
        values = [o[0] if isinstance(o, list) and len(o) == 1 else o for o in outputs]
        is_method = "class Solution" in str(row.get("starter_code", ""))
        function = f"Solution.{name}" if is_method else name
        suite: dict[str, Any] = {"kind": "function", "function": function}
        suite["tests"] = [_pair(i, v) for i, v in zip(inputs, values, strict=True)]
    else:
        pairs = zip(map(_lines, inputs), map(_lines, outputs), strict=True)
        suite = {"kind": "stdin", "tests": [_pair(i, o) for i, o in pairs]}
    prompt = _text(row, "question")
    if row.get("starter_code"):
        prompt += f"\n\nStart from this code:\n```python\n{row['starter_code']}\n```"
    return _task("apps", "code", prompt, json.dumps(suite), "code")


def ifeval(row: Row) -> Task:
    """IFEval: `prompt`, `instruction_id_list`, `kwargs`."""
    return _instructions(row, "ifeval")


def ifbench(row: Row) -> Task:
    """IFBench: as IFEval, with its own checkers."""
    return _instructions(row, "ifbench")


LAYOUTS: dict[str, Callable[[Row], Task]] = {
    "gsm8k": gsm8k, "math": math, "aime": aime, "dapo": dapo, "synlogic": synlogic,
    "livecodebench": livecodebench, "apps": apps, "taco": apps, "ifeval": ifeval,
    "ifbench": ifbench,
}  # fmt: skip


def _instructions(row: Row, benchmark: str) -> Task:
    names, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not names or not isinstance(kwargs, list) or len(names) != len(kwargs):
        raise UnusableRow("no_instructions")
    given = [{k: v for k, v in (entry or {}).items() if v is not None} for entry in kwargs]
    reference = json.dumps({"instruction_id_list": list(names), "kwargs": given})
    return _task(
        benchmark, "instructions", _text(row, "prompt"), reference, f"instructions:{benchmark}"
    )


def _task(
    source: str,
    domain: str,
    prompt: str,
    reference: str,
    verifier: str,
    metadata: Row | None = None,
) -> Task:
    digest = hashlib.sha256(f"{prompt}\0{reference}".encode("utf-8", "surrogatepass")).hexdigest()
    return Task(
        f"{source}-{digest[:16]}", source, prompt, reference, verifier, metadata or {}, domain
    )


def _with_difficulty(task: Task, difficulty: float | None) -> Task:
    return Task(**{**task.__dict__, "difficulty": difficulty})


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow(f"no_{name}")
    return value.strip()


def _content(row: Row) -> str | None:
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content")
        return content if isinstance(content, str) else None
    return prompt if isinstance(prompt, str) else None


def _last_box(solution: str) -> str | None:
    start = max(solution.rfind(r"\boxed{"), solution.rfind(r"\fbox{"))
    if start < 0:
        return None
    depth = 0
    for position in range(solution.index("{", start), len(solution)):
        depth += (solution[position] == "{") - (solution[position] == "}")
        if depth == 0:
            return solution[solution.index("{", start) + 1 : position]
    return None


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value or []
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnusableRow("invalid_json") from error


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _pair(given: Any, output: Any) -> Row:
    return {"input": given, "output": output}


def _private_tests(value: Any) -> list[Row]:
    """Plain JSON, or JSON in a pickled string, compressed and in base 64, as published.

    The pickle is never loaded: a pickled string is one opcode, which is read; any other is refused.
    """
    if not isinstance(value, str) or not value:
        return value or []
    if value.lstrip().startswith("["):
        tests: list[Row] = _json(value)
        return tests
    try:
        data = zlib.decompress(base64.b64decode(value))
        found = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
    except (ValueError, zlib.error) as error:
        raise UnusableRow("unreadable_private_tests") from error
    harmless = {"PROTO", "FRAME", "MEMOIZE", "STOP", "BINPUT", "SHORT_BINUNICODE", "BINUNICODE",
                "BINUNICODE8"}  # fmt: skip
    texts = [arg for name, arg in found if name.endswith("BINUNICODE") or name == "BINUNICODE8"]
    if len(texts) != 1 or any(name not in harmless for name, _ in found):
        raise UnusableRow("unreadable_private_tests")
    tests = _json(texts[0])
    return tests
