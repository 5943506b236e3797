"""Not provided."""

raise ImportError(
    "learn2learn.text of learn2learn 0.2.0 is not provided: it downloads one news data set for a transformers release "
    "of 2020; wrap any torch Dataset of texts in learn2learn.data.MetaDataset instead"
)
