"""Whether one forward of a stack is packed: whether that is exact, and whether it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backends import BACKENDS, Backend
from .call import Call
from .choose import Chooser, UnsupportedCallError
from .control import Settings
from .packed_stack import Packing, argument_refusal
from .plan import Padding, Plan
from .profile import Profile
from .profiles import profile_for, stack_rules
from .stack_host import HostTimes, Watch
from .stack_rule import StackRule, StackWhen, stack_rule
from .stacks import Head, Stack

#: Why nothing is packed under ``pad_output="sdpa"``.
KEEPS_PADDING = "padding positions of the output are to be kept"

#: Why a batch stays padded that the profile's rule would pack.
WAITS_FOR_HOST = (
    "the host takes longer for the packed layers here than the device for the padded batch, "
    "by the last packed forwards of this model"
)

_chooser = Chooser(BACKENDS)


@dataclass(frozen=True, eq=False)
class Request:
    """The first call of a layer in a forward.

    Args:
        plan: what its mask says about the padded batch.
        states: its hidden states, (batch, length, hidden).
        arguments: all others, by name.
        reads_last: the caller may be after the logits of the last position alone.
        grad: gradients were recorded when the forward began; checkpointed layers begin without.
    """

    stack: Stack
    plan: Plan
    states: torch.Tensor
    arguments: dict[str, Any]
    settings: Settings
    reads_last: bool
    grad: bool


def exactness_refusal(request: Request, packing: Packing, packed: Plan) -> str | None:
    """Why the forward cannot be packed exactly, or without more memory than it takes padded.

    Args:
        packed: the plan of the packed tokens.
    """
    plan, stack = request.plan, request.stack
    if request.settings.pad_output == "sdpa":
        return KEEPS_PADDING
    if not packing.is_padded(request.states):
        return "the hidden states do not have the shape of the mask"
    if plan.padding is Padding.HOLES and stack.has_windows:
        return "a window cannot be packed across holes in the mask"
    sequences = plan.sequences
    assert sequences is not None
    if not plan.is_causal and stack.pools_first_token:
        first = (sequences.k_start == 0) & (sequences.k_length > 0)
        if not first.all():
            return "an output is pooled from the first position, which is padding"
    if request.reads_last and stack.head is Head.NEXT_TOKEN:
        last = sequences.k_start + sequences.k_length == plan.visible
        if not (sequences.contiguous and last.all()):
            return "the last position counts, and may be padding"
    if any(map(_is_compiled, stack.layers)):
        return "a layer is compiled by itself, and would need a mask of all tokens by all tokens"
    return argument_refusal(packing, request.arguments) or attention_refusal(request, packed)


def _is_compiled(layer: torch.nn.Module) -> bool:
    """By ``layer.compile()``, or ``layer.forward = torch.compile(layer.forward)``."""
    return layer._compiled_call_impl is not None or hasattr(
        layer.forward, "_torchdynamo_orig_callable"
    )


def attention_refusal(request: Request, packed: Plan) -> str | None:
    """Why attention over the packed tokens would need a mask of all tokens by all tokens."""
    call = _call(request, packed)
    if _some_reads_packed(packed, call, request.settings.backends):
        return None
    try:
        profile = profile_for(packed.device)
        decision = _chooser(packed, call, profile, request.settings.backends)
    except UnsupportedCallError as error:
        return str(error)
    return backend_refusal(decision.backend, packed, call)


def backend_refusal(backend: Backend, packed: Plan, call: Call) -> str | None:
    """Why the backend that would run the packed tokens makes packing them pointless."""
    if packed.is_packed and (backend.last_resort or backend.uses_dense_mask(packed, call)):
        return f"{backend.name} needs a mask of all tokens by all tokens for packed sequences"
    return None


def _some_reads_packed(packed: Plan, call: Call, allowed: Sequence[str] | None) -> bool:
    """Whether a backend that may run takes the packed tokens as they are.

    Then one of those is chosen, see :func:`choose.choose`; which one may be found out later.
    """
    return any(
        not (backend.last_resort or backend.uses_dense_mask(packed, call))
        and not backend.refusals(packed, call)
        for backend in BACKENDS
        if allowed is None or backend.name in allowed
    )


@dataclass(frozen=True, slots=True)
class Worth:
    """Whether packing a batch pays by the rules of a profile; every forward asks, few for words."""

    packs: bool
    #: Whose rule says so, or that there is none.
    rule: str
    #: One sentence with its source.
    because: str | None = None
    #: The conditions that the batch meets, or else is asked first; and what they are asked of.
    when: StackWhen | None = None
    tokens: int = 0
    padding: int = 0
    hidden: int = 0

    @property
    def bounds(self) -> str | None:
        """What the rule asks for."""
        if self.when is None:
            return None
        if not self.packs:
            return "below all bounds"
        return str(self.when.model_copy(update={"device": None}))

    @property
    def asked(self) -> str | None:
        """What the rule was asked of this batch."""
        if self.when is None:
            return None
        spared = self.when.min_spared_work is not None
        counted, words = (self.padding, "padding tokens") if spared else (self.tokens, "tokens")
        work = self.when.work(counted, self.hidden)
        share = self.padding / self.tokens
        return f"{share:.0%} padding, {words} x {self.when.unit} are {work:.2g}"

    @property
    def reason(self) -> str:
        """All in one sentence, what was asked left out."""
        rule = ", ".join(filter(None, (self.rule, self.bounds)))
        return rule if self.because is None else f"{rule}: {self.because}"


def worth(request: Request, always: bool, host: HostTimes) -> tuple[bool, str, Watch | None]:
    """Whether packing is worth its copies by the profile in force and on this host, and why.

    Returns:
        Also what the packed forward is watched for; None if it is not.
    """
    if always:
        return True, "asked for whenever it is exact", None
    profile = profile_for(request.plan.device)
    found = pays(request.plan, request.states.shape[-1], profile)
    if not found.packs:
        return False, found.reason, None
    watch = _watch(request, host, profile)
    if watch is None or not watch.waits_for_host:
        return True, found.reason, watch
    if host.again():
        return True, "to see whether the host still takes longer than the device", watch
    return False, WAITS_FOR_HOST, None


def _watch(request: Request, host: HostTimes, profile: Profile) -> Watch | None:
    """What a forward is watched for; None where the time of a host must not or cannot decide.

    Packed and padded batches differ within the noise of their dtype, so that the same forward
    would not always give the same bits; and what one process of several finds, others may not.
    """
    plan, stack, states = request.plan, request.stack, request.states
    times, dtype = profile.layers, _dtype(states)
    if (
        times is None
        or dtype.itemsize != 2
        or torch.are_deterministic_algorithms_enabled()
        or _has_company()
        # Other kernels, of which nothing was timed.
        or getattr(stack.base.config, "quantization_config", None) is not None
    ):
        return None
    weights = host.weights(stack)
    if not weights:
        return None
    hidden = states.shape[-1] * stack.depth
    padded_us, packed_us = (
        times.forward_us(plan.is_causal, plan.batch, length, hidden, weights)
        for length in (plan.q_len, plan.real_q / plan.batch)
    )
    if padded_us is None or packed_us is None:
        return None
    key = (states.device, dtype, request.grad)
    training = request.grad and stack.root.training
    return Watch(host, key, padded_us, packed_us, training)


def _has_company() -> bool:
    """Whether other processes may have to make the same choice: ranks that share a model."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _dtype(states: torch.Tensor) -> torch.dtype:
    """What the layers compute in."""
    if torch.is_autocast_enabled(states.device.type):
        return torch.get_autocast_dtype(states.device.type)
    return states.dtype


def pays(plan: Plan, hidden: int, profile: Profile) -> Worth:
    """What a profile says of packing a batch.

    Args:
        plan: the padded batch.
        hidden: size of the hidden states.
    """
    rule, when = _rule(plan, hidden, profile)
    if rule is None or when is None:
        return Worth(False, "no rule of the profile says that it pays")
    # A profile without rules of its own goes by those of the default.
    name = profile.name if profile.padding_free else "default"
    tokens = plan.batch * plan.q_len
    return Worth(
        packs=rule.pack,
        rule=f"rule of profile {name}",
        because=rule.because,
        when=when,
        tokens=tokens,
        padding=tokens - plan.real_q,
        hidden=hidden,
    )


def _rule(plan: Plan, hidden: int, profile: Profile) -> tuple[StackRule | None, StackWhen | None]:
    """The rule that holds for a batch, and the conditions that it meets, or else is asked first."""
    tokens = plan.batch * plan.q_len
    padding = tokens - plan.real_q
    rules = stack_rules(profile)
    work = float(padding * hidden**2)
    rule = stack_rule(rules, plan.device.type, padding / tokens, work, hidden)
    if rule is None:
        return None, None
    if rule.pack:
        return rule, rule.when
    return rule, next((one.when for one in rules if one.pack), rule.when)


def _call(request: Request, packed: Plan) -> Call:
    """What the layers will ask for, as far as the configuration tells."""
    config, states = request.stack.base.config, request.states
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or states.shape[-1] // heads
    return Call(
        device=states.device,
        dtype=_dtype(states),
        batch=1,
        q_len=packed.q_len,
        kv_len=packed.kv_len,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "qk_head_dim", None) or head_dim,
        value_head_dim=getattr(config, "v_head_dim", None) or head_dim,
        softcap=getattr(config, "attn_logit_softcapping", None),
        grad=torch.is_grad_enabled() and states.requires_grad,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        self_attention=True,
        has_eager=True,
        features=request.stack.features,
    )
