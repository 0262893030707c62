"""Built-in training tasks: a network, its data, and the figure that counts. `gossamer train` runs them by name."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import unknown
from .clothes import clothes_cnn, clothes_vit
from .photos import photos_edsr
from .series import ucr_cnn
from .task import Batch, Task, lot
from .teacher import teacher
from .wikitext import wikitext_llama, wikitext_lstm

TASKS: dict[str, Callable[[], Task]] = {
    "clothes-cnn": clothes_cnn,
    "clothes-vit": clothes_vit,
    "photos-edsr": photos_edsr,
    "teacher": teacher,
    "ucr-cnn": ucr_cnn,
    "wikitext-llama": wikitext_llama,
    "wikitext-lstm": wikitext_lstm,
}

__all__ = ["TASKS", "Batch", "Task", "lot", "task"]


def task(name: str) -> Task:
    """The built-in task of this name; its data are fetched on first use.

    Raises:
        UnknownName: there is none; the message lists near names.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]()
