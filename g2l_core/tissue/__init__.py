"""Where a slide has tissue: thresholds, a network, or a file of yours. `methods` chooses among them."""
