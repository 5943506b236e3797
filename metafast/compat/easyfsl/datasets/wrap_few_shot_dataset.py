"""Any data set of torch as one that tasks are drawn from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._rows import Rows
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)


class WrapFewShotDataset(FewShotDataset):
    """The images and labels of another data set, which is read once for its labels.

    Labels that are tensors become ints. Of a TensorDataset nothing is read one by one.

    Args:
        dataset: its items are tuples.
        image_position_in_get_item_output: place of the image in an item.
        label_position_in_get_item_output: place of the label in an item.

    Raises:
        ValueError: places that are the same, negative, or not in an item; an empty data set.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        image_position_in_get_item_output: int = 0,
        label_position_in_get_item_output: int = 1,
    ) -> None:
        places = {
            "image_position_in_get_item_output": image_position_in_get_item_output,
            "label_position_in_get_item_output": label_position_in_get_item_output,
        }
        image, label = places.values()
        if image == label:
            raise ValueError(f"{' and '.join(places)}: expected two places, got {image} for both")
        source: Any = dataset
        sized = hasattr(source, "__len__")
        if sized and len(source) == 0:
            raise ValueError("dataset: expected at least one item, got none")
        width = len(source[0])
        for name, place in places.items():
            if not 0 <= place < width:
                raise ValueError(f"{name}: expected a number from 0 to {width - 1}, got {place}")
        self.source_dataset = dataset
        self.image_position_in_get_item_output = image
        self.label_position_in_get_item_output = label
        self.labels: list[Any]
        if type(dataset) is TensorDataset:
            self.labels = dataset.tensors[label].tolist()
        else:
            # A sized data set need not end by an IndexError.
            items = (source[i] for i in range(len(source))) if sized else iter(source)
            self.labels = [_plain(item[label]) for item in items]

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        found: Any = self.source_dataset[item]
        return (
            found[self.image_position_in_get_item_output],
            _plain(found[self.label_position_in_get_item_output]),
        )

    def __getitems__(self, items: list[int]) -> Any:
        """What a DataLoader asks for: the rows of a batch."""
        source = self.source_dataset
        if type(source) is TensorDataset and type(self).__getitem__ is WrapFewShotDataset.__getitem__:
            images = source.tensors[self.image_position_in_get_item_output]
            return Rows(images, self.labels, items)
        return [self[item] for item in items]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[Any]:
        return self.labels


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, Tensor) and label.dim() == 0 else label
