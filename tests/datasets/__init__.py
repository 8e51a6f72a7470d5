"""Public datasets: their folders in miniature, and the task files that ship."""
