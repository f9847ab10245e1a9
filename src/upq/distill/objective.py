"""From token ids to a scalar loss, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.distill.teacher import StreamedTeacher
from upq.losses import Loss, TopK
from upq.model.head import Head
from upq.model.layout import block_list, layout_of
from upq.model.walker import hidden_states

Targets = Callable[[slice], Tensor | TopK | None]  # tokens to what the loss reads of the teacher


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over tokens; logits exist for `chunk` tokens at a time, in fp32 only within the loss.

    The gradient with respect to the hidden states is computed in the forward pass, while the chunk's probabilities
    are at hand, so no logits are kept or recomputed. The heads are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        target_T: Tensor,
        mask_T: Tensor,
        student_head: Head,
        teacher: Targets,
        loss: Loss,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student_TH.device)
        grad_TH = torch.empty_like(student_TH)
        for start in range(0, len(student_TH), chunk):
            at = slice(start, start + chunk)
            expected = teacher(at)
            with torch.enable_grad():
                hidden_TH = student_TH[at].detach().requires_grad_()
                student_TV = student_head(hidden_TH)
            value, grad_TV = loss(student_TV.detach(), expected, target_T[at], mask_T[at])
            (grad_TH[at],) = torch.autograd.grad(student_TV, hidden_TH, grad_TV.to(student_TV.dtype))
            total += value
        ctx.save_for_backward(grad_TH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * grads[0].to(grad_TH.dtype), None, None, None, None, None, None)


class Objective(nn.Module):
    """Student, frozen teacher and loss as one module, so that one wrapper (DDP, FSDP) covers the training step.

    With `hidden`, each token's loss has `hidden · mean over blocks of ‖s − t‖² / max(‖t‖², ‖s‖²)` more, s and t being
    what the student's and the teacher's block writes (of the last, after the final norm).
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | StreamedTeacher | None,
        loss: Loss,
        *,
        chunk: int,
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple, the teacher is no submodule: it has no gradients to reduce and no state to save.
        self._teacher = (teacher,)
        self.loss = loss
        self.chunk = chunk
        self.hidden = hidden
        self._layout = layout_of(student)
        self._head = Head(student, self._layout)
        self._own = Head(teacher, self._layout) if isinstance(teacher, PreTrainedModel) else None

    @property
    def teacher(self) -> PreTrainedModel | StreamedTeacher | None:
        return self._teacher[0]

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, cached: TopK | None = None) -> Tensor:
        """Loss summed over the tokens of `mask_BT` that have a predecessor; without `hidden`, in nats.

        `cached` are the teacher's likeliest tokens at each of the B·(T-1) positions, where no teacher is at hand.
        """
        target_T, mask_T = tokens_BT[:, 1:].reshape(-1), mask_BT[:, 1:].reshape(-1)
        teacher = self.teacher
        teachers: list[Tensor] = []
        if teacher is not None:
            with torch.no_grad():
                teachers = self._states(teacher, tokens_BT)

        def targets(at: slice) -> Tensor | TopK | None:
            if cached is not None:
                return cached[at]
            if teacher is None or not self.loss.uses_teacher:
                return None
            own = teacher.head if isinstance(teacher, StreamedTeacher) else self._own
            assert own is not None
            return own(teachers[-1][at])

        students = self._states(self.student, tokens_BT)
        total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            students[-1], target_T, mask_T, self._head, targets, self.loss, self.chunk
        )
        if self.hidden:
            errors = [_relative_error(s, t)[mask_T].sum() for s, t in zip(students, teachers, strict=True)]
            total = total + self.hidden / len(errors) * torch.stack(errors).sum()
        return total

    def _states(self, model: PreTrainedModel | StreamedTeacher, tokens_BT: Tensor) -> list[Tensor]:
        """What each block writes, the last after the final norm, each (B·(T-1), H): the last position predicts nothing.

        Only the last one where the others have no part in the loss.
        """
        if isinstance(model, StreamedTeacher):
            states = model.states(tokens_BT, every_block=bool(self.hidden))
        else:
            decoder, written = model.get_submodule(self._layout.decoder), list[Tensor]()
            with _recorded(block_list(model, self._layout) if self.hidden else [], written):
                out = decoder(input_ids=tokens_BT, use_cache=False)
            states = [*written[:-1], out.last_hidden_state]
        return [state_BTH[:, :-1].reshape(-1, state_BTH.shape[-1]) for state_BTH in states]


@contextmanager
def _recorded(blocks: Iterable[nn.Module], written: list[Tensor]) -> Iterator[None]:
    """Within, what each block writes goes into `written`."""
    handles = [block.register_forward_hook(lambda _m, _a, out: written.append(hidden_states(out))) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative_error(student_TH: Tensor, teacher_TH: Tensor) -> Tensor:
    """‖s − t‖² / max(‖t‖², ‖s‖²) of each token (T,), in float32: at most 4. The divisor has no gradient.

    Over ‖t‖² alone, one token to which the student gives a massive state and the teacher none counts as 30,000 others
    (SmolLM2-135M: norms of 23,000 and 134), and the step is about nothing else.
    """
    student_TH, teacher_TH = student_TH.float(), teacher_TH.float()
    size_T = torch.maximum(teacher_TH.square().sum(-1), student_TH.detach().square().sum(-1))
    return (student_TH - teacher_TH).square().sum(-1) / size_T.clamp_min(torch.finfo(torch.float32).tiny)
