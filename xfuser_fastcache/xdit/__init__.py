"""The rooms that touch xfuser; nothing outside this package imports it."""
