"""What goes wrong, provoked: damage, crowds and hostile input."""
