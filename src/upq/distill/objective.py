"""From token ids to a scalar loss, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.loading import family
from upq.losses import Loss


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over tokens; logits exist for `chunk` tokens at a time, in fp32 only within the loss.

    The gradient with respect to the hidden states is computed in the forward pass, while the chunk's probabilities
    are at hand, so no logits are kept or recomputed. The heads are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        teacher_TH: Tensor | None,
        target_T: Tensor,
        mask_T: Tensor,
        student_head: nn.Module,
        teacher_head: nn.Module | None,
        loss: Loss,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student_TH.device)
        grad_TH = torch.empty_like(student_TH)
        for start in range(0, len(student_TH), chunk):
            at = slice(start, start + chunk)
            teacher_TV = None
            if teacher_head is not None:
                assert teacher_TH is not None
                teacher_TV = teacher_head(teacher_TH[at])
            with torch.enable_grad():
                hidden_TH = student_TH[at].detach().requires_grad_()
                student_TV = student_head(hidden_TH)
            value, grad_TV = loss(student_TV.detach(), teacher_TV, target_T[at], mask_T[at])
            (grad_TH[at],) = torch.autograd.grad(student_TV, hidden_TH, grad_TV.to(student_TV.dtype))
            total += value
        ctx.save_for_backward(grad_TH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * grads[0].to(grad_TH.dtype), None, None, None, None, None, None, None)


class Objective(nn.Module):
    """Student, frozen teacher and loss as one module, so that one wrapper (DDP, FSDP) covers the training step.

    With `hidden`, each token's loss has `hidden · mean over blocks of ‖s − t‖² / ‖t‖²` more, s and t being what the
    student's and the teacher's block writes (of the last, after the final norm).
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
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
        spec = family(student.config)
        self._decoder, self._head = spec.decoder, spec.head

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._teacher[0]

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Loss summed over the tokens of `mask_BT` that have a predecessor; without `hidden`, in nats."""
        target_T, mask_T = tokens_BT[:, 1:].reshape(-1), mask_BT[:, 1:].reshape(-1)
        teacher = self.teacher
        teachers: list[Tensor] = []
        teacher_TH, teacher_head = None, None
        if teacher is not None:
            with torch.no_grad():
                teachers = self._states(teacher, tokens_BT)
            if self.loss.uses_teacher:
                teacher_TH, teacher_head = teachers[-1], teacher.get_submodule(self._head)
        students = self._states(self.student, tokens_BT)
        head = self.student.get_submodule(self._head)
        total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            students[-1], teacher_TH, target_T, mask_T, head, teacher_head, self.loss, self.chunk
        )
        if self.hidden:
            errors = [_relative_error(s, t)[mask_T].sum() for s, t in zip(students, teachers, strict=True)]
            total = total + self.hidden / len(errors) * torch.stack(errors).sum()
        return total

    def _states(self, model: PreTrainedModel, tokens_BT: Tensor) -> list[Tensor]:
        """What each block writes, the last after the final norm, each (B·(T-1), H): the last position predicts nothing.

        Only the last one where the others have no part in the loss.
        """
        decoder = model.get_submodule(self._decoder)
        out = decoder(input_ids=tokens_BT, use_cache=False, output_hidden_states=bool(self.hidden))
        states = out.hidden_states[1:] if self.hidden else (out.last_hidden_state,)
        return [state_BTH[:, :-1].reshape(-1, state_BTH.shape[-1]) for state_BTH in states]


def _relative_error(student_TH: Tensor, teacher_TH: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² of each token (T,), in float32."""
    student_TH, teacher_TH = student_TH.float(), teacher_TH.float()
    size_T = teacher_TH.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (student_TH - teacher_TH).square().sum(-1) / size_T
