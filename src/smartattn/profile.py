"""Profiles: what was measured on a device, as readable JSON; validated, saved atomically."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from .call import Call
from .cost import BackendName, Cost, Estimate, Predictor
from .features import Layout, Mode
from .files import StrPath, read_bounded, write_atomically
from .machine import PLAIN, Device, Line, Record, Versions, one_line
from .plan import Plan
from .stack_host import LayerTimes
from .stack_rule import StackRule
from .surroundings import Surroundings

#: Bytes of the largest file that is taken for a profile.
MAX_BYTES = 4 * 1024 * 1024

Tokens = Annotated[int, Field(ge=0, le=10**12)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0, le=1e9)]
Sentence = Annotated[str, StringConstraints(pattern=PLAIN, max_length=2000)]


class ProfileError(ValueError):
    """Why a file cannot be used as a profile, in one line."""


class When(Record):
    """Conditions of a rule, all of which must hold; None says nothing.

    Lengths are in tokens and bounds inclusive; ``min_padding_share`` is the share of keys that are
    padding, 0 to 1. ``min_q_len`` keeps decoding out.
    """

    device: Literal["cuda", "cpu"] | None = None
    padded: bool | None = None
    packed: bool | None = None
    causal: bool | None = None
    min_q_len: Tokens | None = None
    min_kv_len: Tokens | None = None
    max_kv_len: Tokens | None = None
    min_padding_share: Share | None = None

    def holds(self, plan: Plan, call: Call) -> bool:
        """Whether the conditions hold for a call."""
        return (
            (self.device is None or call.device.type == self.device)
            and (self.padded is None or plan.is_padded == self.padded)
            and (self.packed is None or plan.is_packed == self.packed)
            and (self.causal is None or plan.is_causal == self.causal)
            and (self.min_q_len is None or call.q_len >= self.min_q_len)
            and (self.min_kv_len is None or call.kv_len >= self.min_kv_len)
            and (self.max_kv_len is None or call.kv_len <= self.max_kv_len)
            and (self.min_padding_share is None or plan.padding_share >= self.min_padding_share)
        )

    def __str__(self) -> str:
        phrases = []
        if self.device is not None:
            phrases.append(f"on {self.device}")
        for given, word in (
            (self.padded, "padded"),
            (self.packed, "packed"),
            (self.causal, "causal"),
        ):
            if given is not None:
                phrases.append(word if given else f"not {word}")
        if self.min_padding_share is not None:
            phrases.append(f"from {self.min_padding_share:.0%} padding on")
        if self.min_q_len is not None:
            phrases.append(f"from {self.min_q_len:,} queries on")
        if self.min_kv_len is not None:
            phrases.append(f"from {self.min_kv_len:,} keys on")
        if self.max_kv_len is not None:
            phrases.append(f"up to {self.max_kv_len:,} keys")
        return ", ".join(phrases) or "otherwise"


class Rule(Record):
    """Which backends to prefer where nothing was measured."""

    when: When = When()
    prefer: Annotated[tuple[BackendName, ...], Field(min_length=1, max_length=64)]
    #: One sentence with its source.
    because: Sentence


class Winner(Record):
    """The fastest backend from a key length on, until the next entry's."""

    from_kv_len: Tokens
    backend: BackendName
    #: Predicted time with the runner-up divided by that with the winner, at ``from_kv_len``: near 1
    #: where one has just become faster than the other. Of what, says ``Threshold.ratio_of``.
    speedup: Annotated[float, Field(ge=1.0, le=1e9)]
    #: The largest such ratio from there to the next entry; None in profiles of before.
    largest_speedup: Annotated[float, Field(ge=1.0, le=1e9)] | None = None


#: See :class:`Threshold`.
RatioOf = Literal["layer", "call"]


class Threshold(Record):
    """Who wins in a regime by key length, for people; derived from the costs, never read back."""

    mode: Mode
    layout: Layout
    causal: bool
    dtype: Line
    head_dim: Annotated[int, Field(ge=1, le=65536)]
    batch: Annotated[int, Field(ge=1, le=10**9)]
    heads: Annotated[int, Field(ge=1, le=10**6)]
    kv_heads: Annotated[int, Field(ge=1, le=10**6)]
    padding_share: Share
    #: All rows have as much padding; otherwise their lengths are drawn uniformly.
    alike: bool = False
    #: What the winners' ratios are of: the time of a whole layer, attention included, or, where
    #: nothing is known of layers, of the calls. None in profiles of before, whose ratios are of
    #: what calls add to their layers: they grow without bound where a layer hides its call.
    ratio_of: RatioOf | None = None
    winners: Annotated[tuple[Winner, ...], Field(min_length=1, max_length=1000)]
    #: The longest key length, in tokens, that all winners were measured at, in calls of the group
    #: that their cost models were fitted to; a winner from beyond it on is extrapolated. None in
    #: profiles of before.
    measured_to: Annotated[int, Field(ge=1, le=10**9)] | None = None


class Run(Record):
    """How a profile was made."""

    mode: Literal["quick", "default"]
    #: Wall-clock time of the measurements.
    seconds: Seconds
    samples: Annotated[int, Field(ge=0, le=10**9)]
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    #: File name of the raw samples.
    raw_samples: Line | None = None
    #: Backends left out because their outputs were wrong, each with the evidence.
    excluded: dict[BackendName, Sentence] = Field(default={}, max_length=64)
    #: The caches were flushed before every timed call.
    cold: bool = False
    #: What makes the timings doubtful: other work on the device, throttling.
    complaints: Annotated[tuple[Sentence, ...], Field(max_length=16)] = ()


class Profile(Record):
    """What is known about the backends on one device model.

    ``device`` None means any device. Times are in microseconds, lengths in tokens.
    """

    schema_version: Literal["smartattn-profile/1"] = "smartattn-profile/1"
    name: Annotated[str, StringConstraints(pattern=r"^[\w .,:()@+-]{1,200}$")]
    notes: Sentence = ""
    device: Device | None = None
    versions: Versions | None = None
    #: Day of the run, ISO 8601.
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    run: Run | None = None
    #: The rest of a layer on this device; without it every call counts on its own.
    surroundings: Surroundings | None = None
    rules: Annotated[tuple[Rule, ...], Field(max_length=1000)] = ()
    #: When padding-free models leave the padding out; without any, those of the built-in default.
    padding_free: Annotated[tuple[StackRule, ...], Field(max_length=1000)] = ()
    #: What layers take this device, for machines whose host is another; None where unknown.
    layers: LayerTimes | None = None
    thresholds: Annotated[tuple[Threshold, ...], Field(max_length=5000)] = ()
    costs: Annotated[tuple[Cost, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _one_cost_per_regime(self) -> Profile:
        seen = set()
        for cost in self.costs:
            key = (cost.backend, cost.regime)
            if key in seen:
                raise ValueError(f"two costs for {cost.backend} in one regime: {cost.regime}")
            seen.add(key)
        return self

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The costs, indexed for prediction."""
        return Predictor(self.costs, self.surroundings)

    def predict(self, backend: str, plan: Plan, call: Call) -> float | None:
        """Predicted time of a call in microseconds, or None if it was not measured.

        The prediction is what a call adds to the time of its layer, see ``surroundings``, and a
        layer's share of what is prepared once per forward. It is None for a backend or a regime
        (mode, layout, causal or not, dtype) without measurements, and beyond ``MAX_EXTRAPOLATION``
        times the longest key length or ``MAX_HEAD_DIM_SCALE`` times the largest head_dim measured.
        Within these bounds the model extrapolates: it is linear in amounts of work. A head_dim
        between two measured ones costs what the larger one does, one above all of them costs in
        proportion, and float16 and bfloat16 stand for each other on GPUs where only one was
        measured.
        """
        return self.predictor.predict(backend, plan, call)

    def estimate(self, backend: str, plan: Plan, call: Call) -> Estimate | None:
        """Predicted time, peak memory and error of a call, None where :meth:`predict` is."""
        return self.predictor.estimate(backend, plan, call)

    def reach(self, backends: Sequence[str], plan: Plan, call: Call) -> int | None:
        """The longest key length, in tokens, at which two of some backends are predicted.

        None where no two of them have a model of such calls.
        """
        return self.predictor.reach(backends, plan, call)

    def rule(self, plan: Plan, call: Call) -> Rule | None:
        """The first rule whose conditions hold."""
        for rule in self.rules:
            if rule.when.holds(plan, call):
                return rule
        return None

    def to_json(self) -> str:
        """The profile as readable JSON with a final newline; absent values are left out."""
        return readable(self.model_dump(mode="json", exclude_none=True)) + "\n"


def readable(value: Any, indent: str = "") -> str:
    """JSON with one line for everything that holds numbers and texts alone."""
    if not isinstance(value, (dict, list)) or not any(
        isinstance(part, (dict, list))
        for part in (value.values() if isinstance(value, dict) else value)
    ):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(k)}: {readable(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    lines = [deeper + readable(part, deeper) for part in value]
    return "[\n" + ",\n".join(lines) + f"\n{indent}]"


# -- reading and writing -------------------------------------------------------------------------


def load(path: StrPath) -> Profile:
    """Reads and validates a profile.

    Raises:
        ProfileError: the file cannot be read or is no valid profile; the message is one line.
    """
    try:
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise ProfileError(error.strerror or type(error).__name__) from None
    except ValueError as error:
        raise ProfileError(str(error)) from None
    return parse(content)


def parse(content: bytes) -> Profile:
    """The profile in the content of a file.

    Raises:
        ProfileError: no valid profile; the message is one line.
    """
    try:
        text = content.decode("utf-8")
        # pydantic keeps the last one of two equal keys; nobody can have meant that.
        json.loads(text, object_pairs_hook=_unique)
        return Profile.model_validate_json(text)
    except ProfileError:
        raise
    except UnicodeDecodeError:
        raise ProfileError("not UTF-8 text") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "profile"
        raise ProfileError(one_line(f"{place}: {first['msg']}")) from None
    except RecursionError:
        raise ProfileError("nested too deeply") from None
    except ValueError as error:
        raise ProfileError(one_line(f"not valid JSON: {error}")) from None


def save(profile: Profile, path: StrPath) -> None:
    """Replaces a profile atomically: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the file cannot be written; whatever was there stays.
    """
    write_atomically(path, profile.to_json().encode())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ProfileError(one_line(f"key {double!r} appears twice"))
    return result
