"""Public pathology datasets: facts about each, and readers that turn their folders into manifests and labels."""
