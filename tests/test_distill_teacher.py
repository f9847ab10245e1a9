"""Training that fits: the teacher on disk, as targets or block by block, and blocks that run again."""

import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from test_distill import Losses, make, make_config, make_teacher, train
from tiny import FAMILIES, tiny_model
from together import together
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.data.tokens import TokenSet
from upq.distill import teacher as teacher_module
from upq.distill.objective import Objective
from upq.distill.student import (
    checkpoint_blocks,
    load_student,
    make_student,
    trained_linears,
)
from upq.distill.teacher import CachedTeacher, StreamedTeacher, check, write_cache
from upq.distill.trainer import make_loss, settled
from upq.files.tensors import load_tensors
from upq.grids import search_scale
from upq.losses import LOSSES, Divergence, Loss, TopK
from upq.model.layout import block_list
from upq.model.source import Source
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded

ROWS, T, VOCAB = 20, 12, 50
DIVERGENCES = [name for name in LOSSES.names() if issubclass(LOSSES.get(name), Divergence)]


def make_data(rows=ROWS, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (rows, T), generator=generator, dtype=torch.int32)
    mask = (torch.rand(rows, T, generator=generator) < 0.7).to(torch.uint8)
    return TokenSet(tokens, mask, tokens[:0], None, digest="", sources=(), seed=3)


class StopsAfter(Silent):
    """An interruption once that many rows are through the teacher, or that many steps are done."""

    def __init__(self, count):
        self.count = count

    def advance(self, units=1, **figures):
        self.count -= units
        if self.count <= 0:
            raise KeyboardInterrupt


def make_cache(folder, teacher, data, config, steps=6, progress=None):
    rows = data.rows(0, steps * config.batch_size).tolist()
    cache = CachedTeacher(folder, tuple(dict.fromkeys(rows)))
    teacher.save_pretrained(folder.parent / "original")
    streamed = StreamedTeacher.of(Source(folder.parent / "original"), teacher)
    write_cache(cache, streamed, data.tokens_NT, config, progress=progress or Silent())
    return cache


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_module, "ROWS_A_SHARD", 8)  # 20 rows: two full shards and one of four


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class TestCached:
    def test_targets_are_those_of_the_row_in_every_epoch(self, tmp_path):
        teacher, data, config = make_teacher(), make_data(), make_config(teacher="cached", teacher_top_k=5)
        cache = make_cache(tmp_path, teacher, data, config, steps=8)  # 48 places, 20 rows
        assert sorted(cache.rows) == list(range(ROWS))
        for step in (0, 3, 7):
            rows, (tokens, _) = data.rows(step, 6), data.batch(step, 6)
            logp = teacher(tokens).logits[:, :-1].log_softmax(-1).reshape(-1, VOCAB)
            expected, found = TopK.of(logp, 5), cache.read(rows.tolist())
            assert torch.equal(found.index_TK, expected.index_TK)
            # 11 bits of the float16; the rest is float32
            torch.testing.assert_close(found.logp_TK, expected.logp_TK, rtol=5e-4, atol=1e-6)
            torch.testing.assert_close(found.rest_T, expected.rest_T, rtol=1e-5, atol=1e-6)

    def test_only_rows_that_the_training_reads(self, tmp_path):
        data, config = make_data(), make_config(teacher="cached")
        cache = make_cache(tmp_path, make_teacher(), data, config, steps=2)
        assert list(cache.rows) == data.rows(0, 12).tolist()
        shapes = [load_tensors(cache.path(shard))[0]["index"].shape for shard in range(2)]
        assert shapes == [(8, T - 1, VOCAB), (4, T - 1, VOCAB)]  # teacher_top_k is more than there are
        assert not cache.path(2).exists()

    @pytest.mark.parametrize("k", [3, VOCAB])
    @pytest.mark.parametrize(("vocab", "kind"), [(VOCAB, torch.uint16), (2**16 + 8, torch.int32)])
    def test_its_size_is_what_was_said(self, tmp_path, k, vocab, kind):
        config = make_config(teacher="cached", teacher_top_k=k)
        shape = {"vocab_size": vocab, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        teacher = tiny_model("llama", **shape, num_key_value_heads=1)
        cache = make_cache(tmp_path, teacher, make_data(vocab=vocab), config)
        tensors = [load_tensors(cache.path(shard))[0] for shard in range(cache.shards)]
        assert tensors[0]["index"].dtype == kind
        size = sum(t.nbytes for shard in tensors for t in shard.values())
        assert size == cache.bytes(k, vocab, T)

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_all_tokens_train_as_the_teacher_does(self, tmp_path, name):
        """k = V: what is left is the rounding of log-probabilities to float16, 5e-4 of each, and what two steps
        make of it: 3e-3 where a weight is near the edge of a level."""
        teacher, data = make_teacher(), make_data()
        config = make_config(loss=name, micro_batch_size=4, teacher_top_k=VOCAB)
        expected = train(make(teacher), teacher, config, tmp_path / "a.safetensors", steps=3, data=data)
        cache = make_cache(tmp_path / "teacher", teacher, data, config)
        config = settled(config, teacher, data)  # before the teacher goes: the confidence of cakld
        found = train(make(teacher), cache, config, tmp_path / "b.safetensors", steps=3, data=data)
        assert found == pytest.approx(expected, rel=5e-3)
        few = make_cache(tmp_path / "few", teacher, data, config.model_copy(update={"teacher_top_k": 2}))
        less = train(make(teacher), few, config, tmp_path / "c.safetensors", steps=1, data=data)
        assert less[0] < 0.98 * expected[0]  # from below, and by more than that rounding

    @pytest.mark.parametrize("stop", [3, 8, 13, 19])
    def test_killed_and_resumed_is_never_killed(self, tmp_path, stop):
        teacher, data, config = make_teacher(), make_data(), make_config(teacher_top_k=4, micro_batch_size=3)
        whole = make_cache(tmp_path / "whole", teacher, data, config)
        with pytest.raises(KeyboardInterrupt):
            make_cache(tmp_path / "c", teacher, data, config, progress=StopsAfter(stop))
        kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").glob("*")}
        assert len(kept) == (stop - 1) // 8
        resumed = make_cache(tmp_path / "c", teacher, data, config)
        for shard in range(3):
            assert resumed.path(shard).read_bytes() == whole.path(shard).read_bytes()
        assert {file: file.stat().st_mtime_ns for file in kept} == kept
        assert (resumed.missing(), resumed.rows_done()) == ([], ROWS)

    def test_resumed_training_is_bit_identical(self, tmp_path):
        teacher, data, config = make_teacher(), make_data(), make_config(teacher_top_k=4)
        cache = make_cache(tmp_path / "teacher", teacher, data, config)
        whole, resumed = make(teacher), make(teacher)
        train(whole, cache, config, tmp_path / "whole.safetensors", data=data)
        with pytest.raises(KeyboardInterrupt):
            train(make(teacher), cache, config, tmp_path / "c.safetensors", data=data, progress=StopsAfter(4))
        assert len(train(resumed, cache, config, tmp_path / "c.safetensors", data=data)) == 3
        assert same(whole, resumed)

    def test_a_damaged_shard_is_named(self, tmp_path):
        teacher, data, config = make_teacher(), make_data(), make_config(teacher_top_k=4)
        cache = make_cache(tmp_path / "teacher", teacher, data, config)
        cache.path(1).write_bytes(cache.path(1).read_bytes()[:-9])
        with pytest.raises(UPQError, match=r"targets-00001\.safetensors: damaged or truncated .*delete it"):
            train(make(teacher), cache, config, tmp_path / "c.safetensors", data=data)

    def test_what_it_cannot_do_is_one_line(self, monkeypatch):
        with pytest.raises(UPQError, match=r"keeps no hidden states, but distill\.hidden is 0\.25; set"):
            check(make_config(teacher="cached", hidden=0.25))

        class Whole(Loss):
            uses_teacher = True

        monkeypatch.setattr(LOSSES, "get", lambda name: Whole)
        with pytest.raises(UPQError, match=r"distill\.loss=mine reads all .*; set distill\.teacher=offloaded"):
            check(make_config(teacher="cached", loss="mine"))


def ranked(_, folder, rows):
    """One of two processes: the losses of a training from targets on disk."""
    config, seen = make_config(micro_batch_size=2, gradient_checkpointing=True), Losses()
    teacher = make_teacher()
    cache = CachedTeacher(folder / "teacher", rows)
    train(make(teacher), cache, config, folder / "c.safetensors", data=make_data(), progress=seen)
    return seen.values


def test_two_processes_read_their_own_targets(tmp_path, monkeypatch):
    """Two gloo processes, targets from disk, blocks that run again: the losses of one process."""
    monkeypatch.undo()  # small shards are set in this process alone
    teacher, data, config = make_teacher(), make_data(), make_config(teacher_top_k=6)
    cache = make_cache(tmp_path / "teacher", teacher, data, config)
    losses = together(2, ranked, tmp_path, cache.rows)[0]
    alone = train(make(teacher), cache, config, tmp_path / "alone.safetensors", data=data)
    assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_teacher_trains_as_the_one_in_memory(tmp_path, family):
    """Hidden states of every block in the loss, a norm that the student trains; bit for bit."""
    model = tiny_model(family).requires_grad_(False)
    model.save_pretrained(tmp_path / "model")
    streamed = StreamedTeacher.of(Source(tmp_path / "model"), model)
    config = make_config(hidden=0.3, train_norms=True, micro_batch_size=4)
    students = [make(model, train_norms=True) for _ in range(2)]
    losses = [
        train(student, teacher, config, tmp_path / f"{i}.safetensors", steps=2, data=make_data())
        for i, (student, teacher) in enumerate(zip(students, (model, streamed), strict=True))
    ]
    assert losses[0] == losses[1]
    assert same(*students)


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_read_block_by_block_is_the_same(tmp_path, family, tied, latents):
    teacher = tiny_model(family, tie_word_embeddings=tied).requires_grad_(False)
    teacher.save_pretrained(tmp_path)
    model, scheme, let_go = Source(tmp_path), QuantScheme(bits=2), []

    def starts(index):
        found = {}
        for matrix in model.matrices(index):
            w = model.weight(index, matrix)
            solution = Solution(w, search_scale(w, scheme), scheme)
            found[matrix.name] = solution if latents else Coded.of(solution.qtensor(), solution.params)
        return found

    whole = {f"{model.layout.blocks}.{i}.{name}": s for i in range(len(model)) for name, s in starts(i).items()}
    expected = make_student(teacher, whole, train_norms=True)
    found, frame = load_student(
        model, starts, train_norms=True, after=lambda _, original: let_go.append(weakref.ref(original))
    )
    assert len(let_go) == len(model)
    assert all(block() is None for block in let_go)
    assert all(p.is_meta for p in block_list(frame).parameters())
    a, b = (dict(student.named_parameters(remove_duplicate=False)) for student in (expected, found))
    assert a.keys() == b.keys()
    for name, parameter in a.items():
        assert torch.equal(parameter, b[name]), name
        assert parameter.requires_grad == b[name].requires_grad
    ids = torch.arange(12)[None]
    assert torch.equal(expected(ids).logits, found(ids).logits)


@pytest.mark.parametrize("hidden", [0.0, 0.3])
def test_blocks_that_run_again_change_nothing(tmp_path, hidden):
    teacher, data = make_teacher(), make_data()
    students = [make(teacher, train_norms=True) for _ in range(2)]
    losses = [
        train(
            student,
            teacher,
            make_config(hidden=hidden, train_norms=True, gradient_checkpointing=again),
            tmp_path / f"{again}.safetensors",
            steps=3,
            data=data,
        )
        for student, again in zip(students, (False, True), strict=True)
    ]
    assert losses[0] == losses[1]
    assert same(*students)
    assert all(not module.training for module in students[1].modules())  # no dropout comes back


def test_blocks_that_run_again_remember_autocast():
    teacher = make_teacher()
    student = make(teacher)
    objective = Objective(student, teacher, make_loss(make_config(), teacher, make_data()), chunk=100, hidden=0.3)
    found = []
    for again in (False, True):
        if again:
            checkpoint_blocks(student)
        with torch.autocast("cpu", torch.bfloat16):
            total = objective(*make_data().batch(0, 6))
        total.backward()
        found.append([total, *(p.grad for p in student.parameters() if p.requires_grad)])
        student.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_that_run_again_keep_their_inputs_alone():
    """Between the passes: per block one hidden state, and no more for a block that is wider inside."""
    kept = []
    for width in (44, 440):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=width, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        teacher = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        student = make(teacher)
        checkpoint_blocks(student)
        objective = Objective(student, teacher, make_loss(make_config(), teacher, make_data()), chunk=100)
        own = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
        storages = {}

        def pack(tensor, storages=storages, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        tokens, mask = make_data().batch(0, 6)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(tokens, mask)
        kept.append(sum(size for size, _ in storages.values()))
        assert len(trained_linears(student)) == 28
    assert kept[0] == kept[1]
    assert kept[0] < 10 * tokens.numel() * 32 * 4
