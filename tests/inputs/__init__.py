"""What people bring: inputs that are not as a test would draw them."""
