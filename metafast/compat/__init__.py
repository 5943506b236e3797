"""Drop-in modules for the users of other libraries."""
