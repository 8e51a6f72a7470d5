"""Tests of g2l_core.store."""
