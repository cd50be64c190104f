"""The user's own Python function as the reward, named `package.module:function`."""

import asyncio
import contextlib
import importlib
import inspect
import logging
import math
import sys
import threading
import types
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ppo_ray.errors import NUM_LOGGED, QUOTED, InputError

_LOG = logging.getLogger(__name__)

_PAIR = ("prompts", "responses")
_COLUMNS = (*_PAIR, "messages", "response_ids", "finish_reasons")
_SINGULARS = ("prompt", "response", "messages", "response_ids", "finish_reason")
_PLURALS = {"prompt": "prompts", "response": "responses", "finish_reason": "finish_reasons"}

_RAISED = (Exception, SystemExit, KeyboardInterrupt)
"""What a function may raise; neither sys.exit() nor a stray interrupt in it must end the worker."""


def load_function(name: str, key: str = "reward", option: str = "function") -> Callable[..., Any]:
    """Import a function by name.

    Args:
        name: `package.module:function`; the module must be importable where it is called, or lie in the folder that
            the run was started in.
        key: of its options, e.g. `reward.parts[0]`, for messages.
        option: that names it there.

    Raises:
        InputError: there is no such module or function, it is not callable, or the module is a script that exits.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{key}.{option}={name!r}: not of the form package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the last, so that it hides nothing
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{key}.{option}={name!r}: {error}; its folder must be the current one, or on PYTHONPATH"
        ) from error
    except SystemExit as error:
        raise InputError(
            f"{key}.{option}={name!r}: importing {module_name} ended in sys.exit({error.code!r}); put what only a "
            'script should do under `if __name__ == "__main__":`'
        ) from error
    if not callable(function):
        raise InputError(f"{key}.{option}={name!r}: is a {type(function).__name__}, not a function")
    return function


def find_arguments(
    option: str, function: Callable[..., Any], columns: Collection[str], is_async: bool
) -> tuple[str, ...] | None:
    """Return the names of what a reward function takes; None: prompts and responses by their position.

    Args:
        option: that names the function, with its value, for messages.
        function: the function.
        columns: names of the kept columns.
        is_async: whether it takes one response's values.

    Raises:
        InputError: it has a parameter that nothing is known for.
    """
    known = [*(_SINGULARS if is_async else _COLUMNS), *columns]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions that are written in C have none
        return None
    named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    unknown = [item.name for item in named if item.name not in known and item.default is item.empty]
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
    if named and not unknown:
        return tuple(known if takes_all else [item.name for item in named if item.name in known])
    if not is_async and not any(item.name in known for item in named):
        with contextlib.suppress(TypeError):
            inspect.signature(function).bind([], [])
            return None
    if takes_all and not unknown:
        return tuple(known)
    raise InputError(
        f"{option}: nothing is known for its parameters {', '.join(unknown) or '(none)'}; there are "
        f"{', '.join(known)}, and the columns that prompts.keep names"
    )


class RewardFunction:
    """The user's own reward, a function of a batch or a coroutine function of one response.

    A function gets a list per parameter, by the parameter's name, and returns a score (or None) per response:
    `prompts`, `responses`, `messages`, `response_ids`, `finish_reasons`, and the columns of `prompts.keep`. One with
    two parameters of other names gets prompts and responses. An `async def` gets one response's values, under `prompt`,
    `response`, `messages`, `response_ids`, `finish_reason` and the columns' names, and returns its score; many run at a
    time.
    """

    def __init__(
        self,
        name: str,
        columns: Collection[str] = (),
        *,
        key: str = "reward",
        max_concurrent: int = 64,
        timeout_s: float = 60.0,
    ) -> None:
        """Import the function.

        Args:
            name: `package.module:function`, as in `load_function`.
            columns: names of the kept columns.
            key: of its options, e.g. `reward.parts[0]`, for messages.
            max_concurrent: most calls of an `async def` at a time.
            timeout_s: longest call of an `async def`, seconds; then its response has no score.

        Raises:
            InputError: it cannot be imported, is no function, or has parameters that nothing is known for.
        """
        self._name, self._function = name, load_function(name, key)
        self._option = f"{key}.function={name!r}"
        self.is_async = inspect.iscoroutinefunction(self._function)
        """Whether it is an `async def`."""
        self._loop = _Loop(max_concurrent)
        self._timeout_s = timeout_s
        self.arguments = find_arguments(self._option, self._function, columns, self.is_async)
        """Names of the values that it takes."""
        self._num_raised = 0  # responses of the batch in hand
        self.failure: str | None = None
        """Why the first response without a score in the last `score` has none; None: every one has one."""

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] = types.MappingProxyType({}),
    ) -> list[float | None]:
        """Score responses; one that cannot be scored gets None.

        When a function raises on the whole batch it is called again for each response by itself, so that one bad text
        costs no other its score.

        Args:
            prompts: texts.
            responses: texts.
            columns: what else there is of each response, a sequence per name.

        Raises:
            InputError: the function does not return one number (or None) per response.
        """
        self.failure, self._num_raised = None, 0
        samples = {"prompts": prompts, "responses": responses, **columns}
        if self.is_async:
            scores = self._loop.run(lambda limit: self._score_concurrently(samples, len(prompts), limit))
        else:
            scores = self._score_batch(samples, len(prompts))
        if unsaid := max(self._num_raised - NUM_LOGGED, 0):
            _LOG.warning("reward function %s raised on %d more responses of this batch", self._name, unsaid)
        if self.failure is None and None in scores:
            row = scores.index(None)
            self._note(prompts[row], responses[row], "it returned None or no finite number")
        return scores

    def _score_batch(self, samples: Mapping[str, Sequence[Any]], size: int) -> list[float | None]:
        try:
            return self._call(samples, slice(None), size)
        except InputError:
            raise
        except _RAISED:
            _LOG.warning(
                "reward function %s raised on a batch of %d; scoring one by one", self._name, size, exc_info=True
            )
        return [self._score_alone(samples, row) for row in range(size)]

    def _score_alone(self, samples: Mapping[str, Sequence[Any]], row: int) -> float | None:
        prompt, response = samples["prompts"][row], samples["responses"][row]
        try:
            return self._call(samples, slice(row, row + 1), 1)[0]
        except InputError:
            raise
        except _RAISED as error:
            self._note_error(prompt, response, error)
            return None

    def _call(self, samples: Mapping[str, Sequence[Any]], rows: slice, size: int) -> list[float | None]:
        """Call the function with some rows; lists of its own, so that it may change them."""
        if self.arguments is None:
            return self._check_scores(self._function(*(list(samples[name][rows]) for name in _PAIR)), size)
        return self._check_scores(self._function(**{name: list(samples[name][rows]) for name in self.arguments}), size)

    async def _score_concurrently(
        self, samples: Mapping[str, Sequence[Any]], size: int, limit: asyncio.Semaphore
    ) -> list[float | None]:
        timeout_s = self._timeout_s

        async def score_one(row: int) -> float | None:
            values = {name: samples[_PLURALS.get(name, name)][row] for name in self.arguments or ()}
            prompt, response = samples["prompts"][row], samples["responses"][row]
            try:
                async with limit, asyncio.timeout(timeout_s):  # in this task, so that even sys.exit() is caught here
                    return self._to_float(await self._function(**values))
            except TimeoutError:
                self._note(prompt, response, f"it took more than {timeout_s:g} s (reward.timeout_s)")
            except InputError:
                raise
            except _RAISED as error:
                self._note_error(prompt, response, error)
            return None

        return await asyncio.gather(*(score_one(row) for row in range(size)))

    def _note_error(self, prompt: str, response: str, error: BaseException) -> None:
        """Log an error for one response, if it is among the first of its batch, and keep it as the reason."""
        self._num_raised += 1
        if self._num_raised <= NUM_LOGGED:
            shown = prompt[:QUOTED], response[:QUOTED]
            _LOG.warning("reward function %s raised on %r with %r", self._name, *shown, exc_info=error)
        self._note(prompt, response, f"it raised {type(error).__name__}: {error}")

    def _note(self, prompt: str, response: str, why: str) -> None:
        """Keep the reason why a response has no score, if it is the first."""
        text = f"the prompt {prompt[:QUOTED]!r} with the response {response[:QUOTED]!r}"
        self.failure = self.failure or f"{self._option}: {text} has no score: {why}"

    def _check_scores(self, scores: Any, expected: int) -> list[float | None]:
        """Check what the function returned; return the scores as floats, None for those that are not finite."""
        shape = getattr(scores, "shape", None)  # of a numpy array or a torch tensor
        if shape is not None and len(shape) != 1:
            raise self._make_error(f"an array of shape {tuple(shape)}", expected)
        if not hasattr(scores, "__len__") or isinstance(scores, Mapping | Set | str | bytes | bytearray):
            raise self._make_error("None" if scores is None else f"a {type(scores).__name__}", expected)
        if len(scores) != expected:
            raise self._make_error(f"{len(scores)} scores", expected)
        return [self._to_float(score) for score in scores]

    def _make_error(self, returned: str, expected: int) -> InputError:
        return InputError(
            f"{self._option} returned {returned} for {expected} texts; it must return a list (or a "
            "1-D array) of one number or None for each text"
        )

    def _to_float(self, score: Any) -> float | None:
        if score is None:
            return None
        try:
            if isinstance(score, str | bytes):
                raise TypeError("text")
            number = float(score)
        except OverflowError:  # an integer beyond every float
            return None
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self._option} returned {repr(score)[:QUOTED]}, which is neither a number nor None"
            ) from error
        return number if math.isfinite(number) else None


class _Loop:
    """An event loop in a thread of its own, with one limit for all that runs in it, whoever asks for it."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._limit = asyncio.Semaphore(max_concurrent)

    def run(self, make: Callable[[asyncio.Semaphore], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine that is made with the limit; return its result."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="reward-function", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(make(self._limit), self._loop).result()
