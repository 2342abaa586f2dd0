"""Decisions: what the gates say becomes one flag a span, alike on every rank."""
