"""What concentration costs, known before it runs."""
