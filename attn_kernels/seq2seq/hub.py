"""``Seq2Seq`` with ``save_pretrained`` and ``from_pretrained``: weights as safetensors, arguments as JSON.

The mixin of ``huggingface_hub`` does it; here is what it leaves open: files that appear when they are complete, a
dtype, and a configuration without what belongs to a machine.
"""

from __future__ import annotations

import numbers
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentValueError
from .model import Seq2Seq

if TYPE_CHECKING:  # what is used of the mixin, also where the package is missing

    class PyTorchModelHubMixin:
        _hub_mixin_config: Any

        def __init_subclass__(
            cls, *, library_name: str = "", tags: list[str] | None = None, coders: Any = None
        ) -> None: ...
        def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None: ...
        def push_to_hub(self, repo_id: str, **options: Any) -> str: ...
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PretrainedSeq2Seq: ...
        @classmethod
        def _from_pretrained(cls, **options: Any) -> PretrainedSeq2Seq: ...

else:
    try:
        import safetensors.torch  # noqa: F401  # the mixin would miss it only when it saves
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError as _missing:
        _message = f"attn_kernels.seq2seq.hub needs the package {_missing.name}: pip install 'attn_kernels[hub]'"
        raise ImportError(_message) from _missing

__all__ = ["PretrainedSeq2Seq"]

_OF_A_MACHINE = ("backend", "cuda_graph", "decoder", "device")  # how a model is computed, and where


def _as_python(value: Any) -> Any:
    """A number as one of Python: JSON has no other."""
    return value if isinstance(value, bool) else int(value) if isinstance(value, numbers.Integral) else float(value)


class PretrainedSeq2Seq(
    Seq2Seq,
    PyTorchModelHubMixin,
    library_name="attn_kernels",
    tags=["seq2seq", "attention"],
    coders={numbers.Real: (_as_python, lambda value: value)},
):
    """A ``Seq2Seq``, with the same arguments, that the Hugging Face Hub and a local folder keep.

    ``save_pretrained(folder)`` writes ``model.safetensors``, ``config.json`` and a model card, ``README.md``;
    ``from_pretrained(folder)`` makes the model again, in evaluation mode and with the dtype that it had. Nothing that
    is loaded is executed. The configuration has the arguments of the constructor, the attention by its name, but for
    ``backend``, ``cuda_graph``, ``decoder`` and ``device``, which belong to a machine and not to a model; they may be
    given to ``from_pretrained``. ``push_to_hub`` and the other arguments are those of
    ``huggingface_hub.PyTorchModelHubMixin``.

    An attention is given by its name, not as a module.

    The weights of a ``Seq2Seq`` that is trained already go into one with the same arguments by ``load_state_dict``.
    """

    _attention_by_name = True

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the model into a folder. Each file appears when it is complete, the configuration last.

        Arguments as of ``ModelHubMixin.save_pretrained``; config: in place of that of the model. A model card that is
        there stays.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        given = config
        if config is None:
            given = {name: value for name, value in self._hub_mixin_config.items() if name not in _OF_A_MACHINE}
            given["dtype"] = str(next(self.parameters()).dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            super().save_pretrained(unfinished, config=given, model_card_kwargs=model_card_kwargs)
            for name in sorted(os.listdir(unfinished), key=lambda file: file == "config.json"):
                if name != "README.md" or not (folder / name).exists():
                    os.replace(os.path.join(unfinished, name), folder / name)
        if not push_to_hub:
            return None
        named = {"config": given, "model_card_kwargs": model_card_kwargs, **push_to_hub_kwargs}
        return self.push_to_hub(repo_id=repo_id or folder.name, **named)

    @classmethod
    def _from_pretrained(
        cls, *, strict: bool = True, dtype: torch.dtype | str | None = None, **options: Any
    ) -> PretrainedSeq2Seq:
        """strict: weights that are missing or too many are an error. dtype: by name, as the configuration has it."""
        if isinstance(dtype, str):
            found = getattr(torch, dtype, None)
            if not isinstance(found, torch.dtype):
                raise ArgumentValueError(
                    f"PretrainedSeq2Seq: dtype must be the name of a dtype of torch, got {dtype!r}"
                )
            dtype = found
        return super()._from_pretrained(strict=strict, dtype=dtype, **options)
