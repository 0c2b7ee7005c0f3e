"""`find_problem`: compiles a grammar for a trial; a large one in a process of its own, which may die of it.

llguidance recurses as deep as a grammar is nested, and a stack that overflows ends the process. This file is also the
program of that process: it reads a grammar from its standard input and writes the problem to its standard output.
"""

from __future__ import annotations

import subprocess
import sys
import threading

__all__ = ["find_problem"]

MAX_UNTRIED_CHARS = 4000
"""Longest grammar that is compiled without a process of its own: it cannot nest so deep that it fills a stack."""

STACK_BYTES = 2 << 20
"""Stack of the trial. It is the smallest stack that a thread of ours or of the library has by default."""

MAX_SECONDS = 60.0
MAX_ADDRESS_BYTES = 8 << 30


def find_problem(text: str) -> str | None:
    """Returns the reason why llguidance cannot compile a grammar or compute its first token mask; None if it can."""
    if len(text) <= MAX_UNTRIED_CHARS:
        return _compile(text)
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(
            command, input=text.encode(errors="surrogatepass"), capture_output=True, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"compiling it takes more than {MAX_SECONDS:.0f} seconds; simplify it"
    if done.returncode:
        return "it is nested too deep, or too large; use fewer rules that refer to each other"
    return done.stdout.decode(errors="replace") or None


def _compile(text: str) -> str | None:
    from llguidance import LLMatcher, LLTokenizer

    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(text)
    if is_wrong:
        return str(messages[0])
    matcher = LLMatcher(LLTokenizer("byte"), text, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error()) if matcher.is_error() else None


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    text = sys.stdin.buffer.read().decode(errors="surrogatepass")
    threading.stack_size(STACK_BYTES)
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_compile(text)))
    thread.start()
    thread.join()
    if not found:
        sys.exit(1)
    sys.stdout.buffer.write((found[0] or "").encode(errors="replace"))


if __name__ == "__main__":
    _main()
