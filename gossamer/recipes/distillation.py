"""What a pruned model is trained on: the labels, the dense model's answers, and its hidden states, each by a weight.

Shape suffixes: B texts, T tokens, D width, V vocabulary, N real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import BudgetError, TargetError

CAUSAL = ("ForCausalLM", "LMHeadModel")
IGNORED = -100


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], mask_BT: Tensor | None = None) -> Tensor:
    """Σ_l ‖s_l − t_l‖² / ‖t_l‖² over real tokens: every layer counts the same whatever its scale.

    Args:
        student, teacher: hidden states per layer, [B, T, D].
        mask_BT: True for real tokens; None = all.

    Reference: Kurtic et al., "Sparse fine-tuning for inference acceleration of LLMs", arXiv:2310.06927.
    Departs from: the official code adds bfloat16's epsilon (2⁻⁷) to the teacher's mean square, which silences layers
    of small hidden states; here the sum of squares is only kept from 0.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        if mask_BT is not None:
            s, t = s[mask_BT], t[mask_BT]
        total = total + (s.float() - t.float()).square().sum() / t.float().square().sum().clamp(min=1e-12)
    return total


def logit_kl(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of the predicted distributions, mean over real tokens: plain distillation. Unit: nats.

    Args:
        student_BTV, teacher_BTV: logits; [B, V] where there is one answer a text.
        mask_BT: True for real tokens; None = all.
    """
    if mask_BT is not None and student_BTV.ndim == 3:
        student_BTV, teacher_BTV = student_BTV[mask_BT], teacher_BTV[mask_BT]
    log_s, log_t = (x.float().flatten(0, -2).log_softmax(-1) for x in (student_BTV, teacher_BTV))
    return functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """−log p(token | those before it), mean over real tokens but the first of each text. Unit: nats."""
    want_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT, IGNORED)
    return functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), want_BT[:, 1:].flatten(), ignore_index=IGNORED
    )


@dataclass(frozen=True)
class Distillation:
    """A loss: squarehead·SquareHead + cross_entropy·CE + kl·KL(teacher ‖ student).

    Cross-entropy is the model's own loss where a batch has `labels`, else that of the next token. What has weight 0 is
    not computed: without `kl` and `cross_entropy` no output head runs, without `squarehead` and `kl` no teacher.

    Args:
        squarehead, cross_entropy, kl: weights, 0 or more, one of them above 0.

    Raises:
        BudgetError: a weight is below 0, or all are 0.

    Example:
        >>> Distillation(squarehead=1.0, cross_entropy=1.0)  # the paper's, for language models
        Distillation(squarehead=1.0, cross_entropy=1.0, kl=0.0)

    Reference: Kurtic et al., "Sparse fine-tuning for inference acceleration of LLMs", arXiv:2310.06927.
    """

    squarehead: float = 1.0
    cross_entropy: float = 0.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        weights = list(asdict(self).values())
        if min(weights) < 0 or max(weights) <= 0:
            raise BudgetError(f"weights of losses are 0 or more, and one is above 0; got {asdict(self)}")

    @property
    def taught(self) -> bool:
        """True if it asks a teacher."""
        return self.squarehead > 0 or self.kl > 0

    def __call__(self, model: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, to call `backward()` on; for training loops of your own too.

        Raises:
            TargetError: cross-entropy has no labels and the model does not predict next tokens, there is no teacher to
                ask, or a model gives no hidden states or logits.
        """
        mask_BT = batch["attention_mask"].bool() if "attention_mask" in batch else None
        want = self._ask(teacher, batch)
        got = _run(model, batch, states=self.squarehead > 0, head=self.kl > 0 or self.cross_entropy > 0)
        total = torch.zeros((), device=next(model.parameters()).device)
        if self.squarehead:  # [0] is the embedding, which both share
            total = total + self.squarehead * squarehead(got.hidden_states[1:], want.hidden_states[1:], mask_BT)
        if self.kl:
            total = total + self.kl * logit_kl(got.logits, want.logits, mask_BT)
        if self.cross_entropy:
            total = total + self.cross_entropy * _cross_entropy(model, got, batch, mask_BT)
        return total

    def _ask(self, teacher: nn.Module | None, batch: Mapping[str, Tensor]) -> Any:
        if not self.taught:
            return None
        if teacher is None:
            raise TargetError("SquareHead and KL compare with the dense model; pass it as teacher, or set them to 0")
        unlabelled = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            return _run(teacher, unlabelled, states=self.squarehead > 0, head=self.kl > 0)


def _run(model: nn.Module, batch: Mapping[str, Tensor], *, states: bool, head: bool) -> Any:
    """One pass, without the output head where nobody looks at it."""
    body = model if head else getattr(model, "base_model", model)
    given = batch if head else {k: v for k, v in batch.items() if k != "labels"}
    out = body(**given, output_hidden_states=True) if states else body(**given)
    for name in (["hidden_states"] if states else []) + (["logits"] if head else []):
        if getattr(out, name, None) is None:
            raise TargetError(f"{type(model).__name__} gives no {name}; take losses that it can give, see Distillation")
    return out


def _cross_entropy(model: nn.Module, out: Any, batch: Mapping[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    if "labels" in batch:
        return out.loss
    if not type(model).__name__.endswith(CAUSAL):
        raise TargetError(
            f"{type(model).__name__} does not predict next tokens, so cross-entropy needs labels; give each batch "
            "`labels`, or leave cross_entropy out"
        )
    return next_token_loss(out.logits, batch["input_ids"], mask_BT)
