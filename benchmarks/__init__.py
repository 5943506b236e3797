"""Speed of metafast against the strongest plain PyTorch forms of the same work, each case written once."""
