"""What runs in a compiled graph: the operators, their shapes for tracing, and attention without quantisation."""
