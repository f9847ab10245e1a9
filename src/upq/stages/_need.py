"""What each stage needs, in closed form over sizes.

Law (tests/test_plan.py): within 15 % of what the stage's tensors take when it runs.
A formula does not follow a change of the code it describes: the law shows that it has to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from upq.blockwise import Calibration, Work, pass_work, spans
from upq.core.precision import compute_dtype, computes_in_bf16
from upq.core.scheme import QuantScheme
from upq.data.config import Generated
from upq.distill.config import Distill, TrainingSettings
from upq.distill.teacher import ROWS_A_SHARD
from upq.distill.trainer import steps
from upq.kernels import training
from upq.losses import LOSSES
from upq.model.sizes import FP32, Bytes, Sizes, largest, tensors
from upq.stages._sizes import Machine, Need, need

if TYPE_CHECKING:
    from upq.stages.blockwise import Blockwise

_BATCH = 4  # rows that the check takes at a time
_CHUNK = 1024  # positions whose logits the check has at a time
# Tensors (T, V) in float32 within a divergence, beside student's and teacher's logits: in torch, and compiled (gjs).
_LOGITS, _COMPILED_LOGITS = 7, 2
# After a training, glibc puts tensors of any size where its small ones have been, and keeps what is freed there. At
# width 1024, 0.1 to 0.4 of a check's tensors came to it in six runs.
_REUSED = 0.4


def compiled_need(section: Generated, sizes: Sizes, *, tokens: int) -> Need:
    """By the compiled decoder on a processor. Memory for texts that are all as long as they may be at one time.

    Time for questions and answers half as long, on average. An answer goes on in its question's place, so that no token
    is read twice; where a text ends another begins, so that every step has `batch_size` of them.
    """
    rows, limit = section.batch_size, section.max_new_tokens
    of_a_token = FP32 * sizes.fp32.cache * sizes.blocks
    # The cache grows by a quarter of itself, so that an eighth is free on average.
    held = Bytes(FP32 * sizes.all + 1.125 * of_a_token * rows * 2 * limit)
    # A token's place is at half of question and answer, on average: what attention reads and multiplies there.
    flops = sizes.fp32.flops(1, 1) * sizes.blocks + 2.0 * sizes.head + sizes.fp32.flops_square * limit * sizes.blocks
    read = FP32 * (sizes.block * sizes.blocks + sizes.head) / rows  # the weights, by all texts of a step
    moved = read + of_a_token * limit / 2 + 12.0 * sizes.vocabulary
    peak = held + tensors(3, FP32 * rows * sizes.vocabulary)
    return need(tokens, peak, 6 * tokens, flops=flops * tokens, moved=moved * tokens)


def generate_need(section: Generated, sizes: Sizes, machine: Machine, *, tokens: int, sharded: bool) -> Need:
    """By transformers. Memory for a prompt and an answer as long as they may be, time for answers half as long."""
    rows, limit, gpu = section.batch_size, section.max_new_tokens, machine.gpus > 0
    size = sizes.dtype.itemsize if gpu and sizes.dtype != torch.float16 else FP32
    weights = Bytes(size * sizes.all)
    if sharded and machine.processes > 1:  # whole while it computes: a block, and once more as it was sent
        weights = Bytes(size * (sizes.rest + sizes.block * (2 + sizes.blocks / machine.processes)))
    of_a_layer = size * rows * sizes.fp32.cache  # bytes a token, keys and values
    logits = tensors(3, FP32 * rows * sizes.vocabulary)
    prompt = tensors(2 * sizes.blocks, of_a_layer * limit / 2) + sizes.forward(rows, limit, size)
    # A token is added to a layer's cache by a copy of its keys, then of its values.
    answer = tensors(2 * sizes.blocks + 1, of_a_layer * limit)
    batches = tokens / (rows * limit)
    if machine.processes > 1:
        batches = -(-batches // machine.processes)  # rounds, in which each process makes a whole batch
    head = Work(2.0 * rows * sizes.head, 12.0 * rows * sizes.vocabulary)
    once = Work(sizes.fp32.flops(rows, limit), 2 * sizes.fp32.kept(rows, limit)) * sizes.blocks + head
    # Half of the steps, twice (prompt and answer): each reads the cache and copies it.
    step = Work(sizes.fp32.flops(rows, 1), 3 * of_a_layer * limit + size * sizes.block) * sizes.blocks + head
    work = (once + step * (2 * limit)) * batches
    # Pages of the checkpoint are mapped while it loads: the system may take them back.
    peak = weights + largest(prompt + logits, answer + logits)
    return need(tokens, peak, 6 * tokens, flops=work.flops, moved=work.moved)


def data_need(*, rows: int, seq_len: int) -> Need:
    """Rows are written as they are filled: 4 bytes a token, and 1 for the mask."""
    return Need(rows * seq_len, 0, 5 * rows * seq_len)


def blockwise_need(
    stage: Blockwise, sizes: Sizes, machine: Machine, *, seq_len: int, on_disk: bool, latents: bool
) -> Need:
    """A window of blocks and the streams of hidden states, in memory or on disk. `latents`: kept for a training."""
    bf16 = computes_in_bf16(stage.precision, machine.device, sizes.hidden)
    method = stage.solver()
    order = stage.order
    windows = [len(span) for span in spans(sizes.blocks, order)]
    widest, solved_times = max(windows), sum(windows) / sizes.blocks
    rows = stage.samples if order.apart else -(-stage.samples // machine.processes)
    calibration = Calibration(rows, seq_len, bf16)
    count = 2 if order.plain else 3
    streams = count * FP32 * seq_len * sizes.hidden if method.needs_inputs else 0.0
    passing = sizes.forward(min(8, rows), seq_len) if method.needs_inputs else Bytes()
    # After it is solved: its dequantised weights, and of the largest the original's and their difference.
    solved = sizes.matrices() + tensors(3, FP32 * sizes.largest) + passing
    block = (sizes.matrices() + Bytes(FP32 * (sizes.block - sizes.linears))) * widest
    held = Bytes() if on_disk else tensors(count, streams * rows / count)
    work = method.work(sizes, calibration) * solved_times + Work(0.0, 140.0 * sizes.linears)
    if method.needs_inputs:
        work += pass_work(sizes, calibration) * (1 + count)
    if order.apart:  # the other processes solve the other blocks
        work = work * (1 / machine.processes)
    # Beside codes lie scales and zero points as they were computed.
    stored = 0 if latents else 6 * sizes.groups(stage.scheme())
    left = (sizes.solved(stage.scheme(), latents=latents) + stored) * sizes.blocks
    return need(
        stage.samples * seq_len,
        block + held + largest(method.memory(sizes, calibration) * widest, solved),
        left + (streams * stage.samples if on_disk else 0),
        flops=work.flops * sizes.blocks,
        moved=work.moved * sizes.blocks,
        bf16=bf16,
    )


def teacher_need(config: Distill, sizes: Sizes, machine: Machine, *, seq_len: int) -> Need:
    """The original, read block by block, writes its likeliest tokens."""
    bf16 = computes_in_bf16(config.precision, machine.device, sizes.hidden)
    micro, rows = config.micro_batch_size, steps(config, seq_len) * config.batch_size
    k = min(config.teacher_top_k, sizes.vocabulary)
    logits = FP32 * min(config.chunk_tokens, micro * (seq_len - 1)) * sizes.vocabulary
    # Two forms of all rows of a shard: what the last block has written, and the final norm of it.
    states = tensors(2, FP32 * min(rows, ROWS_A_SHARD) * seq_len * sizes.hidden)
    peak = (
        Bytes(FP32 * sizes.rest)
        + states
        + largest(sizes.matrices() + sizes.forward(micro, seq_len), tensors(3, logits))
    )
    one = pass_work(sizes, Calibration(1, seq_len, bf16)) * sizes.blocks
    work = one + Work(2.0 * seq_len * sizes.head, 5.0 * FP32 * seq_len * sizes.vocabulary)
    index = 2 if sizes.vocabulary <= 2**16 else 4
    disk = rows * (seq_len - 1) * (k * (index + 2) + 4)
    return need(rows * seq_len, peak, disk, flops=work.flops * rows, moved=work.moved * rows, bf16=bf16)


def distill_need(
    config: TrainingSettings,
    sizes: Sizes,
    machine: Machine,
    *,
    steps: int,
    seq_len: int,
    scheme: QuantScheme,
    sharded: bool,
) -> Need:
    """The larger of building and of a step: fixed tensors, gradients, what one micro-batch keeps, logits of a chunk.

    With `sharded`, what is cut is divided: FSDP itself is not run.
    """
    bf16 = computes_in_bf16(config.precision, machine.device, sizes.hidden)
    coded = sizes.solved(scheme, latents=False) * sizes.blocks
    if not steps:  # the processor holds the codes
        return need(0, Bytes() if machine.gpus else Bytes(coded), 0, flops=0.0, moved=0.0, bf16=bf16)
    own = -(-config.batch_size // machine.processes)
    micro = min(config.micro_batch_size, own)
    learned, moments, fixed = _fixed(config, sizes, scheme)
    compiled = not machine.gpus and config.loss.name == "gjs" and training.available()
    inside = _COMPILED_LOGITS if compiled else _LOGITS
    step, gradients = _step(config, sizes, micro, seq_len, bf16=bf16, many=own > micro, inside=inside)
    solutions = FP32 * sizes.coded if config.train_weights else coded
    built = FP32 * sizes.rest + solutions + (FP32 * sizes.block if config.teacher != "resident" else 0)
    if config.teacher == "resident":
        files = sizes.dtype.itemsize * sizes.all if sizes.dtype.itemsize != FP32 and not machine.gpus else 0
        built += FP32 * sizes.block * sizes.blocks + max(files, 0 if machine.gpus else solutions)
    if sharded and machine.processes > 1:
        # In turn whole: a block of student and teacher, the next one, and its gradients. Of codes and their gradients
        # no more than the teacher's block counts.
        # The embedding and the head are gathered for the whole step, beside their shards.
        fixed = fixed / machine.processes + FP32 * sizes.rest + FP32 * (4 if config.train_weights else 1) * sizes.block
        gradients = gradients * (1 / machine.processes)
        kept = FP32 * sizes.block * sizes.blocks if config.teacher == "resident" else 0
        built = FP32 * (sizes.rest + 3 * sizes.block) + (kept + solutions) / machine.processes
    peak = largest(Bytes(built), Bytes(FP32 * sizes.rest + fixed) + gradients + step)
    work = _step_work(config, sizes, micro, seq_len, bf16=bf16) * (own / micro)
    work += Work(0.0, (40.0 if config.optimizer == "adamw" else 90.0) * learned)
    checkpoint = (FP32 * learned + moments) * (2 if steps > config.checkpoint_every else 1)  # one replaces the other
    tokens = steps * config.batch_size * seq_len
    return need(tokens, peak, checkpoint, flops=work.flops * steps, moved=work.moved * steps, bf16=bf16)


def writing_need(
    config: TrainingSettings,
    sizes: Sizes,
    machine: Machine,
    *,
    answers: int,
    prompt: int,
    limit: int,
    at_once: int,
    scheme: QuantScheme,
) -> Need:
    """Beside what its training holds, a student is dense once more, with a cache. Answers half as long as may be."""
    rows, (_, _, fixed) = min(at_once, answers), _fixed(config, sizes, scheme)
    of_a_layer = FP32 * rows * sizes.fp32.cache  # bytes a token, keys and values
    logits = tensors(3, FP32 * rows * sizes.vocabulary)
    reading = tensors(2 * sizes.blocks, of_a_layer * prompt) + sizes.forward(rows, prompt)
    writing = tensors(2 * sizes.blocks + 1, of_a_layer * (prompt + limit))
    head = Work(2.0 * rows * sizes.head, 12.0 * rows * sizes.vocabulary)
    once = Work(sizes.fp32.flops(rows, prompt), 2 * sizes.fp32.kept(rows, prompt)) * sizes.blocks + head
    moved = 3 * of_a_layer * (prompt + limit / 4) + FP32 * sizes.block
    step = Work(sizes.fp32.flops(rows, 1), moved) * sizes.blocks + head
    work = (once + step * (limit / 2)) * (answers / rows)
    peak = Bytes(FP32 * (sizes.rest + sizes.coded) + fixed) + largest(reading + logits, writing + logits)
    return need(answers * limit // 2, peak, 4 * answers * (prompt + limit), flops=work.flops, moved=work.moved)


def _fixed(config: TrainingSettings, sizes: Sizes, scheme: QuantScheme) -> tuple[float, float, float]:
    """What learns, the bytes of its moments, and all bytes that stay between two steps beside embedding and head."""
    learned = sizes.groups(scheme) * sizes.blocks + (sizes.coded if config.train_weights else 0)
    moments = learned * (8.0 if config.optimizer == "adamw" else 2.0 + 16 / 256)
    fixed = FP32 * learned + moments + (0 if config.train_weights else sizes.coded * scheme.bits / 8)
    return learned, moments, fixed + (FP32 * sizes.block * sizes.blocks if config.teacher == "resident" else 0)


def _step(
    config: TrainingSettings, sizes: Sizes, micro: int, seq_len: int, *, bf16: bool, many: bool, inside: int
) -> tuple[Bytes, Bytes]:
    """What comes and goes in a step: all but the gradients, and the gradients that are there at its peak.

    `inside`: tensors of logits within a divergence.
    """
    loss, size = LOSSES.get(config.loss.name), 2 if bf16 else FP32
    streamed, cached = config.teacher == "offloaded", config.teacher == "cached"
    taught = (loss.uses_teacher or config.hidden > 0) and not cached
    states = FP32 * micro * (seq_len - 1) * sizes.hidden
    of_hidden = sizes.blocks if config.hidden else 1
    teachers = tensors(of_hidden if taught else 0, states)
    students = tensors(of_hidden, states)
    differences = tensors(sizes.blocks if config.hidden else 0, states)
    kept_by_one = sizes.probe(bf16=bf16).kept(micro, seq_len)
    widest = size * micro * seq_len * sizes.widest
    kept = tensors(kept_by_one / widest * (1 if config.gradient_checkpointing else sizes.blocks), widest)
    if config.gradient_checkpointing:
        kept += tensors(sizes.blocks, FP32 * micro * seq_len * sizes.hidden)
    chunk = min(config.chunk_tokens, micro * (seq_len - 1)) * sizes.vocabulary
    logits = tensors(inside if loss.uses_teacher and not cached else 3, FP32 * chunk)
    logits += tensors(2 if loss.uses_teacher and not cached else 1, size * chunk)
    if bf16:
        logits += tensors(1, 2 * sizes.head)  # the head that the product reads
    # A linear's backward pass: its weight, the gradient of it, that of what learns; of codes one form more.
    weight = tensors(3 if config.train_weights else 4, FP32 * sizes.largest)
    if bf16:
        weight += tensors(1, 2 * sizes.largest)
    backward = differences + weight + sizes.forward(micro, seq_len, size, residual=FP32)
    before = kept if not config.gradient_checkpointing else tensors(sizes.blocks, FP32 * micro * seq_len * sizes.hidden)
    reading = teachers + sizes.matrices() + sizes.forward(micro, seq_len) if streamed else Bytes()
    gradients = sizes.matrices(copies=sizes.blocks) if config.train_weights else Bytes()
    step = largest(reading, teachers + students + largest(before + logits, kept + backward))
    if many or not config.train_weights:
        return step, gradients
    # A single micro-batch has its gradients when what it kept is gone.
    return largest(step, gradients + weight), Bytes()


def _step_work(config: TrainingSettings, sizes: Sizes, micro: int, seq_len: int, *, bf16: bool) -> Work:
    """Of one micro-batch."""
    loss = LOSSES.get(config.loss.name)
    taught = (loss.uses_teacher or config.hidden > 0) and config.teacher != "cached"
    passes = 3 + taught + config.gradient_checkpointing
    one = pass_work(sizes, Calibration(micro, seq_len, bf16))
    # Bytes a weight: Ŵ in the forward pass, again in the backward pass, and its gradient.
    moved = (260.0 if config.train_weights else 100.0) * (1 + config.gradient_checkpointing / 3)
    moved += 12.0 if config.teacher == "offloaded" else 0.0  # read and converted
    tokens = micro * (seq_len - 1)
    head = 2.0 * tokens * sizes.head * (3 if loss.uses_teacher and config.teacher != "cached" else 2)
    logits = 30.0 * FP32 * tokens * sizes.vocabulary
    return (one * passes + Work(0.0, moved * sizes.linears)) * sizes.blocks + Work(head, logits)


def check_need(
    sizes: Sizes,
    machine: Machine,
    *,
    seq_len: int,
    rows: int,
    on_disk: bool,
    scheme: QuantScheme,
    built_on: int,
    embeddings_bits: int | None,
    trained: bool,
) -> Need:
    """The largest of three: packing by the processor, the original block by block, the artefact whole.

    `built_on`: earlier block-wise stages, which are measured too. `trained`: a training came before.
    """
    own, gpu = sizes.dtype.itemsize, machine.gpus > 0
    dtype = compute_dtype(sizes.dtype, machine.device)
    size = dtype.itemsize
    batch = min(rows, _BATCH)
    codes = sizes.blocks * (sizes.linears * scheme.bits / 8 + 2 * sizes.groups(scheme))
    dense = sizes.blocks * (sizes.block - sizes.linears)  # norms and biases
    tables = sizes.rest * embeddings_bits / 8 if embeddings_bits else 0.0
    dense += 0 if embeddings_bits else sizes.rest
    artefact, loaded = (codes + tables + each * dense for each in (own, size))
    packing = Bytes(own * sizes.rest + 2 * codes) + tensors(3, sizes.largest)
    states = Bytes() if on_disk else tensors(1, FP32 * rows * seq_len * sizes.hidden)
    ending = Bytes(size * sizes.rest)
    forward = sizes.forward(batch, seq_len, size)
    original = states + largest(sizes.matrices(size) + forward, ending)
    if built_on:  # its codes, a byte each, and the largest of its weights, before the block runs
        filled = sizes.matrices(1) + tensors(1, FP32 * sizes.largest)
        original = states + states + ending + sizes.matrices(size) + largest(filled, forward)
    chunk = min(_CHUNK, batch * (seq_len - 1)) * sizes.vocabulary
    # Log-probabilities of both, and of the teacher the probabilities, the difference and their product.
    logits = tensors(5, FP32 * chunk)
    # The largest weight from codes, in float32 and converted or as integers; then its product.
    unpacked = tensors(1, FP32 * sizes.largest) + tensors(1, (size if size < FP32 else 1) * sizes.largest)
    weight = unpacked + sizes.forward(batch, seq_len, size, wide=1)
    product = tensors(1, size * sizes.largest) + sizes.forward(batch, seq_len, size)
    whole = Bytes(loaded) + ending + states + largest(weight, product, logits)
    peak = largest(*([] if gpu else [packing]), original, whole)
    if trained:
        peak = Bytes(peak.all, max(peak.loose, _REUSED * peak.all))
    passes = 2 + built_on
    one = pass_work(sizes, Calibration(1, seq_len)) * sizes.blocks
    head = Work(2.0 * seq_len * sizes.head, 12.0 * FP32 * seq_len * sizes.vocabulary)
    work = (one + head) * (rows * passes)
    work += Work(0.0, (20.0 * passes + 30.0 * -(-rows // _BATCH)) * sizes.coded)
    bf16 = dtype == torch.bfloat16
    return need(rows * seq_len, peak, artefact, flops=work.flops, moved=work.moved, bf16=bf16)
