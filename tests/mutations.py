"""Breaks load-bearing lines one at a time and shows that the tests notice.

``python -m tests.mutations`` copies the repository once per mutation, replaces one expression in
the copy and runs the tests named for it. Every one of them must fail there, after passing on a
copy without a mutation. Writes ``docs/reports/mutations.md``; the exit status is 1 if a mutation
survives or no longer applies. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("src") / "smartattn"
COPIED = ("src", "tests", "calibration", "examples", "benchmarks", "docs/data", "pyproject.toml")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutation:
    """One expression of one file, replaced by a wrong one."""

    what: str
    file: str
    old: str
    new: str
    #: Arguments of pytest.
    tests: tuple[str, ...]


PLAN = ("tests/test_plan.py",)
STACK_HOST = ("tests/test_stack_host.py", "-x")
SHARED = ("tests/test_shared_plans.py",)
FOLDING = ("tests/test_folding.py",)
PACKING = ("tests/test_packing.py",)
CHOOSE = ("tests/test_choose.py",)
MATRIX = ("tests/test_backends_matrix.py", "-k", "float64 and not limits and not gpu")
NAN = ("tests/test_backends_matrix.py", "-k", "nan_in_padding and not gpu")
TAILS = ("tests/test_tails.py",)
EXPLAIN = ("tests/test_explain.py",)
DOCTOR = ("tests/test_doctor.py",)
VERIFY = ("tests/test_verify_bench.py",)
CONTROL = ("tests/test_control.py",)
FAULTS = ("tests/test_faults.py",)
FUZZ = ("tests/test_fuzz.py", "-m", "not slow")
REFUSALS = ("tests/test_backends_matrix.py", "-k", "refus and not gpu")
STACKS = ("tests/test_stack_fit.py", "-x", "-k", "not real_calibration")
FIT = ("tests/test_fit.py", "-x")
SPLITTING = ("tests/test_splitting.py", "-x")
TRITON = ("tests/test_backends_matrix.py", "-k", "(float64 and triton and not gpu) or aligned")
PADDING_FREE = ("tests/test_padding_free.py", "-x", "-m", "not slow", "-k", "not benchmark")

MUTATIONS = (
    Mutation(
        "moved: a place takes the token before its own",
        "moves.py",
        "order = torch.arange(len(index),",
        "order = torch.arange(-1, len(index) - 1,",
        PACKING,
    ),
    Mutation(
        "moved: parts that lie apart are taken for one run of memory",
        "moves.py",
        "parts == 1 or from_strides[2] == to_strides[2] == width",
        "parts >= 1",
        PACKING,
    ),
    Mutation(
        "moved: strides that are no multiples of 16 bytes are taken for some",
        "moves.py",
        "if every % 8 or every >= _FURTHEST",
        "if every >= _FURTHEST",
        PACKING,
    ),
    Mutation(
        "moved: gradients are lost",
        "packing.py",
        "(states.requires_grad and torch.is_grad_enabled()) or",
        "",
        (*PACKING, *PADDING_FREE),
    ),
    Mutation(
        "padding-free: what a cache holds already is replaced",
        "packed_stack.py",
        "if type(layer) is DynamicLayer and",
        "if isinstance(layer, DynamicLayer) and",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: keys of a layer are put into rows by the place in the batch",
        "packed_stack.py",
        "rows, places = index // self.length,",
        "rows, places = index // self.batch,",
        PADDING_FREE,
    ),
    Mutation(
        "shared: padding is forgotten",
        "masking.py",
        "and (real is None or real.all())",
        "",
        SHARED,
    ),
    Mutation(
        "shared: forwards with gradients",
        "masking.py",
        "and not torch.is_grad_enabled()",
        "",
        SHARED,
    ),
    Mutation(
        "shared: what is traced, or said by a block",
        "masking.py",
        "and SETTINGS.get() is DEFAULT",
        "",
        SHARED,
    ),
    Mutation(
        "shared: another stream finds what is not there yet",
        "shared_plans.py",
        "stamp = (profile, changes(), kernels, threading.get_ident(), stream)",
        "stamp = (profile, changes(), kernels, threading.get_ident(), 0)",
        SHARED,
    ),
    Mutation(
        "shared: another profile finds old choices",
        "shared_plans.py",
        "stamp = (profile, changes(), kernels, threading.get_ident(), stream)",
        "stamp = (0, changes(), kernels, threading.get_ident(), stream)",
        SHARED,
    ),
    Mutation(
        "shared: a CUDA graph gets what a plan derives",
        "integration.py",
        "if capturing(query):",
        "if False:",
        SHARED,
    ),
    Mutation(
        "shared: a CUDA graph keeps what a mask's own plan derives",
        "integration.py",
        "mask.plan.copy().dense_mask()",
        "mask.plan.dense_mask()",
        SHARED,
    ),
    Mutation(
        "shared: a layer's causality comes before its mask's in a graph",
        "integration.py",
        "        is_causal = False\n    causal =",
        "    causal =",
        SHARED,
    ),
    Mutation(
        "shared: a graph takes shorter queries as the first ones",
        "integration.py",
        "and (q_len == kv_len or not causal)\n        ",
        "",
        SHARED,
    ),
    Mutation(
        "shared: a graph runs flash kernels without a backward",
        "integration.py",
        "if not call.grad:\n            profile",
        "if True:\n            profile",
        SHARED,
    ),
    Mutation(
        "shared: written into, a mask keeps its plan",
        "shared_plans.py",
        "stamp = (mask._version, changes(),",
        "stamp = (0, changes(),",
        SHARED,
    ),
    Mutation(
        "shared: a mask and its plan keep each other",
        "shared_plans.py",
        "given = mask.detach()",
        "given = mask",
        SHARED,
    ),
    Mutation(
        "shared: an inference tensor keeps its plan",
        "shared_plans.py",
        "not (mask.is_inference() or mask.requires_grad)",
        "not mask.requires_grad",
        SHARED,
    ),
    Mutation(
        "shared: a learned mask keeps its plan",
        "shared_plans.py",
        "not (mask.is_inference() or mask.requires_grad)",
        "not mask.is_inference()",
        SHARED,
    ),
    Mutation(
        "unseen: a layer that asks again gets the old plan of a mask",
        "shared_plans.py",
        "if not kept[3].add(module):",
        "if True:",
        SHARED,
    ),
    Mutation(
        "unseen: layers of two models share the plan of a mask",
        "shared_plans.py",
        'key = id(mask), id(getattr(module, "config", None))',
        "key = id(mask), 0",
        SHARED,
    ),
    Mutation(
        "unseen: a checkpointed layer begins another forward",
        "shared_plans.py",
        "if torch._C._current_graph_task_id() != -1:",
        "if False:",
        SHARED,
    ),
    Mutation(
        "unseen: an earlier layer belongs to the same forward",
        "shared_plans.py",
        "or (place is not None and place <= self._last)",
        "",
        SHARED,
    ),
    Mutation(
        "unseen: every forward chooses anew for a mask",
        "integration.py",
        "choice = _bound_again(plan, place) or _choose(",
        "choice = _choose(",
        SHARED,
    ),
    Mutation(
        "unseen: what failed is bound again",
        "plan.py",
        "self.chosen.clear()",
        "pass",
        SHARED,
    ),
    Mutation(
        "unseen: a layer that asks again gets the old bounds",
        "arguments.py",
        "anew = known is not None and",
        "anew = False and known is not None and",
        SHARED,
    ),
    Mutation(
        "unseen: transforms of torch.func read masks",
        "masking.py",
        'or where.type == "meta" or transformed():',
        'or where.type == "meta":',
        ("tests/test_transforms.py",),
    ),
    Mutation(
        "unseen: layers choose in transforms of torch.func",
        "integration.py",
        "            or transformed()\n",
        "",
        ("tests/test_transforms.py",),
    ),
    Mutation(
        "unseen: output_attentions goes to sdpa whatever is asked",
        "graphs.py",
        "if not beyond_sdpa:",
        "if True:",
        ("tests/test_integration.py", "-k", "output_attentions"),
    ),
    Mutation(
        "unseen: chunks of packed sequences are counted by places",
        "patterns.py",
        "code is _CHUNKED and not remapped and",
        "code is _CHUNKED and",
        ("tests/test_packed.py",),
    ),
    Mutation(
        "unseen: chunks despite a cache are counted by places",
        "patterns.py",
        "if _REMAPPED is not None and counts_chunks(mask_function):",
        "if False:",
        ("tests/test_packed.py",),
    ),
    Mutation(
        "unseen: layers of one forward disagree about sequences",
        "masking.py",
        "if starts is not None:",
        "if False:",
        ("tests/test_packed.py",),
    ),
    Mutation(
        "unseen: sdpa leaves out sinks on a paged cache",
        "graphs.py",
        "if left_out:",
        "if False:",
        ("tests/test_caches.py", "-k", "leave_no_argument_out"),
    ),
    Mutation(
        "unseen: a name that only sounds like a state space",
        "stacks.py",
        '"_ssm", "conv1d"',
        '"ssm", "conv1d"',
        ("tests/test_padding_free.py", "-k", "sounds_like"),
    ),
    Mutation(
        "graphs: what is ready counts",
        "first_use.py",
        "if verdict.build_us and not self._shape(backend, plan, call).built:",
        "if False:",
        ("tests/test_first_use.py", "-x"),
    ),
    Mutation(
        "graphs: masks that nobody needs keep flash kernels out",
        "masking.py",
        "return is_causal if written == mask._version else None",
        "return None",
        SHARED,
    ),
    Mutation(
        "graphs: what was written into a mask is not seen",
        "masking.py",
        "written == mask._version",
        "written is not None",
        SHARED,
    ),
    Mutation(
        "graphs: what Transformers does not look at is left out",
        "masking.py",
        "skips = False, False",
        "pass",
        SHARED,
    ),
    Mutation(
        "graphs: a window is left out",
        "masking.py",
        "and (known.window is None or known.window >= length)",
        "",
        SHARED,
    ),
    Mutation(
        "graphs: SDPA is taken for built",
        "first_use.py",
        "return bool(decision.verdict.build_us) and built",
        "return True",
        SHARED,
    ),
    Mutation(
        "graphs: SDPA runs where nobody knows whether it builds",
        "integration.py",
        "if decision.backend.indispensable and not built:",
        "if False:",
        SHARED,
    ),
    Mutation(
        "graphs: models without sdpa get its masks",
        "masking.py",
        "if not made_for_sdpa(type(config)):",
        "if False:",
        ("tests/test_compile.py", "-x", "-k", "without_sdpa"),
    ),
    Mutation(
        "graphs: None is causal in models without sdpa",
        "graphs.py",
        'bool(getattr(module, "is_causal", True)) and made_for_sdpa(type(module))',
        'bool(getattr(module, "is_causal", True))',
        ("tests/test_compile.py", "-x", "-k", "knows_sdpa"),
    ),
    Mutation(
        "graphs: torch.jit.trace chooses",
        "integration.py",
        "torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]\n",
        "False\n",
        ("tests/test_compile.py", "-x", "-k", "traced"),
    ),
    Mutation(
        "autocast: calls are of what is handed over",
        "arguments.py",
        "return query.to(dtype), key.to(dtype), value.to(dtype)",
        "return query, key, value",
        ("tests/test_arguments.py", "-x", "-k", "autocast"),
    ),
    Mutation(
        "autocast: float64 is rounded",
        "arguments.py",
        "or torch.float64 in (",
        "or torch.float64 in () and (",
        ("tests/test_arguments.py", "-x", "-k", "autocast"),
    ),
    Mutation(
        "a value of another dtype finds the choice for another",
        "integration.py",
        "        key_dtype,\n        value_dtype,\n        query.device,",
        "        key_dtype,\n        query.device,",
        ("tests/test_arguments.py", "-x", "-k", "another_dtype"),
    ),
    Mutation(
        "padding-free: nobody asks whether the host keeps up here",
        "stack_choice.py",
        "if watch is None or not watch.waits_for_host:",
        "if True:",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: every rank goes by its own host",
        "stack_choice.py",
        "or _has_company()",
        "or False",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: the clock decides where results must not vary",
        "stack_choice.py",
        "or torch.are_deterministic_algorithms_enabled()\n        or _has",
        "or _has",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: 32 bits go by the times of 16",
        "stack_choice.py",
        "or dtype.itemsize != 2",
        "or False",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: the device's time is that of one layer",
        "stack_choice.py",
        "hidden = states.shape[-1] * stack.depth",
        "hidden = states.shape[-1]",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: encoders go by the times of decoders",
        "stack_host.py",
        "self.decoder if causal else self.encoder",
        "self.encoder if causal else self.decoder",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: a training step is judged as a forward",
        "stack_host.py",
        "        if self.training:\n            device_us",
        "        if False:\n            device_us",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: waiting for the device counts as the host's time",
        "stack_host.py",
        "if self.packed_us < _DEVICE_BOUND * us or",
        "if True or",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: a host that was busy is never asked again",
        "stack_host.py",
        "return self._passed % _AGAIN == 0",
        "return False",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: the first forward, which builds, counts as one of the host's",
        "stack_host.py",
        "if len(known) >= _FEWEST else None",
        "if known else None",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: a copy takes another machine's host with it",
        "stack_host.py",
        "def __reduce__(self)",
        "def _reduce(self)",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: forwards that wait for the host make a device look slow",
        "stack_fit.py",
        "        if sample.padded_us >= _DEVICE_BOUND * shortest:\n            work",
        "        if True:\n            work",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: layers that run several times count once",
        "stacks.py",
        "return total * self.depth / len(self.layers)",
        "return total",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: adapters count the layer inside of them twice",
        "stacks.py",
        "if not module._modules and isinstance",
        "if isinstance",
        STACK_HOST,
    ),
    Mutation(
        "padding-free: packs for compiled layers",
        "stack_choice.py",
        "if any(map(_is_compiled, stack.layers)):",
        "if False:",
        ("tests/test_padding_free.py", "-x", "-k", "compiled_by_themselves"),
    ),
    Mutation(
        "what is as fast waits for kernels of another",
        "first_use.py",
        "all(rent.loss_us <= TIE * best for rent in rents)",
        "False",
        ("tests/test_first_use.py",),
    ),
    Mutation(
        "padding of a row is left unwritten",
        "layouts.py",
        "written = q_length if plan.is_packed else np.full_like(q_length, plan.q_len)",
        "written = q_length",
        TRITON,
    ),
    Mutation(
        "the Triton kernel sees what comes after a query",
        "backends/triton_varlen.py",
        "        right = 0\n",
        "        right = _NO_BOUND\n",
        TRITON,
    ),
    Mutation(
        "queries of other tokens than the keys are taken for padding",
        "backends/triton_varlen.py",
        "plan.sequence_bounds(packs_queries(plan, call))",
        "plan.sequence_bounds(True)",
        TRITON,
    ),
    Mutation(
        "what lies anywhere is loaded 16 bytes at a time",
        "backends/triton_varlen.py",
        " or address % 16",
        "",
        TRITON,
    ),
    Mutation(
        "rows that begin anywhere are loaded 16 bytes at a time",
        "backends/triton_varlen.py",
        " or bits % 8",
        "",
        TRITON,
    ),
    Mutation(
        "heads of a group share the tiles of long sequences",
        "backends/flash_attention_3.py",
        "pack_gqa = False if _heads_apart(plan, call) else None",
        "pack_gqa = None",
        ("tests/test_backends_matrix.py", "-k", "stay_apart"),
    ),
    Mutation(
        "padding read in place counts as keys",
        "layouts.py",
        "used[1::2] = sequences.k_length",
        "used[1:-1] = 1",
        MATRIX,
    ),
    Mutation(
        "a causal call goes by key bounds although a row ends early",
        "backends/flash.py",
        "return plan.padding is Padding.LEFT",
        "return True",
        MATRIX,
    ),
    Mutation(
        "holes are read in place",
        "backends/flash.py",
        "if plan.is_packed or sequences is None or not sequences.contiguous:",
        "if plan.is_packed or sequences is None:",
        MATRIX,
    ),
    Mutation(
        "keys of the padding come before its queries",
        "layouts.py",
        "cu_k = np.insert(cu_k, np.arange(1, len(cu_k), 2), cu_k[:-1:2])",
        "cu_k = np.insert(cu_k, np.arange(2, len(cu_k) + 1, 2), cu_k[1::2])",
        PACKING,
    ),
    Mutation(
        "large right padding is computed",
        "backends/flash.py",
        "if not (in_place and skipping_pays(plan, call)):",
        "if True:",
        PACKING,
    ),
    Mutation(
        "keys of a cache are copied in training",
        "backends/flash.py",
        "long = call.token_major_keys and plan.q_len >= BACKWARD_QUERIES",
        "long = plan.q_len >= BACKWARD_QUERIES",
        PACKING,
    ),
    Mutation(
        "rows of keys in a cache are taken for rows by token",
        "layouts.py",
        "k_start = sequences.row * pitch + sequences.k_start",
        "k_start = sequences.row * plan.kv_len + sequences.k_start",
        PACKING,
    ),
    Mutation(
        "keys that lie apart are read as if they lay together",
        "packing.py",
        "fits = fits and token_stride > 0 and batch_stride == pitch * token_stride",
        "fits = fits and token_stride > 0",
        PACKING,
    ),
    Mutation(
        "one figure serves keys and values that lie apart",
        "packing.py",
        "return token_major, 0 if pitches or batch",
        "return token_major, 0 if batch",
        PACKING,
    ),
    Mutation(
        "keys with the memory of others in between count as a whole cache",
        "packing.py",
        "if batch_stride == heads * head_stride and head_stride == length * token_stride > 0:",
        "if batch_stride == heads * head_stride:",
        PACKING,
    ),
    Mutation(
        "NaN before the first token of a row is not cleared",
        "layouts.py",
        "first = np.sort(np.concatenate([rows, start + length]))",
        "first = np.sort(np.concatenate([rows + width, start + length]))",
        NAN,
    ),
    Mutation(
        "NaN behind a row is not cleared",
        "layouts.py",
        "gaps = _table(parts[3])",
        "gaps = None",
        NAN,
    ),
    Mutation(
        "NaN behind a row is not cleared where the queries in use are told",
        "layouts.py",
        "cleared[: len(tails), :2] = tails",
        "cleared[: len(tails), 2:] = tails",
        PACKING,
    ),
    Mutation(
        "outputs of padding are not cleared",
        "layouts.py",
        "cleared[: len(unwritten), 2:] = unwritten",
        "pass",
        PACKING,
    ),
    Mutation(
        "programs for the outputs of the first gap alone",
        "layouts.py",
        "longest_gap=int((unwritten[:, 1] - unwritten[:, 0]).max(initial=0)),",
        "longest_gap=int((unwritten[:, 1] - unwritten[:, 0])[:1].sum()),",
        PACKING,
    ),
    Mutation(
        "queries of padding are used",
        "layouts.py",
        "arrays = [cu_q, cu_k, q_length, sequences.k_length, cleared.reshape(-1)]",
        "arrays = [cu_q, cu_k, np.diff(cu_q), sequences.k_length, cleared.reshape(-1)]",
        PACKING,
    ),
    Mutation(
        "batches without padding count as some with it",
        "measure.py",
        " or plan.is_padded != own.is_padded:",
        ":",
        ("tests/test_calibrate.py", "-k", "padding_are_not_prepared"),
    ),
    Mutation(
        "heads that lie apart are taken for one run of memory",
        "tails.py",
        "if heads == 1 or head_stride == dim else",
        "if heads >= 1 else",
        TAILS,
    ),
    Mutation(
        "the last tokens of a tail are not cleared",
        "tails.py",
        "tails = -(-LONGEST_TILE // tokens) * shares",
        "tails = max(1, (LONGEST_TILE - 1) // tokens) * shares",
        TAILS,
    ),
    Mutation(
        "a kernel built for aligned values reads others",
        "tails.py",
        "(values.dtype, address % 16 == 0,",
        "(values.dtype, True,",
        TAILS,
    ),
    Mutation(
        "a kernel built for aligned outputs writes others",
        "tails.py",
        "output_at % 16 == 0, facts,",
        "True, facts,",
        TAILS,
    ),
    Mutation(
        "the last outputs of a gap are not cleared",
        "tails.py",
        "runs = -(-longest_gap * output_width // _RUN)",
        "runs = longest_gap * output_width // _RUN",
        TAILS,
    ),
    Mutation(
        "what a kernel was built for is launched on another device",
        "triton_launch.py",
        "index = current if device.index is None else device.index",
        "index = current",
        TAILS,
    ),
    Mutation(
        "copies of keys count for nothing",
        "backends/flash.py",
        "    if call.copies_keys:",
        "    if False:",
        PACKING,
    ),
    Mutation(
        "launches count although the device is busier",
        "surroundings.py",
        "host_us - max(0.0, slack_us)",
        "host_us",
        ("tests/test_surroundings.py",),
    ),
    Mutation(
        "every token reads the weights anew",
        "surroundings.py",
        "device_us = max(flops / self.flops_per_us, read / self.bytes_per_us)",
        "device_us = flops / self.flops_per_us",
        ("tests/test_surroundings.py",),
    ),
    Mutation(
        "gradients of gathered tokens are put into the wrong rows",
        "packing.py",
        "return scatter(grad, index, batch, length), None",
        "return scatter(grad.flip(0), index, batch, length), None",
        MATRIX,
    ),
    Mutation(
        "rows of a prepared mask are not aligned",
        "dense.py",
        "aligned = -(-width // _ALIGNMENT) * _ALIGNMENT",
        "aligned = width",
        PLAN,
    ),
    Mutation(
        "a shape is built although it came but once",
        "first_use.py",
        "if shape.lost_us * _MORE_TO_COME >= self.build_us:",
        "if shape.lost_us >= 0:",
        ("tests/test_first_use.py",),
    ),
    Mutation(
        "kinds: every thread builds kernels of its own",
        "first_use.py",
        "key: Hashable = backend.built_for(plan, call)",
        "key: Hashable = None",
        ("tests/test_first_use.py",),
    ),
    Mutation(
        "kinds: what has to be built itself is no way to wait",
        "first_use.py",
        "or verdict.build_us * _MORE_TO_COME < build_us",
        "or False",
        ("tests/test_first_use.py",),
    ),
    Mutation(
        "kinds: what is built meanwhile costs nothing",
        "first_use.py",
        "shape.lost_us += building",
        "pass",
        ("tests/test_first_use.py",),
    ),
    Mutation(
        "kinds: building counts as a first run",
        "measure.py",
        "if kind is None or kind in self._kinds:",
        "if True:",
        ("tests/test_calibrate.py", "-k", "kinds"),
    ),
    Mutation(
        "kinds: building comes out of the time for measuring",
        "calibrate.py",
        """                self.seconds = time.monotonic() - start - patience.built_seconds
                if""",
        """                self.seconds = time.monotonic() - start
                if""",
        ("tests/test_calibrate.py", "-k", "kinds"),
    ),
    Mutation(
        "kinds: all calls of a kind pass for built ones",
        "fit.py",
        "_build_us(group.samples) if kinds is None else _kinds_us(kinds.values())",
        "_build_us(group.samples)",
        ("tests/test_fit.py", "-k", "kinds"),
    ),
    Mutation(
        "kinds: a backward reads padding in place",
        "backends/flash_attention_4.py",
        "in_place = in_place and not call.grad",
        "in_place = in_place",
        ("tests/test_backends_matrix.py", "-k", "flash_attention_4 and not gpu", "-x"),
    ),
    Mutation(
        "kinds: padding that is read in place is not cleared",
        "backends/flash_attention_4.py",
        "        if clear:\n",
        "        if False:\n",
        ("tests/test_backends_matrix.py", "-k", "flash_attention_4 and nan and not gpu"),
    ),
    Mutation(
        "kinds: a package of another signature is used",
        "backends/flash_attention_4.py",
        "return list(parameters)[:3] == needed",
        "return True or list(parameters)[:3] == needed",
        ("tests/test_flash_attention_4.py",),
    ),
    Mutation(
        "queries are gathered with the row length of the keys",
        "layouts.py",
        "offset_q = sequences.row * plan.q_len + sequences.q_start",
        "offset_q = sequences.row * plan.kv_len + sequences.q_start",
        PLAN,
    ),
    Mutation(
        "keys are gathered from their row's first slot, not from the first real token",
        "layouts.py",
        "offset_k = sequences.row * plan.kv_len + sequences.k_start - cu_k[:-1]",
        "offset_k = sequences.row * plan.kv_len - cu_k[:-1]",
        PLAN,
    ),
    Mutation(
        "tokens in the cache count as queries",
        "plan.py",
        "q_start = np.maximum(start, self.shift)",
        "q_start = np.maximum(start, 0)",
        PLAN,
    ),
    Mutation(
        "real queries among holes are counted from the first key",
        "plan.py",
        "np.count_nonzero(real[:, self.shift :], axis=1)",
        "np.count_nonzero(real[:, : self.q_len], axis=1)",
        PLAN,
    ),
    Mutation(
        "a row without a real token ends at its last slot",
        "plan.py",
        "end[length == 0] = 0",
        "pass",
        PLAN,
    ),
    Mutation(
        "rows with holes pass for rows padded on the right",
        "plan.py",
        "if end.sum() == count:",
        "if end.sum() <= count:",
        PLAN,
    ),
    Mutation(
        "rows with holes pass for rows padded on the left",
        "plan.py",
        "if length.sum() == count:",
        "if length.sum() >= count:",
        PLAN,
    ),
    Mutation(
        "padding at the start of some rows passes for right padding",
        "plan.py",
        "elif bool((start == 0).all()):",
        "elif bool((start == 0).any()):",
        PLAN,
    ),
    Mutation(
        "a causal window that just covers all keys but one is ignored",
        "plan.py",
        "return self.window < self.visible\n",
        "return self.window < self.visible - 1\n",
        PLAN,
    ),
    Mutation(
        "causal window off by one in the dense mask of a plan",
        "dense.py",
        "mask if window is None else mask & (distance < window)",
        "mask if window is None else mask & (distance <= window)",
        PLAN,
    ),
    Mutation(
        "symmetric window off by one in the dense mask of a plan",
        "dense.py",
        "return distance.abs() <= window",
        "return distance.abs() < window",
        PLAN,
    ),
    Mutation(
        "the first row's packed sequence runs into the next row",
        "plan.py",
        "    starts[:, 0] = True\n",
        "    starts[0, 0] = True\n",
        PLAN,
    ),
    Mutation(
        "a longest query of one is passed on although a sequence has none",
        "layouts.py",
        "if longest_q == 1 and total_q != len(sequences):",
        "if longest_q == 0 and total_q != len(sequences):",
        PLAN,
    ),
    Mutation(
        "the additive mask holds -inf, which makes fully masked rows NaN",
        "plan.py",
        "mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min",
        "mask, torch.zeros((), dtype=dtype, device=mask.device), -torch.inf",
        PLAN,
    ),
    Mutation(
        "a plan on another device shares its twin's choices",
        "plan.py",
        "twin.decisions = {}",
        "twin.decisions = self.decisions",
        PLAN,
    ),
    Mutation(
        "queries of cross-attention are packed with the mask of the keys",
        "packing.py",
        "return plan.is_causal or plan.is_packed or call.self_attention",
        "return plan.is_causal or plan.is_packed or plan.q_len == plan.kv_len",
        MATRIX,
    ),
    Mutation(
        "a decoding query is dropped where the mask has padding at its place",
        "packing.py",
        "if plan.q_len == 1 and not plan.is_packed:",
        "if plan.q_len == 0 and not plan.is_packed:",
        PACKING,
    ),
    Mutation(
        "tokens of layouts that do not flatten are gathered from the wrong place",
        "packing.py",
        "return tokens[index // length, index % length]",
        "return tokens[index // length, index % batch]",
        PACKING,
    ),
    Mutation(
        "windows are packed across holes",
        "packing.py",
        "if plan.padding is Padding.HOLES:",
        "if plan.padding is Padding.UNKNOWN:",
        REFUSALS,
    ),
    Mutation(
        "a plan is used for a call of another length",
        "packing.py",
        "call.batch != plan.batch or call.q_len != plan.q_len or call.kv_len != plan.kv_len",
        "call.batch != plan.batch or call.q_len != plan.q_len",
        REFUSALS,
    ),
    Mutation(
        "outputs at padding are dropped although they are to be kept",
        "packing.py",
        "if call.keep_padding_output and plan.is_padded and pack_queries:",
        "if call.keep_padding_output and plan.is_packed and pack_queries:",
        REFUSALS,
    ),
    Mutation(
        "sdpa runs without a mask under any padding, not under right padding alone",
        "backends/sdpa.py",
        "and plan.padding is Padding.RIGHT",
        "and plan.is_padded",
        MATRIX,
    ),
    Mutation(
        "sdpa aligns a causal mask at the upper left although there are earlier tokens",
        "backends/sdpa.py",
        "return not plan.is_causal or call.q_len == 1 or plan.is_aligned",
        "return True",
        MATRIX,
    ),
    Mutation(
        "sdpa attends to the empty slots of a static cache",
        "backends/sdpa.py",
        "keys = slice(plan.visible) if plan.visible < call.kv_len else None",
        "keys = None",
        MATRIX,
    ),
    Mutation(
        "sdpa runs a window without a mask",
        "backends/sdpa.py",
        "if plan.is_packed or plan.window_matters or not",
        "if plan.is_packed or not",
        MATRIX,
    ),
    Mutation(
        "key/value heads are repeated in the wrong order",
        "backends/sdpa.py",
        "states = states[:, :, None].expand(batch, heads, times, length, dim)",
        "states = states[:, None].expand(batch, times, heads, length, dim)",
        MATRIX,
    ),
    Mutation(
        "the window of flash kernels is off by one",
        "backends/flash.py",
        "return (plan.window - 1, 0) if plan.is_causal",
        "return (plan.window, 0) if plan.is_causal",
        MATRIX,
    ),
    Mutation(
        "flash-attn runs its dense kernel under any padding",
        "backends/flash.py",
        "and plan.padding is Padding.RIGHT",
        "and plan.is_padded",
        MATRIX,
    ),
    Mutation(
        "torch's varlen kernel runs without a causal bound",
        "backends/torch_varlen.py",
        "window = (facts.window[0], 0)",
        "window = (facts.window[0], -1)",
        MATRIX,
    ),
    Mutation(
        "continued prefill without padding is aligned at the upper left",
        "backends/sdpa_unpadded.py",
        "shift = kv_len - q_len if plan.is_causal else 0",
        "shift = 0",
        MATRIX,
    ),
    Mutation(
        "rows of equal length that do not lie together are taken for a range",
        "backends/sdpa_unpadded.py",
        "consecutive = rows[-1] - rows[0] + 1 == len(rows)",
        "consecutive = len(rows) > 1",
        ("tests/test_backends_matrix.py", "-k", "scattered"),
    ),
    Mutation(
        "dtypes are not asked about: fp32 goes to a half-precision kernel",
        "backends/base.py",
        "if support.dtypes is not None and call.dtype not in support.dtypes:",
        "if support.dtypes is None and call.dtype is None:",
        REFUSALS,
    ),
    Mutation(
        "arguments that change the result are ignored",
        "backends/base.py",
        "for feature in sorted(call.features - support.features):",
        "for feature in sorted(support.features - support.features):",
        REFUSALS,
    ),
    Mutation(
        "writing into the mask does not discard the plan",
        "mask.py",
        "mask._state.shared = True",
        "mask._state.shared = False",
        PLAN,
    ),
    Mutation(
        "a packed batch may go through a dense mask",
        "backends/base.py",
        "if plan.is_packed and self.uses_dense_mask(plan, call):",
        "if not plan.is_packed and self.uses_dense_mask(plan, call):",
        CHOOSE,
    ),
    Mutation(
        "the slowest prediction wins",
        "choose.py",
        "shortest = min(estimate",
        "shortest = max(estimate",
        CHOOSE,
    ),
    Mutation(
        "predictions that are as good as equal count as different",
        "choose.py",
        "if estimate.us <= shortest * (1 + TIE)",
        "if estimate.us <= shortest",
        CHOOSE,
    ),
    Mutation(
        "an objective forgets how slow its choice may be",
        "choose.py",
        "if estimate.us <= bound",
        "if estimate.us <= math.inf",
        CHOOSE,
    ),
    Mutation(
        "keys in a cache share their choice with keys that lie by token",
        "choose.py",
        "        call.token_major_keys,\n",
        "",
        CHOOSE,
    ),
    Mutation(
        "a restriction to some backends is ignored",
        "choose.py",
        "able = [b for b in able if b.name in allowed]",
        "able = [b for b in able if b.name]",
        CHOOSE,
    ),
    Mutation(
        "a remembered choice is used although its backend refuses",
        "choose.py",
        "and not known.backend.refusals(plan, call)",
        "and not known.backend.last_resort",
        CHOOSE,
    ),
    Mutation(
        "the offset of a sliding cache's first slot is forgotten",
        "masking.py",
        "shift=offset - kv_offset,",
        "shift=offset,",
        PLAN,
    ),
    Mutation(
        "the offset of a static cache is read from the wrong place",
        "masking.py",
        "int(values[-1])",
        "int(values[0])",
        PLAN,
    ),
    Mutation(
        "a sliding cache reads the start of the 2D mask",
        "masking.py",
        "real_on_device = padded[:, kv_offset : kv_offset + kv_length]",
        "real_on_device = padded[:, :kv_length]",
        PLAN,
    ),
    Mutation(
        "a symmetric window passes for a causal one",
        "patterns.py",
        "if window is not None and symmetric is (base is Pattern.CAUSAL):",
        "if window is not None and base is None:",
        PLAN,
    ),
    Mutation(
        "the end of a packed sequence is not seen",
        "masking.py",
        "prepend=known.packed_ids[:, :1] - 1) != 0",
        "prepend=known.packed_ids[:, :1] - 1) > 1",
        PLAN,
    ),
    Mutation(
        "a change of the choice is not narrowed down",
        "explaining.py",
        "while high - low > max(1, high // 64):",
        "while high - low > high:",
        EXPLAIN,
    ),
    Mutation(
        "another machine is asked for this one's packages",
        "target.py",
        "        if self.here:\n",
        "        if True:\n",
        EXPLAIN,
    ),
    Mutation(
        "the compute capability of a device elsewhere is not looked at",
        "backends/base.py",
        "given = capability or _capability(call.device)",
        "given = (9, 0)",
        EXPLAIN,
    ),
    Mutation(
        "options come in the order of the backends",
        "explaining.py",
        "o.predicted_us or 0.0)",
        "0.0)",
        EXPLAIN,
    ),
    Mutation(
        "the self-test takes any output for right",
        "doctor.py",
        "if error <= allowed:",
        "if True:",
        DOCTOR,
    ),
    Mutation(
        "a backend that fails its self-test leaves the machine healthy",
        "doctor.py",
        'backend.health in ("wrong", "fails")',
        'backend.health in ("wrong",)',
        DOCTOR,
    ),
    Mutation(
        "verify allows any difference",
        "verify.py",
        "if difference > allowed:",
        "if False:",
        VERIFY,
    ),
    Mutation(
        "verify takes padding for real positions",
        "verify.py",
        "real.add(given[batch.real], right[batch.real], scale)",
        "real.add(given, right, scale)",
        VERIFY,
    ),
    Mutation(
        "a slower smart is said to pay",
        "bench.py",
        "return self.tells and self.ratio > 1",
        "return self.tells",
        VERIFY,
    ),
    Mutation(
        "padding_free is credited where it packed nothing",
        "bench.py",
        "free.packed and free.median",
        "free.median",
        VERIFY,
    ),
    Mutation(
        "the spread of few rounds counts as much as that of many",
        "bench.py",
        "few = max(1.0, math.sqrt(_STEADY / self.rounds))",
        "few = 1.0",
        VERIFY,
    ),
    Mutation(
        "rules of other devices are printed",
        "cli_show.py",
        "if when.device in (None, kind) else None",
        "if True else None",
        ("tests/test_cli.py", "-k", "show"),
    ),
    Mutation(
        "thresholds do not know what counts as equal",
        "thresholds.py",
        "us <= times[0][0] * (1 + TIE)",
        "us <= times[0][0]",
        ("tests/test_fit.py", "-k", "count_as_equal"),
    ),
    Mutation(
        "what the process says comes before what the model says",
        "control.py",
        "layers = (process, Settings(**_of_model(given)), block)",
        "layers = (Settings(**_of_model(given)), process, block)",
        CONTROL,
    ),
    Mutation(
        "equal settings are new objects",
        "control.py",
        "settings = known.get(key)",
        "settings = None",
        CONTROL,
    ),
    Mutation(
        "every layer counts as a forward",
        "record.py",
        "row.forwards += 1",
        "row.forwards += 2",
        CONTROL,
    ),
    Mutation(
        "a late CUDA error is repeated",
        "faults.py",
        'if "cuda error" in message or "out of memory" in message:',
        'if "out of memory" in message:',
        FAULTS,
    ),
    Mutation(
        "a backend that failed is asked again",
        "backends/base.py",
        "_quarantine[name, device] = reason",
        "_quarantine[name, torch.device('meta')] = reason",
        FAULTS,
    ),
    Mutation(
        "SDPA is quarantined",
        "faults.py",
        "if backend.indispensable or not is_unsupported(error):",
        "if not is_unsupported(error):",
        FAULTS,
    ),
    Mutation(
        "metadata of samples may be anything",
        "samples.py",
        'metadata.get("__metadata__") if isinstance(metadata, dict) else None',
        'metadata.get("__metadata__")',
        FUZZ,
    ),
    Mutation(
        "padding-free: kernels are told of rows without a token",
        "packed_stack.py",
        "if len(lengths) == plan.batch:",
        "if True:",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: what a forward measured waits for the garbage collector",
        "packed_stack.py",
        "self._plan = weakref.ref(plan)",
        "self._plan = lambda plan=plan: plan",
        ("tests/test_concurrency.py", "-k", "gone_with_it"),
    ),
    Mutation(
        "padding-free: a backend that builds a mask of all tokens passes for one that does not",
        "stack_choice.py",
        "not (backend.last_resort or backend.uses_dense_mask(packed, call))",
        "not backend.last_resort",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: positions shared by all rows are gathered by the place in the batch",
        "packed_stack.py",
        "index = self._index(device) % self.length",
        "index = self._index(device)",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: padding positions of outputs are not zeros",
        "packed_stack.py",
        "padded = states.new_zeros(",
        "padded = states.new_ones(",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: packed sequences begin one token before their own",
        "packed_stack.py",
        "np.cumsum(lengths) - lengths",
        "np.cumsum(lengths) - 1",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: packed layers lose their window",
        "packed_stack.py",
        "plan.device, window=plan.window, packed=row",
        "plan.device, packed=row",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: a forward with tokens in the cache is packed",
        "packed_stack.py",
        "if not plan.is_aligned:",
        "if False:",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: the cache keeps the packed layout",
        "packed_stack.py",
        "cache_class.update(self, *padded,",
        "cache_class.update(self, key_states, value_states,",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: all tensors of a layer are taken for the first that was packed",
        "packed_stack.py",
        "known = self._packed.get(id(values))",
        "known = next(iter(self._packed.values()), None)",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: arguments nobody knows are left as they are",
        "packed_stack.py",
        'return f"the layers get {name}, which cannot be packed"',
        "continue",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: labels are compared with the prediction at their own position",
        "heads.py",
        "labels[:, 1:], mask[:, :-1]",
        "labels[:, :-1], mask[:, :-1]",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: a pooler may read a padding position",
        "stack_choice.py",
        "(sequences.k_start == 0) & (sequences.k_length > 0)",
        "sequences.k_length >= 0",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: what follows a prompt may be made from a padding position",
        "stack_choice.py",
        "sequences.k_start + sequences.k_length == plan.visible",
        "sequences.k_length >= 0",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: a forward never ends",
        "padding_free.py",
        "_FRAME.reset(frame.token)",
        "pass",
        ("tests/test_padding_free.py", "-k", "forward_that_fails"),
    ),
    Mutation(
        "padding-free: what a norm outside of the stack makes of zeros stays",
        "padding_free.py",
        "not packing.has_unpacked(states)",
        "False",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: a layer that cannot be packed is packed",
        "padding_free.py",
        "if state.plan is None:",
        "if False:",
        PADDING_FREE,
    ),
    Mutation(
        "padding-free: rules hold for less padding than they say",
        "stack_rule.py",
        "padding_share >= self.min_padding_share",
        "padding_share <= self.min_padding_share",
        PADDING_FREE,
    ),
    Mutation(
        "stacks: a rule lets in batches where packing lost",
        "stack_fit.py",
        "(lost >= _ALIKE * np.array((share, work))).all(axis=1).any()",
        "False",
        STACKS,
    ),
    Mutation(
        "late hosts count as much as others",
        "fit.py",
        "_LATE_HOST = 0.1",
        "_LATE_HOST = 1.0",
        FIT,
    ),
    Mutation(
        "decoding: a wave that is not full is shorter",
        "backends/splitting.py",
        "share = 0.0 if not rest else last if 2 * rest <= slots else 1.0",
        "share = rest / slots",
        SPLITTING,
    ),
    Mutation(
        "decoding: blocks cut keys until no place is empty",
        "backends/splitting.py",
        "    if step.blocks < _FULL * slots:",
        "    if step.blocks < slots:",
        SPLITTING,
    ),
    Mutation(
        "decoding: parts are of the cache where sequences are shorter",
        "backends/splitting.py",
        "busy = (-(-lengths[:, None] // part)).sum(0)",
        "busy = (-(-np.full_like(lengths, visible)[:, None] // part)).sum(0)",
        SPLITTING,
    ),
    Mutation(
        "decoding: windows are cut as if all keys were seen",
        "backends/splitting.py",
        "return step.visible >= _FEWEST_KEYS and not step.windowed and",
        "return step.visible >= _FEWEST_KEYS and",
        SPLITTING,
    ),
    Mutation(
        "decoding: unpadded steps let the kernel choose its parts",
        "backends/flash_attention_2.py",
        "    if how is Route.KEY_BOUNDS or parts:",
        "    if how is Route.KEY_BOUNDS:",
        SPLITTING,
    ),
    Mutation(
        "decoding: the kernel is not told its parts",
        "backends/flash_attention_2.py",
        "                True,\n                parts,",
        "                True,\n                0,",
        SPLITTING,
    ),
    Mutation(
        "decoding: several queries are cut as one",
        "backends/flash_attention_2.py",
        "if call.q_len > 1 or plan.sequences is None or not (",
        "if plan.sequences is None or not (",
        SPLITTING,
    ),
    Mutation(
        "encoders wait for the host as decoders do",
        "surroundings.py",
        "_ENCODER_HOST = 0.4",
        "_ENCODER_HOST = 1.0",
        ("tests/test_surroundings.py", "-x"),
    ),
    Mutation(
        "keys of another batch reach kernels that do not look",
        "layer_call.py",
        "if not query.shape[0] == key.shape[0] == value.shape[0]:",
        "if False:",
        ("tests/test_arguments.py", "-k", "one_row"),
    ),
    Mutation(
        "decoding steps of nearly as many sequences share a choice",
        "choose.py",
        "call.batch if call.q_len == 1 else None,",
        "call.q_len == 1,",
        ("tests/test_choose.py", "-x"),
    ),
    Mutation(
        "decoding: cuDNN cuts at two blocks per processor",
        "backends/splitting.py",
        "2 * parts * step.blocks < room and",
        "2 * parts * step.blocks <= room and",
        SPLITTING,
    ),
    Mutation(
        "features of another kernel are used",
        "features.py",
        "found = self._amounts.get(kernel)",
        "found = next(iter(self._amounts.values()), None)",
        FIT,
    ),
    Mutation(
        "what hardly counts in a few samples may cost anything",
        "least_squares.py",
        "pull = np.maximum(pull, strength**0.5 * prior_shares)",
        "pass",
        FIT,
    ),
    Mutation(
        "every mask has a row per query",
        "features.py",
        "call.q_len if differs else 1",
        "call.q_len",
        FIT,
    ),
    Mutation(
        "a mask spares a kernel what a causal pattern does",
        "features.py",
        "dense if work.masked else visible",
        "visible",
        FIT,
    ),
    Mutation(
        "few samples of a layout stay alone",
        "fit.py",
        "if len(group.samples) < _BENDING_SAMPLES[group.regime.mode]:",
        "if False:",
        FIT,
    ),
    Mutation(
        "a mask that was not measured has no model",
        "cost.py",
        "layouts.append(_STAND_INS[regime.layout])",
        "pass",
        ("tests/test_profile.py",),
    ),
    Mutation(
        "2D masks of other dtypes are read as they are",
        "masking.py",
        ".to(torch.bool)\n",
        "\n",
        ("tests/test_mask.py",),
    ),
    Mutation(
        "the caller's 2D mask is not copied",
        "plan.py",
        "real_on_device.clone()",
        "real_on_device",
        ("tests/test_mask.py",),
    ),
    Mutation(
        "what a mask holds is made for inference alone",
        "plan.py",
        "if torch.is_inference_mode_enabled():",
        "if False:",
        ("tests/test_mask.py",),
    ),
    Mutation(
        "a plan on another device holds the first one",
        "plan.py",
        "twin._twins = {}",
        "twin._twins = self._twins",
        ("tests/test_concurrency.py", "-k", "measured_is_gone"),
    ),
    Mutation(
        "padding-free: two masks with holes count as the same",
        "packed_stack.py",
        "if not (mine.contiguous and others.contiguous):",
        "if mine.contiguous is not others.contiguous:",
        ("tests/test_padding_free.py", "-k", "need_the_same_padding"),
    ),
    Mutation(
        "preparation is counted for all backends together",
        "measure.py",
        "kind = (backend, workload.mode, workload.side, workload.dtype)",
        "kind = (workload.mode, workload.side, workload.dtype)",
        ("tests/test_calibrate.py", "-k", "preparation_is_timed"),
    ),
    Mutation(
        "rows of several lengths run one after the other on a GPU",
        "backends/sdpa_unpadded.py",
        'if call.device.type != "cpu" and plan.is_padded and not plan.is_uniform:',
        "if False:",
        CHOOSE,
    ),
    Mutation(
        "rows that lie alike share their choice with others",
        "choose.py",
        "        plan.is_uniform,\n",
        "",
        CHOOSE,
    ),
    Mutation(
        "rows lie alike if their keys do",
        "plan.py",
        "spans = (sequences.q_start, sequences.q_length, sequences.k_start, sequences.k_length)",
        "spans = (sequences.k_length,)",
        PLAN,
    ),
    Mutation(
        "thresholds name what is not considered",
        "thresholds.py",
        "if name not in NAMED or NAMED[name].set_aside(plan, call) is None",
        "if True",
        ("tests/test_fit.py", "-k", "set_aside"),
    ),
    Mutation(
        "one slow round is enough to be hopeless",
        "timing.py",
        "if round_number == 2:",
        "if round_number == 1:",
        ("tests/test_calibrate.py", "-k", "hopeless"),
    ),
    Mutation(
        "a launch takes what the burst takes on average",
        "timing.py",
        "host_us = statistics.median(",
        "host_us = statistics.fmean(",
        ("tests/test_calibrate.py", "-k", "late_call"),
    ),
    Mutation(
        "kernels of a GPU cost the pairs alone",
        "features.py",
        "tile = backend.tile(plan, call) if tiled else (1, 1)",
        "tile = (1, 1)",
        ("tests/test_fit.py", "-k", "tiles"),
    ),
    Mutation(
        "tiles of a CPU",
        "features.py",
        'tiled = call.q_len > 1 and call.device.type != "cpu"',
        "tiled = call.q_len > 1",
        ("tests/test_fit.py", "-k", "tiles"),
    ),
    Mutation(
        "the heads of a group never share a tile",
        "backends/flash_attention_3.py",
        "rows = max(1, rows // group)",
        "pass",
        ("tests/test_fit.py", "-k", "tiles"),
    ),
    Mutation(
        "the heads of a group share a tile that they fill alone",
        "backends/flash_attention_3.py",
        "if shared or _filled(",
        "if True or _filled(",
        ("tests/test_fit.py", "-k", "tiles"),
    ),
    Mutation(
        "one kernel runs as many blocks at once as another",
        "fit.py",
        "return backend.blocks_per_processor * (processors or 0)",
        "return processors or 0",
        ("tests/test_fit.py", "-k", "multiprocessor"),
    ),
    Mutation(
        "the padding that a kernel reads costs nothing in decoding",
        "backends/splitting.py",
        "return step.visible / parts *",
        "return step.longest / parts *",
        SPLITTING,
    ),
    Mutation(
        "windows hide no tiles",
        "plan.py",
        "tiles = tiles - _stairs(shift - window + 1, rows, columns, width, seen)",
        "pass",
        PLAN,
    ),
    Mutation(
        "a row of tiles reaches beyond the last key",
        "plan.py",
        "high = np.minimum(np.maximum(_tiles(highest * size - first, step), start), terms)",
        "high = terms",
        PLAN,
    ),
    Mutation(
        "points under a line are counted by columns alone",
        "plan.py",
        "if not terms.any():",
        "if True:",
        PLAN,
    ),
    Mutation(
        "queries far behind the last key see some",
        "plan.py",
        "        q = np.minimum(q, k + window)\n",
        "",
        PLAN,
    ),
    Mutation(
        "what is counted is counted again on another device",
        "plan.py",
        "twin._derived = self._without_tensors()",
        "twin._derived = {}",
        PLAN,
    ),
    Mutation(
        "folded heads drop nothing",
        "backends/sdpa.py",
        "dropout_p=call.dropout,\n        scale=call.scaling,\n    )\n    return attended",
        "scale=call.scaling,\n    )\n    return attended",
        FOLDING,
    ),
    Mutation(
        "masks of fewer dimensions are taken as they are",
        "backends/sdpa.py",
        "if mask is not None and mask.ndim < 4:",
        "if False:",
        FOLDING,
    ),
    Mutation(
        "one query is never folded for want of a kernel",
        "backends/sdpa.py",
        "if not grouped and foldable and query.shape[2] == 1:",
        "if False:",
        FOLDING,
    ),
    Mutation(
        "many queries are folded",
        "backends/sdpa.py",
        "_FEW_QUERIES = 8",
        "_FEW_QUERIES = 63",
        FOLDING,
    ),
    Mutation(
        "the math kernel may hold any number of scores",
        "backends/sdpa.py",
        "if scores > _MOST_SCORES:",
        "if False:",
        FOLDING,
    ),
    Mutation(
        "costs of unknown backends are read",
        "cost.py",
        "if cost.backend not in NAMED:",
        "if False:",
        ("tests/test_profile.py", "-k", "unknown_backends"),
    ),
    Mutation(
        "one late call counts where caches are flushed",
        "timing.py",
        "return statistics.median(host_us), statistics.fmean(device_us)",
        "return statistics.fmean(host_us), statistics.fmean(device_us)",
        ("tests/test_calibrate.py", "-k", "late_call"),
    ),
    Mutation(
        "folded heads share the mask's rows wrongly",
        "backends/sdpa.py",
        "mask = mask.repeat(1, 1, call.group_size, 1)",
        "mask = mask.repeat_interleave(call.group_size, 2)",
        FOLDING,
    ),
    Mutation(
        "causal queries are folded without a mask",
        "backends/sdpa.py",
        "foldable = not causal and (mask is None or mask.shape[1] == 1)",
        "foldable = mask is None or mask.shape[1] == 1",
        FOLDING,
    ),
    Mutation(
        "a bias of each head is folded",
        "backends/sdpa.py",
        "foldable = not causal and (mask is None or mask.shape[1] == 1)",
        "foldable = not causal",
        FOLDING,
    ),
    Mutation(
        "grouped heads in float32 go to the math kernel of a GPU",
        "backends/sdpa.py",
        "return blocks < (processors(call.device) or 0)",
        "return True",
        FOLDING,
    ),
    Mutation(
        "first runs are fitted only once",
        "measure.py",
        "if count > _REFIT * fitted:",
        "if not fitted:",
        ("tests/test_calibrate.py", "-k", "fitted_anew"),
    ),
    Mutation(
        "a quick run never trains the last head_dim",
        "grid.py",
        "max(1, round(turns * _SHARES[family.mode]))",
        "round(turns * _SHARES[family.mode])",
        ("tests/test_calibrate.py", "-k", "quick_run_knows"),
    ),
    Mutation(
        "verify compares eager with itself in copies of a configuration",
        "models.py",
        "config._attn_implementation_internal = name",
        "pass",
        VERIFY,
    ),
    Mutation(
        "stacks: only the very same padding speaks against packing",
        "stack_fit.py",
        "_ALIKE = 0.9",
        "_ALIKE = 1.0",
        STACKS,
    ),
    Mutation(
        "stacks: the default holds whatever was measured",
        "stack_fit.py",
        "if not lost:",
        "if True:",
        STACKS,
    ),
    Mutation(
        "stacks: any gain is enough",
        "stack_fit.py",
        "lost = points[[sample.speedup < 1 + MARGIN for",
        "lost = points[[sample.speedup < 1 for",
        STACKS,
    ),
    Mutation(
        "stacks: what the rounds leave open does not count",
        "stack_fit.py",
        "(1 - sample.spread / math.sqrt(max(1, sample.rounds)))",
        "1",
        STACKS,
    ),
    Mutation(
        "stacks: the work of a whole batch does not count",
        "stack_rule.py",
        "spared_work >= self.min_work * padding_share",
        "spared_work >= 0",
        STACKS,
    ),
    Mutation(
        "stacks: a search takes the first power that pays",
        "stack_measure.py",
        "while level - lost > 1 and lost >= lowest:",
        "while False:",
        STACKS,
    ),
    Mutation(
        "stacks: both ways are timed without hooks",
        "stack_measure.py",
        "padding_free(model, always=True) if packed else nullcontext()",
        "nullcontext()",
        STACKS,
    ),
    Mutation(
        "stacks: timed under the profile of before",
        "calibrate.py",
        "with profiles.in_force(made, device):",
        "if True:",
        STACKS,
    ),
    Mutation(
        "stacks: the sweep leaves them no time",
        "calibrate.py",
        "until = budget - stack_seconds(budget)",
        "until = budget",
        STACKS,
    ),
    Mutation(
        "explain: the head size stands for the hidden size",
        "explaining.py",
        "hidden = heads * head_dim if hidden is None else hidden",
        "hidden = head_dim",
        ("tests/test_explain.py", "-x", "-k", "padding_free"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one mutation."""

    mutation: Mutation
    #: "caught", or why it was not.
    verdict: str
    #: The first test that failed, and the line that was changed.
    test: str = ""
    line: int = 0
    seconds: float = 0.0


def place(mutation: Mutation) -> tuple[str, int]:
    """(the mutated text of the file, the line of the change).

    Raises:
        ValueError: the expression is not there exactly once.
    """
    text = (ROOT / SOURCE / mutation.file).read_text()
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(f"found {found} times, expected once")
    line = text[: text.index(mutation.old)].count("\n") + 1
    return text.replace(mutation.old, mutation.new), line


def copy_repository(folder: Path) -> None:
    """What the tests need of the repository."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, folder / name)


class Run:
    """Pytest in a copy until the first failure, in a process that has torch imported already."""

    def __init__(self, tests: Sequence[str], file: str = "", text: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name).resolve()
        copy_repository(folder)
        if file:
            (folder / SOURCE / file).write_text(text)
        self._log = folder / "log.txt"
        self._start = time.monotonic()
        self._took: float | None = None
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_pytest, args=(folder, self._log, list(tests)))
        self._process.start()

    def ended(self) -> bool:
        """Whether there is a result; a run that takes too long is ended."""
        if self._process.is_alive() and self.seconds > TIMEOUT_S:
            self._process.kill()
            self._process.join()
        if self._process.is_alive():
            return False
        self._took = self.seconds
        return True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start if self._took is None else self._took

    def result(self) -> tuple[int, str]:
        """(exit status of pytest, what it printed)."""
        output = self._log.read_text() if self._log.exists() else ""
        self._folder.cleanup()
        status = self._process.exitcode
        assert status is not None
        return status, output


def _pytest(folder: Path, log: Path, tests: list[str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.dont_write_bytecode = True
    here = {"", str(ROOT), str(ROOT / "src")}
    sys.path[:] = [str(folder / "src"), str(folder)] + [p for p in sys.path if p not in here]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    assert "smartattn" not in sys.modules

    import smartattn

    # An installed package must not stand in for the copy.
    assert Path(str(smartattn.__file__)).is_relative_to(folder), smartattn.__file__

    import hypothesis
    import pytest

    # A failure is enough; nobody needs the smallest one.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutation", phases=phases)
    hypothesis.settings.load_profile("mutation")
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(status)


def run_all(runs: Iterator[Run | Outcome], jobs: int) -> Iterator[Run | Outcome]:
    """Starts so many runs at once and yields each in its turn when it has ended."""
    active: collections.deque[Run | Outcome] = collections.deque()
    more = True
    while more or active:
        while more and sum(isinstance(r, Run) and not r.ended() for r in active) < jobs:
            started = next(runs, None)
            more = started is not None
            if started is not None:
                active.append(started)
        while active and (isinstance(active[0], Outcome) or active[0].ended()):
            yield active.popleft()
        time.sleep(0.05)


def start(mutation: Mutation) -> Run | Outcome:
    """Applies a mutation to a copy and starts its tests there."""
    try:
        text, _ = place(mutation)
    except (OSError, ValueError) as error:
        return Outcome(mutation, f"does not apply: {error}")
    return Run(mutation.tests, mutation.file, text)


def judge(mutation: Mutation, run: Run | Outcome) -> Outcome:
    """What the tests said."""
    if isinstance(run, Outcome):
        return run
    seconds = run.seconds
    _, line = place(mutation)
    status, output = run.result()
    if status == 0:
        return Outcome(mutation, "survived", line=line, seconds=seconds)
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    if status != 1 or failed is None:
        return Outcome(mutation, f"pytest ended with status {status}", line=line, seconds=seconds)
    return Outcome(mutation, "caught", failed.group(1), line, seconds)


def baseline(mutations: Sequence[Mutation], jobs: int) -> list[str]:
    """Problems of the tests on a copy without any mutation; they must pass there."""
    problems = []
    distinct = sorted({mutation.tests for mutation in mutations})
    for tests, run in zip(distinct, run_all(map(Run, distinct), jobs), strict=True):
        assert isinstance(run, Run)
        status, output = run.result()
        if status != 0:
            tail = "\n".join(output.splitlines()[-8:])
            problems.append(f"{' '.join(tests)} without a mutation, status {status}:\n{tail}")
    return problems


def report(outcomes: Sequence[Outcome]) -> str:
    """The table of all mutations."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Mutations",
        "",
        "Load-bearing lines, broken one at a time in a copy of the repository, and the first test",
        "that fails then. The same tests pass without a mutation. Written by",
        f"`python -m tests.mutations`, {today}.",
        "",
        f"**{caught} of {len(outcomes)} caught.**",
        "",
        "| # | what breaks | where | instead of | now | caught by |",
        "| ---: | --- | --- | --- | --- | --- |",
    ]
    for number, outcome in enumerate(outcomes, 1):
        mutation = outcome.mutation
        verdict = f"`{_cell(outcome.test)}`" if outcome.test else f"**{_cell(outcome.verdict)}**"
        cells = [
            str(number),
            mutation.what,
            f"{mutation.file}:{outcome.line}" if outcome.line else mutation.file,
            f"`{_cell(mutation.old)}`",
            f"`{_cell(mutation.new)}`",
            verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.removeprefix("tests/").split()).replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    """Runs the mutations and writes the report; returns 1 if one was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reports" / "mutations.md")
    parser.add_argument("--only", default="", help="mutations whose description has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations that run at once")
    options = parser.parse_args(arguments)
    for module in ("torch", "transformers", "hypothesis", "pytest", "pydantic"):
        importlib.import_module(module)
    mutations = [mutation for mutation in MUTATIONS if options.only in mutation.what]
    for problem in (problems := baseline(mutations, options.jobs)):
        print(problem)
    if problems:
        return 1
    outcomes = []
    runs = run_all(map(start, mutations), options.jobs)
    for mutation, run in zip(mutations, runs, strict=True):
        outcome = judge(mutation, run)
        outcomes.append(outcome)
        detail = outcome.test or mutation.file
        took = f"{outcome.seconds:5.0f} s"
        print(f"{outcome.verdict:10} {took}  {mutation.what}: {detail}", flush=True)
    if not options.only:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(outcomes))
        print(f"wrote {options.out}")
    escaped = [outcome for outcome in outcomes if outcome.verdict != "caught"]
    print(f"{len(outcomes) - len(escaped)} of {len(outcomes)} caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
