"""Lets `python -m pipeline.cli` (and so `torchrun -m pipeline.cli`) run the command line."""

from pipeline.cli.main import main

main()
