"""Kernels in Triton; importing this module needs it."""

from __future__ import annotations

import triton
import triton.language as tl


# The table of a layout lies behind others, anywhere, and gaps have any length: one kernel for all,
# since one that is not built beforehand may fail in a forward.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["pieces", "shares", "tails"], do_not_specialize_on_alignment=["gaps"]
)
def clear_kernel(  # type: ignore[no-untyped-def]
    values,
    output,
    gaps,
    pieces,
    token_stride,
    part_stride,
    width,
    shares,
    tails,
    output_width,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """See :func:`smartattn.tails.clear`; each program is one of so many ``pieces`` of a gap.

    The first ``tails`` pieces are of values, which ``shares`` programs have of the same tokens;
    those that follow are runs of outputs, of which a token has ``output_width`` elements.
    """
    row = gaps + tl.program_id(0) // pieces * 4
    piece = tl.program_id(0) % pieces
    if piece < tails:
        first = tl.load(row) + piece // shares * TOKENS
        last = tl.load(row + 1)
        if first < last:
            share = piece % shares
            blocks = tl.cdiv(width, ELEMENTS)
            part = share // blocks
            token = first + tl.arange(0, TOKENS)
            element = share % blocks * ELEMENTS + tl.arange(0, ELEMENTS)
            offset = token.to(tl.int64)[:, None] * token_stride + element[None, :]
            pointer = values + part.to(tl.int64) * part_stride + offset
            inside = (token < last)[:, None] & (element < width)[None, :]
            found = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
            # Infinity less itself is not a number, and that is unequal to everything.
            bad = (found - found) != 0.0
            if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
                tl.store(pointer, 0.0, mask=inside & bad)
    else:
        begin = tl.load(row + 2).to(tl.int64) * output_width
        size = tl.load(row + 3).to(tl.int64) * output_width - begin
        done = (piece - tails).to(tl.int64) * RUN
        if done < size:
            offset = tl.arange(0, RUN)
            zeros = tl.zeros([RUN], dtype=output.dtype.element_ty)
            tl.store(output + begin + done + offset, zeros, mask=offset < size - done)


# Strides and sizes come in units of 8 elements, so that it is known that 16 bytes may be moved at
# once; all of them differ from batch to batch.
_MOVED = (
    *("count", "from_length", "to_length", "eighths", "blocks"),
    *("from_row", "from_token", "from_part", "to_row", "to_token", "to_part"),
)


@triton.jit(do_not_specialize=_MOVED)  # type: ignore[untyped-decorator]
def move_kernel(  # type: ignore[no-untyped-def]
    states,
    index,
    target,
    count,
    from_length,
    to_length,
    eighths,
    blocks,
    from_row,
    from_token,
    from_part,
    to_row,
    to_token,
    to_part,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """See :func:`smartattn.moves.moved`. Programs are (tokens of the target, block of a part)."""
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1) // blocks
    element = tl.program_id(1) % blocks * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    chosen = tl.load(index + place, mask=inside, other=-1).to(tl.int32)
    # In 64 bits, as the products with strides have to be.
    source = (chosen // from_length).to(tl.int64) * from_row
    source += (chosen % from_length).to(tl.int64) * from_token + part.to(tl.int64) * from_part
    goal = (place // to_length).to(tl.int64) * to_row
    goal += (place % to_length).to(tl.int64) * to_token + part.to(tl.int64) * to_part
    there = element < eighths * 8
    found = tl.load(
        states + source[:, None] * 8 + element[None, :],
        mask=(chosen >= 0)[:, None] & there[None, :],
        other=0.0,
    )
    tl.store(
        target + goal[:, None] * 8 + element[None, :], found, mask=inside[:, None] & there[None, :]
    )


# Lengths and strides differ from batch to batch: one kernel for all. Strides come in units of 8
# elements, so that it is known that 16 bytes may be loaded at once.
_ANY = (
    *("q_row", "q_head", "q_token", "k_row", "k_head", "k_token", "v_row", "v_head", "v_token"),
    *("sequences", "q_len", "heads", "group", "shift", "left", "right"),
)


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    table,
    scale,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    sequences,
    q_len,
    heads,
    group,
    shift,
    left,
    right,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of sequences where they lie in padded tensors, with zeros between them.

    Programs are (tile, key/value head, sequence). A tile holds ``ROWS`` queries: those of all heads
    of the group, one token after the other, beginning with the sequence's first one; tiles behind
    its last one write the zeros of the padding. See :class:`smartattn.layouts.SequenceBounds` for
    ``table``. A query at position p sees the keys from p - ``left`` to p + ``right``, and ``scale``
    is that of the scores times log2(e). ``WIDTH`` is ``DIM`` or the next power of two.
    """
    number = tl.program_id(2)
    kv_head = tl.program_id(1)
    # The last tiles of a causal sequence walk the most keys, and had better not come last.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    row = tl.load(table + number).to(tl.int64)
    q_start = tl.load(table + sequences + number)
    q_count = tl.load(table + 2 * sequences + number)
    k_start = tl.load(table + 3 * sequences + number)
    k_end = k_start + tl.load(table + 4 * sequences + number)
    written = tl.load(table + 5 * sequences + number)
    if first < written * group:
        element = tl.arange(0, WIDTH)
        place = first + tl.arange(0, ROWS)
        number_in_row = place // group
        head = kv_head * group + place % group
        token = q_start + number_in_row
        # Behind the end of a row its left padding is left to write.
        token = tl.where(token >= q_len, token - q_len, token).to(tl.int64)
        target = output + ((row * q_len + token) * heads + head)[:, None] * DIM + element[None, :]
        store = (number_in_row < written)[:, None] & (element < DIM)[None, :]
        if first >= q_count * group:
            tl.store(target, tl.zeros([ROWS, WIDTH], dtype=output.dtype.element_ty), mask=store)
        else:
            real = number_in_row < q_count
            q_at = query + row * q_row * 8 + (token * q_token + head * q_head)[:, None] * 8
            q_mask = real[:, None] & (element < DIM)[None, :]
            queries = tl.load(q_at + element[None, :], mask=q_mask, other=0.0)
            position = q_start + shift + number_in_row
            lowest = q_start + shift + first // group
            highest = q_start + shift + tl.minimum((first + ROWS - 1) // group, q_count - 1)
            begin = k_start
            if WINDOWED:
                begin = tl.maximum(k_start, lowest - left)
            end = tl.minimum(k_end, highest + right + 1)
            # Tiles of keys that all queries see need no mask.
            whole = 0
            if not WINDOWED:
                whole = tl.maximum(tl.minimum(k_end, lowest + right + 1) - begin, 0) // KEYS
            offset = tl.arange(0, KEYS)
            k_step, v_step = k_token.to(tl.int64) * 8, v_token.to(tl.int64) * 8
            # 64 bits for where a sequence begins alone: what each thread adds must be cheap.
            k_at = key + row * k_row * 8 + kv_head.to(tl.int64) * k_head * 8 + begin * k_step
            k_at += offset[None, :] * (k_token * 8) + element[:, None]
            v_at = value + row * v_row * 8 + kv_head.to(tl.int64) * v_head * 8 + begin * v_step
            v_at += offset[:, None] * (v_token * 8) + element[None, :]
            top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
            total = tl.zeros([ROWS], dtype=tl.float32)
            sums = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
            for tile in tl.range(0, whole, num_stages=STAGES):
                done = tile * KEYS
                if WIDTH == DIM:
                    keys = tl.load(k_at + done * k_step)
                else:
                    keys = tl.load(k_at + done * k_step, mask=(element < DIM)[:, None], other=0.0)
                scores = tl.dot(queries, keys)
                higher = tl.maximum(top, tl.max(scores, 1) * scale)
                weights = tl.math.exp2(scores * scale - higher[:, None])
                shrink = tl.math.exp2(top - higher)
                total = total * shrink + tl.sum(weights, 1)
                sums = sums * shrink[:, None]
                if WIDTH == DIM:
                    values = tl.load(v_at + done * v_step)
                else:
                    values = tl.load(v_at + done * v_step, mask=(element < DIM)[None, :], other=0.0)
                sums = tl.dot(weights.to(values.dtype), values, sums)
                top = higher
            for done in tl.range(whole * KEYS, end - begin, KEYS, num_stages=STAGES):
                there = begin + done + offset
                inside = there < end
                k_mask = inside[None, :] & (element < DIM)[:, None]
                keys = tl.load(k_at + done * k_step, mask=k_mask, other=0.0)
                seen = inside[None, :] & (there[None, :] <= (position + right)[:, None])
                if WINDOWED:
                    seen = seen & (there[None, :] >= (position - left)[:, None])
                scores = tl.where(seen, tl.dot(queries, keys) * scale, -float("inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                # A row that has seen nothing yet has no largest score to subtract.
                base = tl.where(higher == -float("inf"), 0.0, higher)
                weights = tl.math.exp2(scores - base[:, None])
                shrink = tl.math.exp2(top - base)
                total = total * shrink + tl.sum(weights, 1)
                sums = sums * shrink[:, None]
                v_mask = inside[:, None] & (element < DIM)[None, :]
                values = tl.load(v_at + done * v_step, mask=v_mask, other=0.0)
                sums = tl.dot(weights.to(values.dtype), values, sums)
                top = higher
            seen_any = real & (total > 0.0)
            mean = sums / tl.where(seen_any, total, 1.0)[:, None]
            mean = tl.where(seen_any[:, None], mean, 0.0)
            tl.store(target, mean.to(output.dtype.element_ty), mask=store)
