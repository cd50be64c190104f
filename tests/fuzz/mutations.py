"""Strategies that damage a valid file: bytes cut, changed, repeated; JSON with values of other kinds in it."""

import copy
import json
from typing import Any

import hypothesis.strategies as st

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../x", "/dev/zero", "${oc.env:HOME}", "\x1b]0;x\x07", "\ud800", "x" * 5000, -1, 1e308]),
)
json_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, record: dict[str, Any]) -> bytes:
    """Draw a record's JSON with some values replaced, keys left out or added."""
    changed = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = changed
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and draw(st.booleans()):
                holder = holder[key]
                continue
            match draw(st.sampled_from(["replace", "drop", "add"])):
                case "replace":
                    holder[key] = draw(json_values)
                case "drop":
                    del holder[key]
                case "add" if isinstance(holder, dict):
                    holder[draw(st.text(max_size=10))] = draw(json_values)
            break
    return json.dumps(changed).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file's bytes with some cut, changed, inserted or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["cut", "change", "insert", "repeat", "nest"])):
            case "cut":
                content = content[:at] + content[at + draw(st.integers(1, 20)) :]
            case "change":
                content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
            case "insert":
                content = content[:at] + draw(st.binary(min_size=1, max_size=12)) + content[at:]
            case "repeat":
                content = content[:at] + content[: draw(st.integers(0, 200))] + content[at:]
            case "nest":
                content = (
                    content[:at] + draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.integers(1, 5000)) + content[at:]
                )
    return content
