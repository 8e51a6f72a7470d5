"""Tests; `conftest` holds what they share."""
