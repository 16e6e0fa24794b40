"""What a checkpoint says about itself, checked as the word of a stranger.

Its checksum finds accidents; who forges a manifest forges that too. So types, ranges and names are checked by a schema
(pydantic) before anything else looks at them. No torch here.

A new field needs a default, so that checkpoints of before still load: one line in `Manifest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from loqt_scale.checkpoint.files import ELSEWHERE, CheckpointError, read_inside
from loqt_scale.errors import first_mistake, shortened

FORMAT: Final = 1
MANIFEST = "manifest.json"
_SELF = "sha256"  # key of the manifest's own checksum
_GREATEST_SIZE = 2**26  # bytes; of a 13b model's it is less than 1 MB

Count = Annotated[int, Field(ge=0, lt=2**53)]
Shape = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8, strict=False)]
Dtype = Literal["float32", "bfloat16", "float16", "uint8", "int8"]
Tensor = Annotated[tuple[Shape, Dtype], Field(strict=False)]
TensorName = Annotated[
    str, StringConstraints(pattern=r"^(model\.[\w.\-]+|moments\.[\w.\-]+\.(first|second))\z", max_length=512)
]
# no part begins with a dot: neither `..` nor hidden files
FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.+\- ]*(/\w[\w.+\- ]*){0,3}\z", max_length=512)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]
# what could run code, or be taken for weights, has no place among the model's and the tokenizer's files
_CODE = (".py", ".pyc", ".so", ".dll", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".npy", ".npz")
_WEIGHTS = ".safetensors"


class Manifest(BaseModel):
    """What a checkpoint says about itself.

    Args:
        format: Version of the layout.
        step: Optimizer steps done.
        updates: Optimizer steps applied (the others were skipped).
        skipped_in_a_row: How many of the last steps were skipped.
        merge_is_due: Whether the next step ends in a merge.
        tokens: Tokens trained on.
        warmup_steps: The warm-up with which the run began; None: a checkpoint of before this was written down.
        eval_before: Held-out loss before training, in nats.
        world_size: Ranks that wrote it.
        strategy: Their strategy, for people; any other can read it.
        tensors: Shape and dtype of every tensor.
        files: sha256 of every file but this one.
        sizes: Bytes of these files.

    Raises:
        pydantic.ValidationError: A ValueError; a field that is missing, unknown, of another type or out of range.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1]
    step: Count
    updates: Count
    skipped_in_a_row: Count
    merge_is_due: bool
    tokens: Count
    warmup_steps: Count | None = None
    eval_before: float
    world_size: Annotated[int, Field(ge=1, lt=2**20)]
    strategy: Annotated[str, StringConstraints(max_length=1000)]
    tensors: dict[TensorName, Tensor]
    files: dict[FileName, Digest] = {}
    sizes: dict[FileName, Count] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.updates + self.skipped_in_a_row > self.step:
            raise ValueError(
                f"{self.updates} updates and {self.skipped_in_a_row} skipped in a row of {self.step} steps"
            )
        if self.sizes and self.sizes.keys() != self.files.keys():
            raise ValueError("the sizes are not those of its files")
        return self

    @field_validator("files")
    @classmethod
    def _holds_no_code(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if name.lower().endswith(_CODE) or ("/" in name and name.lower().endswith(_WEIGHTS)):
                raise ValueError(f"{name} is code or weights, which have no place there")
        return files

    @property
    def shards(self) -> list[str]:
        """The files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(_WEIGHTS))

    @property
    def side_files(self) -> list[str]:
        """The other files."""
        return sorted(name for name in self.files if not name.endswith(_WEIGHTS))

    def to_json(self) -> str:
        """The text of manifest.json, with its own checksum."""
        tree = self.model_dump(mode="json")
        return json.dumps(tree | {_SELF: _tree_digest(tree)}, indent=1) + "\n"

    def completed(self, tensors: Mapping[str, Any], files: Mapping[str, str], sizes: Mapping[str, int]) -> Manifest:
        """The same with what only the saved files tell filled in."""
        return Manifest(**(dict(self) | {"tensors": dict(tensors), "files": dict(files), "sizes": dict(sizes)}))


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a checkpoint's manifest.

    Raises:
        CheckpointError: It is missing, damaged, of another format, or not what a manifest may say.
    """
    try:
        return _checked(_read(folder), folder)
    except FileNotFoundError:
        why = f"it has no {MANIFEST} (half copied, or removed by a job that goes on: checkpoint.keep_last)"
        raise CheckpointError(f"{folder} is no checkpoint: {why}; {ELSEWHERE}") from None
    except OSError as error:  # a link, too
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error.strerror or error}); {ELSEWHERE}") from None
    except ValidationError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({first_mistake(error)}); {ELSEWHERE}") from None
    except CheckpointError:
        raise
    except ValueError as error:  # not JSON, not UTF-8
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error}); {ELSEWHERE}") from None


def _read(folder: Path) -> Any:
    text = read_inside(folder, MANIFEST, _GREATEST_SIZE + 1)
    if len(text) > _GREATEST_SIZE:
        raise ValueError(f"it is larger than {_GREATEST_SIZE >> 20} MiB")
    return from_json(text)  # unlike json, of limited depth


def _checked(tree: Any, folder: Path) -> Manifest:
    if not isinstance(tree, dict) or "format" not in tree:
        raise ValueError("it holds no format version")
    if tree["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {shortened(ascii(tree['format']))}, but this version reads {FORMAT}; use "
            "the version of loqt_scale that wrote it"
        )
    if tree.pop(_SELF, None) != _tree_digest(tree):
        raise ValueError("it does not have its checksum")
    return Manifest(**tree)


def _tree_digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
