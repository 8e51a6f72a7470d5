"""What is measured on stored features: pure functions of arrays, and the figures they give."""
