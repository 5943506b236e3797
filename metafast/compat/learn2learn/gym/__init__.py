"""Not provided."""

raise ImportError(
    "learn2learn.gym of learn2learn 0.2.0 is not provided: it wraps reinforcement-learning environments of gym, which "
    "is no longer maintained and does not run with NumPy 2; learn2learn.algorithms works with environments of your own"
)
