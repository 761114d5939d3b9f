"""On-policy context distillation."""
