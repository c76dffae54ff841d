"""Training: the loop, its optimizer and schedule, evaluation, and what it writes on the way."""
