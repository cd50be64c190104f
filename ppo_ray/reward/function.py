"""The user's own Python function as the reward, named `package.module:function`."""

import importlib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from ppo_ray.errors import NUM_LOGGED, QUOTED, InputError

_LOG = logging.getLogger(__name__)

Scores = Sequence[float | None]

_RAISED = (Exception, SystemExit, KeyboardInterrupt)
"""What a function may raise; neither sys.exit() nor a stray interrupt in it must end the worker."""


def load_function(name: str) -> Callable[[list[str], list[str]], Scores]:
    """Import a function by name.

    Args:
        name: `package.module:function`; the module must be importable where the reward workers run, or lie in the
            folder that the run was started in.

    Raises:
        InputError: there is no such module or function, it is not callable, or the module is a script that exits.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"reward.function={name!r}: not of the form package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the last, so that it hides nothing
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"reward.function={name!r}: {error}; its folder must be the current one, or on PYTHONPATH"
        ) from error
    except SystemExit as error:
        raise InputError(
            f"reward.function={name!r}: importing {module_name} ended in sys.exit({error.code!r}); put what only a "
            'script should do under `if __name__ == "__main__":`'
        ) from error
    if not callable(function):
        raise InputError(f"reward.function={name!r}: is a {type(function).__name__}, not a function")
    return function


class RewardFunction:
    """The user's own reward: `function(prompts, responses) -> scores`, one float (or None) per pair."""

    def __init__(self, name: str) -> None:
        """Import the function.

        Args:
            name: `package.module:function`, as in `load_function`.

        Raises:
            InputError: it cannot be imported, or is no function.
        """
        self._name, self._function = name, load_function(name)
        self._num_raised = 0  # pairs of the batch in hand
        self.failure: str | None = None
        """Why the first pair without a score in the last `score` has none; None: every pair has one."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
        """Score pairs of texts; a pair that cannot be scored gets None.

        When the function raises on the whole batch it is called again pair by pair, so that one bad text costs no other
        its score.

        Raises:
            InputError: the function does not return one number (or None) per pair.
        """
        self.failure = None
        try:
            scores = self._check_scores(self._function(list(prompts), list(responses)), len(prompts))
        except InputError:
            raise
        except _RAISED:
            _LOG.warning(
                "reward function %s raised on a batch of %d; scoring one by one",
                self._name,
                len(prompts),
                exc_info=True,
            )
            self._num_raised = 0
            scores = [self._score_alone(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
            if unsaid := max(self._num_raised - NUM_LOGGED, 0):
                _LOG.warning("reward function %s raised on %d more pairs of this batch", self._name, unsaid)
        if self.failure is None and None in scores:
            self._note(
                prompts[scores.index(None)], responses[scores.index(None)], "it returned None or no finite number"
            )
        return scores

    def _note(self, prompt: str, response: str, why: str) -> None:
        """Keep the reason why a pair has no score, if it is the first."""
        text = f"the prompt {prompt[:QUOTED]!r} with the response {response[:QUOTED]!r}"
        self.failure = self.failure or f"reward.function={self._name}: {text} has no score: {why}"

    def _score_alone(self, prompt: str, response: str) -> float | None:
        try:
            return self._check_scores(self._function([prompt], [response]), 1)[0]
        except InputError:
            raise
        except _RAISED as error:
            self._num_raised += 1
            if self._num_raised <= NUM_LOGGED:
                shown = prompt[:QUOTED], response[:QUOTED]
                _LOG.warning("reward function %s raised on %r with %r", self._name, *shown, exc_info=True)
            self._note(prompt, response, f"it raised {type(error).__name__}: {error}")
            return None

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
            f"reward.function={self._name!r} returned {returned} for {expected} texts; it must return a list (or a "
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
                f"reward.function={self._name!r} returned {repr(score)[:QUOTED]}, which is neither a number nor None"
            ) from error
        return number if math.isfinite(number) else None
