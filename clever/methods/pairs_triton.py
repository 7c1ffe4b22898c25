"""Triton kernels of the losses on a GPU; pairs.py defines them, and imports this file only when it runs there.

With x = student / student_temp and y = (teacher - center) / teacher_temp, both losses need a norm of each row of logits,

    log_norm(x) = log( sum_k exp(p x_k) ) / p,    p = 1: exp(x - log_norm(x)) is the softmax of the row, which sums to 1
                                                  p = 2: it is the softmax's direction, a vector of length 1

and the sum of the teacher's rows q != v, P[v] = sum_q exp(y[q] - log_norm(y[q])), which is never written to memory:

    p = 1, cross-entropy:  value[v] = n[v] log_norm(x[v]) - <P[v], x[v]>      gradient[v] = n[v] o[v] - P[v]
    p = 2, cosine:         value[v] = <P[v], o[v]>                            gradient[v] = o[v] (P[v] - value[v] o[v])

with o[v] = exp(x[v] - log_norm(x[v])), n[v] the number of rows q != v, and gradients with respect to x.

A program handles one sample and a block of its outputs, for all views: the teacher's rows are read once. The sums over a row
are put together from those of its blocks in a fixed order, so that results have the same bits in every run.

Shapes: V views of the student, Q = 2 of the teacher, B samples, K outputs, C blocks of a row.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # outputs of a program; 16 per thread
WARPS = 8


@triton.jit
def _load(logits, row, k, K, scale):
    """Logits of a row, times `scale`; -inf past the end of the row."""
    x = tl.load(logits + row.to(tl.int64) * K + k, mask=k < K, other=-float("inf"))
    return x.to(tl.float32) * scale


@triton.jit
def _teacher_logits(teacher, center, row, k, K, scale):
    """(teacher - center) * scale; -inf past the end of the row."""
    c = tl.load(center + k, mask=k < K, other=0.0)
    return (_load(teacher, row, k, K, 1.0) - c) * scale


@triton.jit
def _store_sums(sums, row, block, rows, C, largest, total, product):
    """The three numbers of a block of a row; sums: [3, rows, C]."""
    at = sums + row * C + block
    tl.store(at, largest)
    tl.store(at + rows * C, total)
    tl.store(at + 2 * rows * C, product)


@triton.jit
def teacher_sums(teacher, center, sums, K, C, scale, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """Per row and block: max y, sum exp(p (y - max)), sum exp(y - max) y. Programs [Q*B, C]."""
    row, block = tl.program_id(0), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    y = _teacher_logits(teacher, center, row, k, K, scale)
    largest = tl.max(y, 0)
    e = tl.exp(y - largest)
    product = tl.sum(tl.where(e > 0.0, e * y, 0.0), 0)  # exp(-inf) * -inf is no number
    _store_sums(sums, row, block, tl.num_programs(0), C, largest, tl.sum(e if POWER == 1 else e * e, 0), product)


@triton.jit
def _targets(teacher, center, log_norms, sample, B, k, K, scale):
    """exp(y - log_norm(y)) of the two teacher views of a sample."""
    first = _teacher_logits(teacher, center, sample, k, K, scale) - tl.load(log_norms + sample)
    second = _teacher_logits(teacher, center, B + sample, k, K, scale) - tl.load(log_norms + B + sample)
    return tl.exp(first), tl.exp(second)


@triton.jit
def _other_views(first, second, view):
    """The sum of the targets of the teacher's views other than `view`, and their number."""
    both = first + second
    return tl.where(view == 0, second, tl.where(view == 1, first, both)), tl.where(view < 2, 1.0, 2.0)


@triton.jit
def student_sums(
    student, teacher, center, log_norms, sums, B, K, C, V, student_scale, teacher_scale,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row and block: max x, sum exp(p (x - max)), and <P, x> or <P, exp(x - max)>. Programs [C, B]."""
    block, sample = tl.program_id(0), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    first, second = _targets(teacher, center, log_norms, sample, B, k, K, teacher_scale)
    for view in range(V):
        P, _ = _other_views(first, second, view)
        row = view * B + sample
        x = _load(student, row, k, K, student_scale)
        largest = tl.max(x, 0)
        e = tl.exp(x - largest)
        product = tl.where(k < K, P * (x if POWER == 1 else e), 0.0)
        _store_sums(sums, row, block, V * B, C, largest, tl.sum(e if POWER == 1 else e * e, 0), tl.sum(product, 0))


@triton.jit
def _join(sums, C, POWER: tl.constexpr, BLOCKS: tl.constexpr):
    """Of a row, from the sums of its blocks: log_norm, the largest logit, the sum, and each block's weight and product."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    block = tl.arange(0, BLOCKS)
    at, mask = sums + row * C + block, block < C
    block_largest = tl.load(at, mask=mask, other=-float("inf"))
    largest = tl.max(block_largest, 0)
    weight = tl.exp(block_largest - largest)
    total = tl.sum((weight if POWER == 1 else weight * weight) * tl.load(at + rows * C, mask=mask, other=0.0), 0)
    return largest + tl.log(total) / POWER, largest, total, weight, tl.load(at + 2 * rows * C, mask=mask, other=0.0)


@triton.jit
def join_teacher(sums, log_norms, entropies, C, POWER: tl.constexpr, BLOCKS: tl.constexpr):
    """log_norm(y) of each row, and for p = 1 the entropy of its softmax. Programs [Q*B]."""
    log_norm, _, total, weight, products = _join(sums, C, POWER, BLOCKS)
    tl.store(log_norms + tl.program_id(0), log_norm)
    tl.store(entropies + tl.program_id(0), log_norm - tl.sum(weight * products, 0) / total)


@triton.jit
def join_student(sums, log_norms, values, B, C, POWER: tl.constexpr, BLOCKS: tl.constexpr):
    """log_norm(x) and the value of each row. Programs [V*B]."""
    row = tl.program_id(0)
    log_norm, largest, _, weight, products = _join(sums, C, POWER, BLOCKS)
    n = tl.where(row < 2 * B, 1.0, 2.0)
    cosine = tl.sum(weight * products, 0) * tl.exp(largest - log_norm)
    value = n * log_norm - tl.sum(products, 0) if POWER == 1 else cosine
    tl.store(log_norms + row, log_norm)
    tl.store(values + row, value)


@triton.jit
def student_gradient(
    grad_output, student, teacher, center, teacher_log_norms, log_norms, values, gradient, B, K, V,
    student_scale, teacher_scale, gradient_scale, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient[v] of the module's docstring, times grad_output * gradient_scale. Programs [C, B]."""
    block, sample = tl.program_id(0), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    first, second = _targets(teacher, center, teacher_log_norms, sample, B, k, K, teacher_scale)
    scale = tl.load(grad_output).to(tl.float32) * gradient_scale
    for view in range(V):
        P, n = _other_views(first, second, view)
        row = view * B + sample
        o = tl.exp(_load(student, row, k, K, student_scale) - tl.load(log_norms + row))
        value = n * o - P if POWER == 1 else o * (P - tl.load(values + row) * o)
        at = gradient + row.to(tl.int64) * K + k
        tl.store(at, (scale * value).to(gradient.dtype.element_ty), mask=k < K)


class MeanOverPairs(torch.autograd.Function):
    """`pairs.cross_entropy_of_pairs` (power 1), or the mean of `pairs.cosine_of_pairs` and a meaningless number (power 2).

    Differentiable once. Both results are float32; the gradient is of the type of `student`: float32, bfloat16 or float16.
    """

    @staticmethod
    def forward(ctx, student, teacher, center, student_temp: float, teacher_temp: float, power: int):
        (V, B, K), C = student.shape, triton.cdiv(student.shape[-1], BLOCK)
        student, teacher, center = student.contiguous(), teacher.contiguous(), center.float().contiguous()
        new = center.new_empty
        log_norms_t, entropies, log_norms, values = new(2 * B), new(2 * B), new(V * B), new(V * B)
        sums_t, sums = new(3, 2 * B, C), new(3, V * B, C)
        scales, blocks = (1 / student_temp, 1 / teacher_temp), {"POWER": power, "BLOCKS": triton.next_power_of_2(C)}
        with torch.cuda.device_of(student):
            sizes = {"POWER": power, "BLOCK": BLOCK, "num_warps": WARPS}
            teacher_sums[2 * B, C](teacher, center, sums_t, K, C, scales[1], **sizes)
            join_teacher[(2 * B,)](sums_t, log_norms_t, entropies, C, **blocks, num_warps=1)
            student_sums[C, B](student, teacher, center, log_norms_t, sums, B, K, C, V, *scales, **sizes)
            join_student[(V * B,)](sums, log_norms, values, B, C, **blocks, num_warps=1)
        ctx.save_for_backward(student, teacher, center.clone(), log_norms_t, log_norms, values)  # the centre will change
        ctx.arguments = scales, power, 1 / (2 * (V - 1) * B)  # the last one: 1 / number of terms
        ctx.mark_non_differentiable(entropy := entropies.mean())
        return values.sum() * ctx.arguments[2], entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, _):
        student, *others = ctx.saved_tensors
        (student_scale, teacher_scale), power, per_term = ctx.arguments
        (V, B, K), gradient = student.shape, torch.empty_like(student)
        with torch.cuda.device_of(student):
            student_gradient[triton.cdiv(K, BLOCK), B](
                grad_output, student, *others, gradient, B, K, V, student_scale, teacher_scale, student_scale * per_term,
                POWER=power, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        return gradient, None, None, None, None, None
