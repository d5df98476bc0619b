"""Programs in a sandbox: found in a completion, compiled where needed, run on one input."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from typing import Any

from m1.rewards.answers import final_text
from m1.rewards.code.suite import Language, Suite
from m1.sandbox.base import ExecResult, Limits, SealedSandbox

MAX_SOURCE_BYTES = 256 << 10
_FENCE = re.compile(r"```[ \t]*([A-Za-z0-9+#]*)[^\n]*\n(.*?)```", re.DOTALL)
_LANGUAGES: dict[str, Language] = {
    "python": "python", "python3": "python", "py": "python",
    "cpp": "cpp", "c++": "cpp", "cc": "cpp",
}  # fmt: skip
_PYTHON = ("/usr/bin/python3", "-I", "-S")
_WALL_PER_CPU_SECOND = 3.0
"""A program that waits, or runs on busy cores, gets this many seconds for each of its own."""
_COMPILER_LIMITS = Limits(
    cpu_seconds=20, wall_seconds=60, memory_mib=1024, num_processes=32, scratch_mib=256,
    output_bytes=64 << 20,
)  # fmt: skip
_COMPILE = "g++ -O2 -std=c++17 -o /tmp/program -x c++ /work/program.cpp >&2 && cat /tmp/program"
_HARNESS = """
import importlib.util, json, os, sys
sys.setrecursionlimit(100000)
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
path, names = sys.argv[1], sys.argv[2].split(".")
arguments = json.load(sys.stdin)
spec = importlib.util.spec_from_file_location("program", path)
module = importlib.util.module_from_spec(spec)
sys.modules["program"] = module
spec.loader.exec_module(module)
target = getattr(module, names[0])
if len(names) == 2:
    target = getattr(target(), names[1])
value = target(*arguments)
results.write("\\n" + json.dumps(value))
results.flush()
"""


@dataclass(frozen=True)
class Program:
    """Source text and its language."""

    source: str
    language: Language


def find_program(completion: str, default: Language) -> Program | None:
    """The last fenced block of the final text, or the whole text when it has no fences."""
    text = final_text(completion)
    if text is None or not text.strip():
        return None
    blocks = _FENCE.findall(text)
    tag, source = blocks[-1] if blocks else ("", text)
    if not source.strip() or len(source.encode(errors="replace")) > MAX_SOURCE_BYTES:
        return None
    return Program(source, _LANGUAGES.get(tag.lower(), default))


def has_compiler() -> bool:
    """Whether C++ can be compiled here."""
    return shutil.which("g++", path="/usr/bin") is not None


def install(sandbox: SealedSandbox, program: Program) -> str | None:
    """Put a program into a sandbox, compiled; the compiler's complaint, or None.

    The compiler runs inside, without a writable folder: its result comes out as bytes.
    """
    source = program.source.encode(errors="replace")
    if program.language == "python":
        sandbox.write_file("program.py", source)
        sandbox.write_file("harness.py", _HARNESS.encode())
        return None
    sandbox.write_file("program.cpp", source)
    result = sandbox.exec(["sh", "-c", _COMPILE], limits=_COMPILER_LIMITS)
    if result.exit_code != 0 or result.stopped_by or not result.stdout.startswith(b"\x7fELF"):
        return result.stderr.decode(errors="replace")[:500] or str(result.stopped_by)
    sandbox.write_file("program", result.stdout, is_executable=True)
    return None


def run_on(sandbox: SealedSandbox, program: Program, suite: Suite, given: Any) -> ExecResult:
    """Run an installed program on a test's input."""
    limits = limits_of(suite)
    if suite.kind == "function":
        command = [*_PYTHON, "/work/harness.py", "/work/program.py", suite.function or ""]
        return sandbox.exec(command, stdin=json.dumps(given).encode(), limits=limits)
    is_python = program.language == "python"
    command = [*_PYTHON, "/work/program.py"] if is_python else ["/work/program"]
    return sandbox.exec(command, stdin=str(given).encode(errors="replace"), limits=limits)


def limits_of(suite: Suite) -> Limits:
    """Bounds of one run."""
    wall = max(2.0, _WALL_PER_CPU_SECOND * suite.cpu_seconds)
    return replace(
        Limits(), cpu_seconds=suite.cpu_seconds, wall_seconds=wall, memory_mib=suite.memory_mib
    )
