"""What a run will need, stage by stage, before it starts: from the model's configuration and the recipe alone.

The stages' own code runs on tensors without memory (`imagined`), so what is planned is what the code does. All decoder
blocks are alike: models of two and three blocks are run, and every further block adds what the third one added.

Law (tests/test_plan.py): a figure at a depth is that of the same code run at that depth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from upq.artifact.transformers import block_linears, pack_model
from upq.blockwise import METHODS, BlockStore, Solution, walk
from upq.core.config import decode, override
from upq.core.errors import UPQError
from upq.core.memory import resident_bytes
from upq.core.precision import computes_in_bf16
from upq.core.progress import Silent
from upq.core.scheme import QTensor, QuantScheme
from upq.core.signals import Stop
from upq.distill.config import Distill
from upq.distill.optimizer import check as check_optimizer
from upq.distill.student import load_student, make_student
from upq.distill.teacher import ROWS_A_SHARD, CachedTeacher, StreamedTeacher, Teacher, likeliest
from upq.distill.trainer import Training, settled, steps
from upq.evals.text import evaluate_text, streamed
from upq.grids import GRIDS, search_scale
from upq.kernels import computing
from upq.kernels.reference import row_bytes
from upq.losses import TopK
from upq.model.activations import Activations, in_memory
from upq.model.loading import family
from upq.model.source import Source
from upq.nn.fixed_codes import Coded, Start
from upq.nn.packed import Codes
from upq.run.answers import Answers
from upq.run.imagined import Tally, imagined
from upq.run.recipe import STAGES, Recipe
from upq.run.run import (
    caches_teacher,
    check_lengths,
    check_original,
    check_plugins,
    sequences,
    to_be_written,
    trains_weights,
    with_weights,
)
from upq.stages.blockwise import Blockwise

# Of a GPU: CUDA's context, the libraries' workspaces, and what its allocator cannot use. Assumed, not measured.
GPU_CONTEXT = 10**9
# What the C library (glibc) holds of free memory between tensors that come and go in small blocks, as a share of them:
# fitted to runs of width 256 and 512, where it was 0.3 to 1.2 (docs/scale.md).
_SPARE = 0.6
# Of the tensors of a check that follows a training, what counts as such blocks: where those of the training have been,
# glibc puts tensors of any size, and keeps what is freed. At width 1024, 0.1 to 0.4 of them came to it in six runs.
_REUSED = 0.4
_ROWS = 8  # calibration rows that pass through a block at a time, and rows of weights that stand for all
_CACHED = 0.26  # seconds of a search in the processor's caches over those of one that goes through memory (upq.grids)
_DEPTHS = (2, 3)  # blocks
_RESERVE = 0.1  # of the memory: as far as plans were off runs (docs/scale.md), and the system needs some
# Of the savings the one that is another training: codes stay as the block-wise stage has left them.
SCALES_ALONE = "distill.train_weights=false"

Figures = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """Of one stage, in one process: bytes in memory at its peak, bytes it leaves on disk, and its work (see Tally).

    `loose` is what of the memory comes and goes in small blocks.
    """

    stage: str
    tokens: int
    memory: int
    disk: int
    loose: int = 0
    flops: float = 0.0
    moved: float = 0.0
    bf16: bool = False  # its products


@dataclass(frozen=True, slots=True)
class Size:
    """Weights of a model: of a block's linears, of all of a block, and of what is not in blocks."""

    linears: int
    block: int
    rest: int
    blocks: int

    @property
    def coded(self) -> int:
        return self.linears * self.blocks

    @property
    def all(self) -> int:
        return self.block * self.blocks + self.rest


def check(config: PretrainedConfig, recipe: Recipe, name: str) -> None:
    """Every error of model and recipe that shows without data. Raises UPQError."""
    family(config)
    check_original(config, name)
    check_plugins(recipe, _Layout(_of_depth(config, 1)))
    check_lengths(recipe, config)


def size_of(config: PretrainedConfig, answers: Answers | None = None) -> Size:
    with imagined(answers):
        one, two = (_model(_of_depth(config, depth), torch.float32) for depth in (1, 2))
        weights = [sum(p.numel() for p in model.parameters()) for model in (one, two)]
        linears = sum(_weight(one, path).numel() for path in block_linears(one))
    block = weights[1] - weights[0]
    return Size(linears, block, weights[0] - block, config.num_hidden_layers)


def needs(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    processes: int = 1,
    gpu: bool = False,
    only: frozenset[str] | None = None,
    answers: Answers | None = None,
) -> dict[str, Need]:
    """What each stage of `recipe` needs, in their order; or `only` some of them.

    `gpu`: products are in bf16 where the recipe leaves that to the device.
    """
    answers = Answers() if answers is None else answers
    recipe = _settled(recipe, torch.device("cuda" if gpu else "cpu"), config.hidden_size)
    stages: dict[str, Callable[[], Need]] = {}
    if recipe.data.generated is not None:
        stages["generate"] = lambda: _generate(config, recipe, processes, answers, gpu=gpu)
    stages["data"] = lambda: _data(recipe)
    if (int4 := recipe.int4) is not None:
        stages["int4"] = lambda: _blockwise("int4", int4, config, recipe, processes, answers)
    stages["int2"] = lambda: _blockwise("int2", recipe.int2, config, recipe, processes, answers)
    if caches_teacher(recipe):
        stages["teacher"] = lambda: _teacher(config, recipe, answers, gpu=gpu)
    stages["distill"] = lambda: _distill(config, recipe, processes, answers, gpu=gpu)
    stages["check"] = lambda: _check(config, recipe, answers, gpu=gpu)
    found = {name: run() for name, run in stages.items() if only is None or name in only}
    for name in found.keys() & {*STAGES, "teacher"}:
        stage: Blockwise | Distill = getattr(recipe, "distill" if name == "teacher" else name)
        found[name] = replace(found[name], bf16=stage.precision == "bf16")
    if gpu:
        return found
    return {name: replace(need, memory=need.memory + int(_SPARE * need.loose)) for name, need in found.items()}


# ---- depth


def _of_depth(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = blocks
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:blocks]
    return shallow


def _at_depth(config: PretrainedConfig, run: Callable[[PretrainedConfig], Figures]) -> Figures:
    """What `run` gives for `config`, from the depths that are quick to run."""
    if config.num_hidden_layers <= _DEPTHS[-1]:
        return run(config)
    low, high = (run(_of_depth(config, depth)) for depth in _DEPTHS)
    return _beyond(low, high, config.num_hidden_layers - _DEPTHS[0])


def _beyond(low: Figures, high: Figures, times: float) -> Figures:
    """Along the line from `low` to `high`, so many times the way between them."""
    return tuple(a + (b - a) * times for a, b in zip(low, high, strict=True))


def _settled(recipe: Recipe, device: torch.device, width: int) -> Recipe:
    """With the precision that each stage will have on `device`."""
    found: dict[str, Blockwise | Distill] = {}
    for name in STAGES:
        if (stage := getattr(recipe, name)) is not None:
            bf16 = computes_in_bf16(stage.precision, device, width)
            found[name] = stage.model_copy(update={"precision": "bf16" if bf16 else "fp32"})
    return recipe.model_copy(update=found)


# ---- models without memory


class _Layout(Source):
    """A model whose checkpoint need not be there. To be made before its blocks are imagined: a copy is made of each."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        self._whole: PreTrainedModel | None = None
        self._lay_out(Path(config.name_or_path or ""), config, "cpu", dtype)
        self._files = dict.fromkeys(self._layout.state_dict().keys() - self._layout.all_tied_weights_keys, Path())

    def empty(self) -> PreTrainedModel:
        # A copy but for its buffers: of imagined tensors, what is made for the meta device would count as memory.
        if self._whole is None:
            self._whole = super().empty()
        return copy.deepcopy(self._whole, {id(buffer): buffer for buffer in self._whole.buffers()})

    def shapes(self) -> dict[str, torch.Size]:
        """Of a block's linears, by name."""
        return {name: _weight(self._blocks[0], name).shape for name in self.spec.linears}

    def block(self, index: int) -> nn.Module:
        block = copy.deepcopy(self._blocks[index])
        self._fill(block, "")
        return block

    def _embeddings(self, ids_BT: Tensor) -> Tensor:
        return torch.empty(*ids_BT.shape, self.config.hidden_size, dtype=self.dtype)

    def _tensor(self, name: str, shape: torch.Size, *, rows: Tensor | None = None) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def _model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM  # untyped
    model: PreTrainedModel = auto.from_config(copy.deepcopy(config), dtype=dtype)  # which is told the type
    model.eval()  # type: ignore[no-untyped-call]
    return model.requires_grad_(False)


def _loaded(config: PretrainedConfig, dtype: torch.dtype | None = None, *, gpu: bool = False) -> PreTrainedModel:
    """As from its files: in another type than theirs, they lie in memory until the last tensor has been converted.

    Not in that of a GPU, which gets the whole model afterwards.
    """
    own = _own_dtype(config)
    model = _model(config, dtype or own)
    if dtype not in (None, own) and not gpu:
        files = [torch.empty_like(p, dtype=own) for p in model.parameters()]
        del files
    return model


def _own_dtype(config: PretrainedConfig) -> torch.dtype:
    return getattr(config, "dtype", None) or torch.float32


def _weight(module: nn.Module, path: str) -> Tensor:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear.weight


# ---- block-wise stages


@dataclass(frozen=True)
class _Nowhere(BlockStore):
    """Forgets what it is given; what is asked of it has the right shapes."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def done(self, blocks: int) -> int:
        return 0

    def save(self, index: int, solutions: dict[str, Solution], report: object) -> None: ...

    def weights(self, index: int) -> dict[str, Tensor]:
        return {name: torch.empty(shape) for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class _Elsewhere:
    """Activations that take no memory but for the batch that is read."""

    shape: torch.Size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        count = len(range(len(self))[rows]) if isinstance(rows, slice) else len(rows)
        return torch.empty(count, *self.shape[1:])

    def __setitem__(self, rows: slice, batch_BTH: Tensor, /) -> None: ...


def _blockwise(
    name: str, stage: Blockwise, config: PretrainedConfig, recipe: Recipe, processes: int, answers: Answers
) -> Need:
    """The time counts each step of the method as one process takes it: its batches may be too small to share out."""
    scheme, cls = stage.scheme(), METHODS.get(stage.method.name)
    options = stage.method.options(cls.Config, f"method {stage.method.name}")
    iterations, seq_len = getattr(options, "iterations", 0), recipe.data.seq_len
    samples = -(-stage.samples // processes)
    few = min(samples, max(_ROWS, getattr(options, "batch_size", 0)))
    on_disk = recipe.memory.activations == "disk"
    model = _Layout(_of_depth(config, 1))
    store = _Nowhere(Path(), scheme, shapes=model.shapes())

    def run(rows: int, iterations: int, **changed: Any) -> Figures:
        changed |= {"iterations": iterations} if "iterations" in cls.Config.model_fields else {}
        with imagined(answers) as tally:
            walk(
                model,
                torch.zeros(rows, seq_len, dtype=torch.long),
                cls(options.model_copy(update=changed)),
                store,
                precision=stage.precision,
                given=store if name == "int2" and recipe.int4 is not None else None,
                seed=0,
                progress=Silent(),
                activations=nullcontext(lambda shape, _device: _Elsewhere(shape)) if on_disk else None,
            )
            return tally.peak, tally.loose, tally.flops, tally.moved

    # The search is most of a short run, and the same for any rows and iterations. One that weighs the inputs stays in:
    # whether a method needs inputs at all may hang on it.
    searches = getattr(options, "scale", "max") == "mse"
    quick = {"scale": "max"} if searches else {}
    peak, loose, *work = run(few, min(iterations, 2), **quick)  # in the second iteration all moments are there
    if samples > few or iterations > 2:
        _, _, *base = run(few, 1, **quick)
        _, _, *wider = run(2 * few, 1, **quick)
        longer = work if iterations > 1 else base
        further, rest = max(0, iterations - 2), samples / few - 1
        work = [w + (i - b) * further + (r - b) * rest for w, b, i, r in zip(work, base, longer, wider, strict=True)]
    if searches:
        shapes = list(model.shapes().values())
        of_a_row = {columns: _searched(columns, scheme, answers) for columns in {shape[1] for shape in shapes}}
        work[1] += sum(shape[0] * of_a_row[shape[1]] for shape in shapes)
    row = seq_len * config.hidden_size * torch.float32.itemsize
    streams = 2 * row * (samples - few) if cls(options).needs_inputs else 0
    blocks = config.num_hidden_layers
    latents = name == "int2" and trains_weights(recipe)
    solved = sum(_stored(shape, scheme, latents=latents) for shape in model.shapes().values()) * blocks
    return Need(
        name,
        stage.samples * seq_len,
        int(peak + (0 if on_disk else streams)),
        int(solved + (2 * row * stage.samples if on_disk else 0)),
        int(loose),
        work[0] * blocks,
        work[1] * blocks,
    )


def _searched(columns: int, scheme: QuantScheme, answers: Answers | None) -> float:
    """Bytes that the search for the scale of a row moves, as many as would take its time if memory held them."""
    with imagined(answers) as tally:
        search_scale(torch.empty(_ROWS, columns), scheme)
    return tally.moved / _ROWS * _CACHED


def _stored(shape: torch.Size, scheme: QuantScheme, *, latents: bool) -> float:
    """Bytes of a solved linear: latents or packed codes, and grid parameters."""
    groups = shape[0] * scheme.groups(shape[1])
    return shape.numel() * (4 if latents else scheme.bits / 8) + 4 * groups


# ---- training


@dataclass(frozen=True)
class _Rows:
    seq_len: int

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        shape = (size, self.seq_len)
        return torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)

    def rows(self, step: int, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.long)


@dataclass(frozen=True)
class _Likeliest(CachedTeacher):
    """Targets for rows of `seq_len` tokens, the k likeliest of each."""

    seq_len: int
    k: int

    def read(self, rows: Any) -> TopK:
        positions = len(rows) * (self.seq_len - 1)
        index_TK = torch.zeros(positions, self.k, dtype=torch.long)
        return TopK(index_TK, torch.zeros(positions, self.k), torch.zeros(positions))


def _distill(config: PretrainedConfig, recipe: Recipe, processes: int, answers: Answers, *, gpu: bool) -> Need:
    """With `sharded`, what is cut is divided: FSDP itself is not run."""
    chosen, seq_len = recipe.distill, recipe.data.seq_len
    own = -(-chosen.batch_size // processes)
    micro = min(chosen.micro_batch_size, own)
    number = steps(chosen, seq_len)
    built, kept, peak, loose, learned, moments, *work = _at_depth(
        config, lambda shallow: _training(shallow, recipe, micro, answers, train=number > 0, many=own > micro, gpu=gpu)
    )
    if number and recipe.memory.weights == "sharded" and processes > 1:
        size, latents = size_of(config, answers), trains_weights(recipe)
        # In turn whole: a block of student and teacher, the next one, and its gradients; always: what is not in blocks.
        # Of codes and their gradients no more than the teacher's block counts.
        whole = 4 * ((4 if latents else 1) * size.block + size.rest)
        cut = kept + 4 * learned - 4 * size.rest
        peak += whole - cut * (1 - 1 / processes)
        # A block is read, gets its solutions and becomes the student's, and is cut before the next one.
        coded = 4 * learned if latents else size.coded * recipe.int2.bits / 8
        taught = 4 * size.block * size.blocks if chosen.teacher == "resident" else 0
        built = 4 * (size.rest + 3 * size.block) + (taught + coded) / processes
    flops, moved = (first + (both - first) * (own / micro - 1) for first, both in (work[:2], work[2:]))
    checkpoint = 4 * learned + moments
    return Need(
        "distill",
        number * chosen.batch_size * seq_len,
        int(max(built, peak)),
        int(checkpoint * (2 if number > chosen.checkpoint_every else 1)),  # while one is replaced by the next
        int(loose if peak > built else 0),
        flops * number,
        moved * number,
    )


def _training(
    config: PretrainedConfig,
    recipe: Recipe,
    micro: int,
    answers: Answers | None = None,
    *,
    train: bool,
    many: bool,
    gpu: bool,
) -> Figures:
    """Bytes: peak before the first step, what stays between steps, peak of a step and what of it is loose.

    Then weights that learn, bytes of their moments.

    Then the work of a step of one micro-batch and that of one of two, as (flops, flops), (moved, moved).
    """
    data, norms = _Rows(recipe.data.seq_len), recipe.distill.train_norms
    chosen = recipe.distill.model_copy(update={"micro_batch_size": micro, "batch_size": micro})
    layout = _Layout(config)
    with _own_accelerator(), imagined(answers) as tally:
        if not train:  # the processor's
            _frozen(layout, recipe)
            return (0.0 if gpu else float(tally.peak), *[0.0] * 9)
        teacher: PreTrainedModel | StreamedTeacher
        if chosen.teacher == "resident":
            teacher = _loaded(config, torch.float32, gpu=gpu)
            student = make_student(teacher, dict(_by_path(layout, recipe, gpu=gpu)), train_norms=norms)
        else:
            student, frame = load_student(layout, partial(_starts, layout, recipe, gpu=gpu), train_norms=norms)
            teacher = StreamedTeacher.of(layout, frame)
            del frame
        chosen = settled(chosen, teacher, data)
        taught: Teacher = teacher
        if caches_teacher(recipe):
            taught = _Likeliest(Path(), (), data.seq_len, min(chosen.teacher_top_k, config.vocab_size))
        del teacher
        training, before = Training(student, taught, data, chosen), tally.live
        built = tally.peak
        _give_gradients(training)
        training.optimizer.step()  # makes the moments, as the first step does at its end
        training.optimizer.zero_grad(set_to_none=True)
        learned, kept = sum(p.numel() for p in training.learned), tally.live
        tally.restart()
        if many:  # the first micro-batch is run as a later one, which finds gradients and needs most
            _give_gradients(training)
        marks: list[Figures] = []  # work done up to the start of a micro-batch, and up to each of its gradients

        def mark(*_: object) -> None:
            marks.append((tally.flops, tally.moved))

        training.objective.register_forward_pre_hook(mark)
        for parameter in training.learned:
            parameter.register_post_accumulate_grad_hook(mark)
        one = _work(tally, lambda: training.step(0, 1.0, Stop()))
        again = [end - begin for begin, end in zip(marks[0], marks[-1], strict=True)] if many else [0.0, 0.0]
        work = [figure for w, more in zip(one, again, strict=True) for figure in (w, w + more)]
        return built, kept, tally.peak, tally.loose, learned, kept - before, *work


@contextmanager
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of a process's first training; another plan, or a run, may want another."""
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()


def _give_gradients(training: Training) -> None:
    for parameter in training.learned:
        parameter.grad = torch.empty_like(parameter)


def _work(tally: Tally, run: Callable[[], object]) -> Figures:
    flops, moved = tally.flops, tally.moved
    run()
    return tally.flops - flops, tally.moved - moved


def _starts(layout: _Layout, recipe: Recipe, _index: int, *, gpu: bool = False) -> dict[str, Start]:
    """Of a block, as read from what the block-wise stage has left: latents that are for a GPU are not in its memory."""
    scheme, latents, starts = recipe.int2.scheme(), trains_weights(recipe), dict[str, Start]()
    for name, (rows, columns) in layout.shapes().items():
        groups = (rows, scheme.groups(columns))
        params = {key: torch.empty(groups) for key in GRIDS.get(scheme.grid).init(torch.empty(1, columns), scheme)}
        if latents:
            latent_OI = torch.empty(()).expand(rows, columns) if gpu else torch.empty(rows, columns)
            starts[name] = Solution(latent_OI, params, scheme)
        else:
            packed_OB = torch.empty(rows, row_bytes(columns, scheme.bits), dtype=torch.uint8)
            starts[name] = Coded(packed_OB, columns, params, scheme)
    return starts


def _by_path(layout: _Layout, recipe: Recipe, *, gpu: bool = False) -> Iterator[tuple[str, Start]]:
    """Of all blocks, by module path."""
    for index in range(len(layout)):
        for name, start in _starts(layout, recipe, index, gpu=gpu).items():
            yield f"{layout.spec.blocks}.{index}.{name}", start


def _frozen(layout: _Layout, recipe: Recipe) -> Codes:
    return Codes((path, start.qtensor()) for path, start in _by_path(layout, recipe))


def _codes(layout: _Layout, scheme: QuantScheme) -> dict[str, QTensor]:
    """Of a block's linears, as read from what the INT4 stage has left."""
    codes = {}
    for name, shape in layout.shapes().items():
        scales = (shape[0], scheme.groups(shape[1]))
        scale_OG = torch.empty(scales, dtype=scheme.scale_torch_dtype)
        codes[name] = QTensor(torch.empty(shape, dtype=torch.uint8), scale_OG, torch.empty(scales), scheme)
    return codes


# ---- what comes before and after


def _generate(
    config: PretrainedConfig, recipe: Recipe, processes: int, answers: Answers | None = None, *, gpu: bool
) -> Need:
    """Memory at the most: prompt and answer as long as they may be. Time: on average half as long, to the limit.

    With `sharded`, what is cut is divided: FSDP itself is not run.
    """
    section = to_be_written(recipe)
    assert section is not None
    assert section.tokens is not None
    rows, limit = section.batch_size, section.max_new_tokens
    sharded = recipe.memory.weights == "sharded" and processes > 1

    def run(shallow: PretrainedConfig) -> Figures:
        with imagined(answers) as tally, torch.inference_mode():
            model: Any = _loaded(shallow, None if gpu else torch.float32)
            if sharded:
                tally.restart()  # it is never read whole
            cache = DynamicCache(config=shallow)

            def extend(tokens: int) -> None:
                ids_BT = torch.zeros(rows, tokens, dtype=torch.long)
                out = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                # as transformers' sampling does it
                torch.multinomial(out.logits[:, -1].to(torch.float32, copy=True).softmax(-1), num_samples=1)

            prompt = _work(tally, lambda: extend(limit))
            step = _work(tally, lambda: extend(1))
            first = tally.peak, tally.loose
            if limit > 2:
                extend(limit - 2)
            tally.restart()
            extend(1)
            return *first, tally.peak, tally.loose, *prompt, *step

    first, first_loose, last, last_loose, *work = _at_depth(config, run)
    peak, loose = max((first, first_loose), (last, last_loose))
    if sharded:
        size, dtype = size_of(config, answers), _own_dtype(config) if gpu else torch.float32
        # Whole while it computes: a block, and once more as it was sent.
        peak += dtype.itemsize * size.block * (2 - size.blocks * (1 - 1 / processes))
    batches = section.tokens / (rows * limit)
    if processes > 1:
        batches = -(-batches // processes)  # rounds, in which each process makes a whole one
    flops, moved = (batches * (work[i] + 2 * limit * work[2 + i]) for i in (0, 1))
    return Need("generate", section.tokens, int(peak), 6 * section.tokens, int(loose), flops, moved)


def _data(recipe: Recipe) -> Need:
    """Rows are written as they are filled: 4 bytes a token, and 1 for the mask."""
    tokens = (sequences(recipe) + recipe.data.validation) * recipe.data.seq_len
    return Need("data", tokens, 0, 5 * tokens)


def _teacher(config: PretrainedConfig, recipe: Recipe, answers: Answers | None = None, *, gpu: bool) -> Need:
    chosen, seq_len = recipe.distill, recipe.data.seq_len
    micro, k = chosen.micro_batch_size, min(chosen.teacher_top_k, config.vocab_size)
    rows = steps(chosen, seq_len) * chosen.batch_size

    def run(shallow: PretrainedConfig) -> Figures:
        layout = _Layout(shallow)
        with imagined(answers) as tally, torch.no_grad():
            teacher = StreamedTeacher(layout, *layout.norm_and_head())
            with torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bf16"):
                (states_BTH,) = teacher.states(torch.zeros(micro, seq_len, dtype=torch.long), every_block=False)
                likeliest(states_BTH, teacher.head, k, chosen.chunk_tokens)
            return tally.peak, tally.loose, tally.flops, tally.moved

    peak, loose, flops, moved = _at_depth(config, run)
    # What the last block has written, of all rows of a shard, and the final norm of it.
    peak += 2 * 4 * seq_len * config.hidden_size * max(0, min(rows, ROWS_A_SHARD) - micro)
    disk = CachedTeacher(Path(), range(rows)).bytes(k, config.vocab_size, seq_len)
    return Need("teacher", rows * seq_len, int(peak), disk, int(loose), flops * rows / micro, moved * rows / micro)


def _check(config: PretrainedConfig, recipe: Recipe, answers: Answers | None = None, *, gpu: bool) -> Need:
    """The largest of three: packing, which is the processor's, the original block by block, the artefact whole."""
    rows, seq_len = recipe.data.validation, recipe.data.seq_len
    few, on_disk = min(rows, 4), recipe.memory.activations == "disk"

    def allocate(shape: torch.Size, device: torch.device) -> Activations:
        return _Elsewhere(shape) if on_disk else in_memory(shape, device)

    def run(shallow: PretrainedConfig) -> Figures:
        layout = _Layout(shallow, _own_dtype(shallow))
        with imagined(answers) as tally, torch.no_grad():
            tokens_NT = torch.zeros(few, seq_len, dtype=torch.long)
            model = layout.without_linears()
            codes = _frozen(layout, recipe)
            tally.restart()
            before = tally.flops, tally.moved
            pack_model(model, codes, embeddings_bits=recipe.embeddings.bits)
            disk = sum(tensor.nbytes for tensor in model.state_dict().values())
            figures = [float(tally.peak), tally.loose]
            del codes
            tally.restart()
            # Written and, last of all, loaded again: until then it is not in memory.
            packed, flops, moved = tally.live, tally.flops, tally.moved
            original = streamed(layout, tokens_NT, allocate=allocate)
            if (int4 := recipe.int4) is not None:

                def block(index: int) -> nn.Module:
                    return with_weights(layout.block(index), _codes(layout, int4.scheme()))

                states = streamed(layout, tokens_NT, block=block, allocate=allocate)
                evaluate_text(states, tokens_NT, teacher=original)
                del states
            figures += [tally.peak - packed, tally.loose]
            tally.restart()
            with computing("reference"):
                evaluate_text(model, tokens_NT, teacher=original)
            figures += [tally.peak, tally.loose, disk, flops - before[0], moved - before[1]]
            return *figures, tally.flops - flops, tally.moved - moved

    *peaks, disk, flops, moved, flops_of_few, moved_of_few = _at_depth(config, run)
    phases = list(zip(peaks[::2], peaks[1::2], strict=True))
    states = 0 if on_disk else 4 * seq_len * config.hidden_size * (rows - few)
    for phase, kept in ((1, 1 if recipe.int4 is None else 2), (2, 1)):
        phases[phase] = phases[phase][0] + kept * states, phases[phase][1]
    phases = phases[1:] if gpu else phases
    if steps(recipe.distill, seq_len):
        phases = [(held, max(small, _REUSED * held)) for held, small in phases]
    peak = max(held for held, _ in phases)
    loose = max(small - (peak - held) / _SPARE for held, small in phases)  # another phase may need more with its blocks
    flops, moved = flops + flops_of_few * rows / few, moved + moved_of_few * rows / few
    return Need("check", rows * seq_len, int(peak), int(disk), int(loose), flops, moved)


# ---- what fits


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine: floating-point operations in a second, and bytes moved; `flops_bf16` where it differs."""

    flops: float
    moved: float
    flops_bf16: float | None = None

    def seconds(self, need: Need) -> float:
        flops = self.flops_bf16 if need.bf16 and self.flops_bf16 else self.flops
        return need.flops / flops + need.moved / self.moved


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run is planned for: `memory` is in bytes, of one GPU or, without GPUs, of the machine."""

    memory: int
    gpus: int = 0
    speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    tokens: int
    memory: int  # bytes, of one process, the program itself included
    disk: int  # bytes it leaves below --out/.work
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages of a run with `settings`, those beyond the recipe's that make it fit."""

    weights: int
    coded: int  # weights that become codes
    machine: Machine
    settings: tuple[str, ...]
    fits: bool
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class _Saving:
    """Settings that may save memory, and the stages that they are for."""

    stages: frozenset[str]
    settings: tuple[str, ...]

    def of(self, recipe: Recipe) -> Recipe:
        for setting in self.settings:
            recipe = with_setting(recipe, setting)
        return recipe

    @property
    def keys(self) -> set[str]:
        return {setting.partition("=")[0] for setting in self.settings}


_BLOCKWISE, _TRAINING = frozenset({"int4", "int2"}), frozenset({"teacher", "distill"})
_GENERATE = frozenset({"generate"})
_SCALES_ALONE = _Saving(_TRAINING | {"int2"}, (SCALES_ALONE, "distill.scale_lr=5e-3"))
# In the order in which they are tried: what costs least first. The last one makes another artefact.
_SAVINGS = (
    _Saving(_BLOCKWISE, ("memory.activations=disk",)),
    _Saving(_TRAINING, ("distill.chunk_tokens=256",)),
    _Saving(_TRAINING, ("distill.micro_batch_size=1",)),
    _Saving(_TRAINING | _GENERATE, ("memory.weights=sharded",)),
    # After what the training mostly asks for anyway: fewer conversations at a time take as many times longer.
    _Saving(_GENERATE, ("data.generated.batch_size=32",)),
    _Saving(_GENERATE, ("data.generated.batch_size=8",)),
    _Saving(_TRAINING, ("distill.gradient_checkpointing=true",)),
    _Saving(_TRAINING, ("distill.teacher=offloaded",)),
    _Saving(_TRAINING, ("distill.optimizer=adamw8bit",)),
    _SCALES_ALONE,
)


def plan(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> Plan:
    """What `recipe` needs on `machine`, with as few savings as its stages ask for.

    They are to leave a tenth of the memory free; for that alone no other artefact is proposed.
    """
    processes, gpu = max(1, machine.gpus), machine.gpus > 0
    program = GPU_CONTEXT if gpu else resident_bytes()
    most, answers = machine.memory - program, Answers()
    room = most - int(_RESERVE * machine.memory)
    given, kept = recipe, list[_Saving]()

    def needed(recipe: Recipe, only: frozenset[str] | None = None) -> dict[str, Need]:
        return needs(config, recipe, processes=processes, gpu=gpu, only=only, answers=answers)

    found = needed(recipe)
    for saving in _SAVINGS:
        limit = most if saving is _SCALES_ALONE else room
        tight = frozenset(name for name in saving.stages & found.keys() if found[name].memory > limit)
        if not tight or (saving.keys == {"memory.weights"} and processes == 1):
            continue
        changed = saving.of(recipe)
        try:
            check_optimizer(changed.distill)
        except UPQError:  # an optimiser that is not installed here
            continue
        fresh = needed(changed, saving.stages)
        if any(fresh[name].memory < found[name].memory for name in tight):
            recipe, found = changed, found | fresh
            kept = [*(one for one in kept if not one.keys <= saving.keys), saving]
    # It saves so much that some tried before may not be needed, the costliest of them first.
    for saving in kept[-2::-1] if _SCALES_ALONE in kept else ():
        if all(found[name].memory <= room for name in saving.stages & found.keys()):
            fewer = [one for one in kept if one is not saving]
            changed = reduce(lambda recipe, one: one.of(recipe), fewer, given)
            fresh = needed(changed, saving.stages)
            if all(need.memory <= room for need in fresh.values()):
                recipe, found, kept = changed, found | fresh, fewer
    size = size_of(config, answers)
    shown = tuple(
        Stage(
            need.stage,
            need.tokens,
            need.memory + program,
            need.disk,
            None if machine.speed is None else machine.speed.seconds(need),
        )
        for need in found.values()
    )
    fits = all(stage.memory <= machine.memory for stage in shown)
    settings = tuple(setting for saving in kept for setting in saving.settings)
    return Plan(size.all, size.coded, machine, settings, fits, shown)


def with_setting(recipe: Recipe, setting: str) -> Recipe:
    """The recipe with one key overridden, `dotted.key=yaml value`."""
    raw = recipe.model_dump(mode="json")
    override(raw, setting)
    return decode(Recipe, raw, setting)


def this_speed(*, seconds: float = 0.2) -> Speed:
    """Of this machine's processor: products in float32 and bfloat16, and a plain pass over memory."""
    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    a16, b16 = a.bfloat16(), b.bfloat16()
    x, y = torch.ones(2**24), torch.empty(2**24)
    return Speed(
        flops=2 * side**3 / _seconds(lambda: torch.mm(a, b), seconds),
        moved=2 * x.nbytes / _seconds(lambda: torch.add(x, 1, out=y), seconds),
        flops_bf16=2 * side**3 / _seconds(lambda: torch.mm(a16, b16), seconds),
    )


def _seconds(run: Callable[[], object], least: float) -> float:
    run()
    began, done = time.monotonic(), 0
    while (spent := time.monotonic() - began) < least:
        run()
        done += 1
    return spent / done
