"""Passing async callables to code that calls them several times.

Problem. The supervisor's loop, a retry, a timer: each is given "something to do" and does it again and again.
In async code that something can be a coroutine function, a coroutine object, a task, a plain function, or a
`partial` of any of them. They look alike where they are passed and differ where they are used, often much
later: the second time, after the first crash. Which mistakes fail, which fail silently, and which does a type
checker see?

How it is shown. Each case below is a complete small program. It is run here, and the very same text is given
to `mypy --strict`; the claims are what happened (how often the work ran, which exception, how many coroutines
were never awaited) and the error codes that mypy printed. Then all annotations are taken away and mypy is
asked again.

Key learnings.
- A coroutine object is one call that has begun; it can be awaited once. The second await is a RuntimeError.
  mypy can't see it: the object's type is the same before and after. Pass what makes it: `work`, not `work()`.
- A Task is worse: it may be awaited often and gives the first run's result each time. Nothing fails, the work
  just isn't done again. `functools.cache` on an async function hands out one coroutine object, too.
- A plain function where an async one is due fails after its effect has happened: the call runs it, then `await
  None` raises. mypy sees it (`arg-type`).
- An async function where a plain one is due does nothing at all: the call makes a coroutine that is dropped.
  mypy sees it where the parameter returns None, and not where it returns `object`, as asyncio's own `call_soon`
  and `call_later` declare it: a coroutine is an object. So our own callbacks return None, never object or Any.
- A dropped coroutine is seen as a statement (`unused-coroutine`). A dropped `Awaitable` is not, unless the
  option `unused-awaitable` is switched on; assigning either to a name hides both.
- Don't ask a callable whether it is async: `inspect.iscoroutinefunction` says no to a lambda around an async
  function and to an object with an async `__call__`. Ask what the call returned (`inspect.isawaitable`).
- Without annotations mypy sees none of it, not even with the calls in plain view: it does not look into
  functions without annotations unless `check_untyped_defs` is on, and an unannotated callable is Any.

What it changed. Repeated work is passed as `Callable[[], Awaitable[None]]`, or better not as a callable at all:
the supervisor's recipe for a child is plain values and a method (D18, see poc_closure_ownership.py). Rules
reach a worker as messages of plain values, never as code (D24). `mypy --strict` covers all of our code and is
part of `make check`.

Related designs. Trio's nurseries take the function and its arguments (`start_soon(fn, *args)`), not a coroutine
object, for this reason; Twisted's `LoopingCall` and asyncio's `call_later` take the callable. Rust tells the two
apart by type: `Fn() -> impl Future` can be called again, a `Future` is consumed by `.await`.

Run: `python experiments/closure_passing_test.py [--short] [--break factory|annotations]`. No root. Needs mypy,
which `make test` sets up; --short is the same as the full form (about two seconds).

Verdict (2026-11-22; 2 cores, Linux 6.18, Python 3.11, mypy 2.4): settled. Of 11 mismatches mypy --strict sees
5 and an option 1 more; 5 are left to review and to the interface. Without annotations it sees none.
"""

import ast
import asyncio
import functools
import gc
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from experiment import Experiment

HEADER: Final = '''
import asyncio, functools, inspect
from collections.abc import Awaitable, Callable
from typing import Any

ran: list[str] = []

async def work() -> None:
    ran.append("work")

def plain() -> None:
    ran.append("plain")

async def thrice(make: Callable[[], Awaitable[None]]) -> None:
    """Calls what it was given three times."""
    for _ in range(3):
        await make()

async def thrice_object(one: Awaitable[None]) -> None:
    """Awaits the one object it was given three times."""
    for _ in range(3):
        await one

def each(do: Callable[[], None]) -> None:
    for _ in range(3):
        do()
'''
# The premise that --break factory takes away: the callee calls once, and awaits what it got three times.
CALLS_ONCE: Final = HEADER.replace(
    "    for _ in range(3):\n        await make()", "    one = make()\n    for _ in range(3):\n        await one"
)


class Outcome(NamedTuple):
    """What a case did: times the work ran, the exception that ended it, coroutines never awaited."""

    ran: int
    error: str = "none"
    never_awaited: int = 0

    def __str__(self) -> str:
        return f"ran {self.ran}, exception {self.error}, never awaited {self.never_awaited}"


@dataclass(frozen=True)
class Case:
    """One program, what it does, and the codes of the errors that mypy --strict prints for it."""

    name: str
    claim: str
    code: str
    does: Outcome
    mypy: tuple[str, ...] = ()


SOUND: Final = (
    Case("function", "an async function that is passed itself runs each time",
         "async def main() -> None:\n    await thrice(work)", Outcome(3)),
    Case("lambda, partial, …", "so do a lambda, a partial, a bound method and an async __call__", """
async def add(text: str) -> None:
    ran.append(text)

class Worker:
    async def step(self) -> None:
        ran.append("step")

    async def __call__(self) -> None:
        ran.append("call")

async def main() -> None:
    await thrice(lambda: add("lambda"))
    await thrice(functools.partial(add, "partial"))
    await thrice(Worker().step)
    await thrice(Worker())
""", Outcome(12)),
    Case("either kind", "code that looks at the result takes a plain function and an async one", """
async def thrice_either(do: Callable[[], Awaitable[None] | None]) -> None:
    for _ in range(3):
        result = do()
        if inspect.isawaitable(result):
            await result

async def main() -> None:
    await thrice_either(work)
    await thrice_either(plain)
""", Outcome(6)),
)  # fmt: skip

MISMATCHES: Final = (
    Case("coroutine object", "a coroutine object runs once, then fails; mypy can't see it",
         "async def main() -> None:\n    await thrice_object(work())", Outcome(1, "RuntimeError")),
    Case("task", "a task runs once and answers three times; nothing fails, mypy can't see it",
         "async def main() -> None:\n    await thrice_object(asyncio.ensure_future(work()))", Outcome(1)),
    Case("cached function", "functools.cache gives the same spent coroutine again; mypy can't see it", """
@functools.cache
async def cached() -> None:
    ran.append("cached")

async def main() -> None:
    await thrice(cached)
""", Outcome(1, "RuntimeError")),
    Case("called too early", "work() for work fails at its first call; mypy sees it",
         "async def main() -> None:\n    await thrice(work())", Outcome(0, "TypeError", 1), ("arg-type",)),
    Case("sync for async", "a plain function for an async one fails after its effect; mypy sees it",
         "async def main() -> None:\n    await thrice(plain)", Outcome(1, "TypeError"), ("arg-type",)),
    Case("async for sync", "an async function for a plain one never runs; mypy sees it where None is due",
         "async def main() -> None:\n    each(work)", Outcome(0, never_awaited=3), ("arg-type",)),
    Case("async for object", "nor does it in call_soon, where any object is due; mypy can't see that", """
async def main() -> None:
    asyncio.get_running_loop().call_soon(work)
    await asyncio.sleep(0)
""", Outcome(0, never_awaited=1)),
    Case("other arguments", "an async function that wants an argument fails at the call; mypy sees it", """
async def numbered(number: int) -> None:
    ran.append(str(number))

async def main() -> None:
    await thrice(numbered)
""", Outcome(0, "TypeError"), ("arg-type",)),
    Case("through Any", "what goes through Any fails as ever; mypy says nothing", """
async def thrice_any(make: Any) -> None:
    await thrice(make)

async def main() -> None:
    await thrice_any(work())
""", Outcome(0, "TypeError", 1)),
    Case("no await", "a coroutine dropped as a statement never runs; mypy sees it",
         "async def main() -> None:\n    work()", Outcome(0, never_awaited=1), ("unused-coroutine",)),
    Case("Awaitable, no await", "a dropped Awaitable never runs; mypy --strict says nothing", """
def later() -> Awaitable[None]:
    return work()

async def main() -> None:
    later()
""", Outcome(0, never_awaited=1)),
    Case("the same, option on", "with unused-awaitable switched on, mypy sees that too", """
# mypy: enable-error-code="unused-awaitable"
def later() -> Awaitable[None]:
    return work()

async def main() -> None:
    later()
""", Outcome(0, never_awaited=1), ("unused-awaitable",)),
)  # fmt: skip


def run_case(folder: Path, stem: str) -> Outcome:
    """Run one program in this process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ran, error = _run_main(runpy.run_path(str(folder / f"{stem}.py")))
        gc.collect()  # the exception's frames held coroutines, which warn when they go
    never = sum("was never awaited" in str(warning.message) for warning in caught)
    return Outcome(ran, error, never)


def _run_main(module: dict[str, Any]) -> tuple[int, str]:
    """How often the work ran, and the exception that ended main."""
    try:
        asyncio.run(module["main"](), debug=False)
    except (RuntimeError, TypeError) as raised:
        return len(module["ran"]), type(raised).__name__
    return len(module["ran"]), "none"


def need_mypy(exp: Experiment) -> None:
    """End the run when mypy is not installed."""
    if importlib.util.find_spec("mypy") is None:
        exp.lacks("mypy (make test sets it up, from requirements-dev.lock)")


class _Bare(ast.NodeTransformer):
    """Takes every annotation away."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def bare(source: str) -> str:
    """`source` without annotations; mypy is told to accept that, or it would complain of nothing else."""
    quiet = "# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs\n"
    return quiet + ast.unparse(_Bare().visit(ast.parse(source)))


def check(sources: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The codes of the errors that mypy --strict prints for each of these programs."""
    with tempfile.TemporaryDirectory(prefix="mrelay-experiment-") as folder:
        _write(folder, sources)
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache"]
        arguments = [*command, *(f"{stem}.py" for stem in sources)]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy itself failed: {done.stdout}{done.stderr}")
    errors = re.findall(r"^(\w+)\.py:\d+: error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    return {stem: tuple(code for of, code in errors if of == stem) for stem in sources}


def run_each(sources: Mapping[str, str]) -> dict[str, Outcome]:
    """What each of these programs does."""
    with tempfile.TemporaryDirectory(prefix="mrelay-experiment-") as folder:
        _write(folder, sources)
        return {stem: run_case(Path(folder), stem) for stem in sources}


def _write(folder: str, sources: Mapping[str, str]) -> None:
    for stem, source in sources.items():
        Path(folder, f"{stem}.py").write_text(source)


def claim_inspection(exp: Experiment) -> None:
    """Asking the callable whether it is async, against asking its result."""

    async def work() -> None: ...

    class Worker:
        async def __call__(self) -> None: ...

    forms: dict[str, Callable[[], Awaitable[None]]] = {
        "function": work,
        "partial": functools.partial(work),
        "lambda": lambda: work(),  # noqa: PLW0108 (just this is in question)
        "object": Worker(),
    }
    by_callable = [name for name, form in forms.items() if inspect.iscoroutinefunction(form)]
    by_result = []
    for name, form in forms.items():
        result = form()
        by_result += [name] * inspect.isawaitable(result)
        asyncio.run(_wait(result))
    exp.claim(
        "iscoroutinefunction misses async lambdas and callable objects, isawaitable of the result misses none",
        by_callable == ["function", "partial"] and by_result == list(forms),
        f"async by the callable: {', '.join(by_callable)}; by the result: {', '.join(by_result)}",
    )


async def _wait(result: Awaitable[None]) -> None:
    await result


def claim_cases(exp: Experiment, cases: Mapping[str, Case], seen: Mapping[str, tuple[str, ...]]) -> None:
    """Run each case; what it does and what mypy saw are its claim."""
    header = CALLS_ONCE if exp.broken == "factory" else HEADER
    done = run_each({stem: header + case.code for stem, case in cases.items()})
    rows = []
    for stem, case in cases.items():
        codes = ", ".join(seen[stem]) or "nothing"
        holds = done[stem] == case.does and seen[stem] == case.mypy
        exp.claim(f"{case.name}: {case.claim}", holds, f"{done[stem]}; mypy: {codes}")
        rows.append((case.name, done[stem].ran, done[stem].error, done[stem].never_awaited, codes))
    exp.table("What happens", ("passed", "ran", "exception", "never awaited", "mypy --strict"), rows)


def main() -> None:
    """Run every case, ask mypy about every case, compare."""
    exp = Experiment("closure_passing_test", "Passing async callables.", premises=("factory", "annotations"))
    need_mypy(exp)
    cases = {f"case_{number}": case for number, case in enumerate((*SOUND, *MISMATCHES))}
    sources = {stem: HEADER + case.code for stem, case in cases.items()}
    without = {f"bare_{stem}": bare(source) for stem, source in sources.items()}
    codes = check({**sources, **without})
    seen = {stem: codes[f"bare_{stem}" if exp.broken == "annotations" else stem] for stem in sources}
    claim_cases(exp, cases, seen)
    found, with_them = sum(bool(codes[stem]) for stem in without), sum(map(bool, seen.values()))
    exp.claim(
        "without annotations mypy sees none of the mismatches",
        found == 0 and with_them > 0,
        f"errors in {found} of {len(cases)} programs without annotations, in {with_them} with them",
    )
    claim_inspection(exp)
    total, by_option = len(MISMATCHES) - 1, 1
    exp.finish(
        f"of {total} mismatches mypy --strict sees {with_them - by_option} and an option {by_option} more; "
        f"without annotations {found}"
    )


if __name__ == "__main__":
    main()
