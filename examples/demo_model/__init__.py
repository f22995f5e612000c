"""Small, real LLaVAs (1.5 and 1.6) that look at drawn scenes: drawing, training, export and evaluation."""
