"""A graph's way through the pass: attention found, understood, checked, replaced; the rest left as it was."""
