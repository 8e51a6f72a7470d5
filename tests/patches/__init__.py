"""Tests of g2l_core.patches."""
