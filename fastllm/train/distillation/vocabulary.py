"""Whether teacher and student mean the same by an id, and heads cut to the ids that both have.

A divergence compares two distributions id by id. It means something only if an id is the same token
for both, which is all that is asked: how texts are cut into tokens is the student's affair, the
teacher reads the student's ids. Models pad their heads to round sizes (Qwen2.5 has heads of 151,936
and 152,064 rows over one tokenizer): rows beyond the shorter head are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastllm.models.tokenizer import Tokenizer
from fastllm.ops import packed_layout as layout
from fastllm.quantize.packed import PackedWeight

_SHOWN = 5  # differing ids in an error
_REMEDY = (
    "Divergences need one vocabulary: choose a teacher of the student's family, or --mode "
    "sequences, which works across vocabularies"
)


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What two models have in common. size: ids whose probabilities are compared, from 0."""

    size: int
    notes: tuple[str, ...] = ()


def shared_vocabulary(
    student: Tokenizer, teacher: Tokenizer, student_rows: int, teacher_rows: int
) -> SharedVocabulary:
    """The ids that a student's and a teacher's head share.

    student_rows, teacher_rows: rows of the heads, padding included.
    An id that only one tokenizer knows (a padded row, or a token that was added for one of them) is
    let pass and noted. Raises ValueError if an id means different tokens, naming the first ones.
    """
    size = min(student_rows, teacher_rows)
    notes = []
    if student_rows != teacher_rows:
        longer = "student" if student_rows > size else "teacher"
        left_out = max(student_rows, teacher_rows) - size
        notes.append(
            f"heads of {student_rows} and {teacher_rows} rows: the {longer}'s last {left_out} are "
            "left out of the divergence"
        )
    if student.fingerprint != teacher.fingerprint:
        alone = _compare(student, teacher, size)
        if alone:
            notes.append(f"{len(alone)} ids are a token for one of both alone: {_listed(alone)}")
    return SharedVocabulary(size, tuple(notes))


def _compare(student: Tokenizer, teacher: Tokenizer, size: int) -> list[str]:
    """Ids that only one of both knows, described. Raises ValueError for ids that differ."""
    alone: list[str] = []
    differ: list[str] = []
    known = min(max(student.vocab_size, teacher.vocab_size), size)
    for i in range(known):
        mine, theirs = student.id_to_token(i), teacher.id_to_token(i)
        if mine == theirs:
            continue
        described = f"{i} is {mine!r} for the student and {theirs!r} for the teacher"
        (alone if mine is None or theirs is None else differ).append(described)
    if differ:
        raise ValueError(
            f"teacher and student have different vocabularies: {len(differ)} of {known} ids mean "
            f"different tokens, such as {_listed(differ)}. {_REMEDY}"
        )
    return alone


def _listed(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_SHOWN]) + ("; ..." if len(texts) > _SHOWN else "")


def narrowed(head: Tensor | PackedWeight, size: int) -> Tensor | PackedWeight:
    """The first `size` rows of an LM head, as a view."""
    if isinstance(head, Tensor):
        return head if head.shape[0] == size else head[:size]
    if head.n == size:
        return head
    groups = layout.data_shape(head.format, size, head.k, head.rows_per_group)[0]
    scales = head.scales if head.format in layout.DENSE else head.scales[:groups]
    return replace(head, data=head.data[:groups], scales=scales, n=size)
