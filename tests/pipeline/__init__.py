"""Tests of the stages and of the command line."""
